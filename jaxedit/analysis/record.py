"""What causal tracing finds, by layer and by the role of tokens in a prompt."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxedit.cache import write_atomically
from jaxedit.data.facts import Fact
from jaxedit.errors import JaxEditError
from jaxedit.plain import finite

FORMAT = "jaxedit-trace-1"
Kind = Literal["hidden", "mlp", "attention"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
FIRST, MIDDLE, LAST_SUBJECT, SUBSEQUENT, FURTHER, LAST = range(len(ROLES))


class Average(NamedTuple):
    """Average indirect effects of one kind, ``[n_layer, roles]``: the mean over facts (of the mean over a fact's
    tokens of that role), its standard error (NaN for fewer than two facts), and the number of facts ``[roles]``.
    A mean over no facts is NaN."""

    mean: np.ndarray
    error: np.ndarray
    count: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """The indirect effects of a model's states, all float64.

    facts: those traced; unknown: those looked at that the model does not know. Per traced fact: `tokens`, the
    texts of its prompt's tokens; `answers`, the text of the token whose probability is meant; `subjects`
    ``[facts, 2]``, first and last token of the subject; `clean` and `corrupted` ``[facts]``, that probability without
    and with noise (mean over samples).
    effects: by kind ``[n_layer, all tokens]``, P(restored) - P(corrupted), the tokens of one fact after another's.
    about: settings, and the model's family and shape.
    """

    facts: tuple[Fact, ...]
    unknown: tuple[Fact, ...]
    tokens: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]
    subjects: np.ndarray
    clean: np.ndarray
    corrupted: np.ndarray
    effects: Mapping[str, np.ndarray]
    about: Mapping[str, Any]

    @property
    def n_layer(self) -> int:
        return len(next(iter(self.effects.values())))

    @property
    def total_effect(self) -> float:
        """Mean over facts of P(clean) - P(corrupted)."""
        return float((self.clean - self.corrupted).mean())

    def grid(self, kind: str, fact: int) -> np.ndarray:
        """The effects ``[n_layer, tokens]`` of one fact."""
        ends = np.cumsum([len(t) for t in self.tokens])
        return self._of(kind)[:, ends[fact] - len(self.tokens[fact]) : ends[fact]]

    def average(self, kind: str) -> Average:
        """The average indirect effects by layer and role."""
        subjects = self.subjects.tolist()
        roles = [token_roles(a, b, len(t)) for (a, b), t in zip(subjects, self.tokens, strict=True)]
        grids = [self.grid(kind, i) for i in range(len(self.tokens))]
        mean, error = (np.full((self.n_layer, len(ROLES)), np.nan) for _ in range(2))
        count = np.zeros(len(ROLES), int)
        for r in range(len(ROLES)):
            found = [grid[:, role == r].mean(1) for grid, role in zip(grids, roles, strict=True) if (role == r).any()]
            count[r] = len(found)
            if found:
                mean[:, r] = np.mean(found, 0)
            if len(found) > 1:
                error[:, r] = np.std(found, 0, ddof=1) / np.sqrt(len(found))
        return Average(mean, error, count)

    def _of(self, kind: str) -> np.ndarray:
        if kind not in self.effects:
            raise JaxEditError(f"this trace has no effects of kind {kind!r}, only of {', '.join(self.effects)}")
        return self.effects[kind]

    def to_dict(self) -> dict[str, Any]:
        """The averages and settings as plain data for JSON, None for NaN, without the grids of single facts."""
        averages = {kind: self.average(kind) for kind in self.effects}
        return {
            "about": dict(self.about),
            "facts": len(self.facts),
            "not_known": len(self.unknown),
            "clean": float(self.clean.mean()),
            "corrupted": float(self.corrupted.mean()),
            "total_effect": self.total_effect,
            "roles": list(ROLES),
            "effects": {k: finite({name: x.tolist() for name, x in a._asdict().items()}) for k, a in averages.items()},
        }

    def save(self, path) -> Path:
        """Write one .npz file, whole or not at all."""
        about = {
            "format": FORMAT,
            "about": dict(self.about),
            "facts": [dataclasses.asdict(f) for f in self.facts],
            "unknown": [dataclasses.asdict(f) for f in self.unknown],
            "tokens": self.tokens,
            "answers": self.answers,
        }
        arrays = {"subjects": self.subjects, "clean": self.clean, "corrupted": self.corrupted}
        arrays |= {f"effects.{kind}": x for kind, x in self.effects.items()}
        held, path = io.BytesIO(), Path(path)
        np.savez_compressed(held, about=np.asarray(json.dumps(about)), **arrays)  # type: ignore[arg-type]
        _write(path, held.getvalue())
        return path

    @classmethod
    def load(cls, path) -> Trace:
        """Read what `save` wrote; nothing is unpickled. Raises JaxEditError on anything else."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                about = json.loads(arrays["about"].item())
                if about["format"] != FORMAT:
                    raise ValueError(f"its format is {about['format']!r}; this version reads {FORMAT!r}")
                kinds = [name for name in arrays.files if name.startswith("effects.")]
                return cls(
                    facts=tuple(Fact(**f) for f in about["facts"]),
                    unknown=tuple(Fact(**f) for f in about["unknown"]),
                    tokens=tuple(map(tuple, about["tokens"])),
                    answers=tuple(about["answers"]),
                    **{name: arrays[name] for name in ("subjects", "clean", "corrupted")},
                    effects={name.removeprefix("effects."): arrays[name] for name in kinds},
                    about=about["about"],
                )
        except FileNotFoundError:
            raise JaxEditError(f"there is no trace at {path}") from None
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise JaxEditError(f"{path} is not a complete file of a trace: {error}") from None


def token_roles(first: int, last: int, length: int) -> np.ndarray:
    """The role of each token ``[length]`` of a prompt whose subject is tokens `first` to `last`; -1 before it.

    A token has one role, where it fits several the last of: first subject token, first subsequent token, last subject
    token, last token. So a subject of one token has a last token only, and one that ends the prompt none.
    """
    roles = np.full(length, FURTHER)
    roles[:first] = -1
    roles[first : last + 1] = MIDDLE
    roles[first] = FIRST
    roles[last + 1 : last + 2] = SUBSEQUENT
    roles[last] = LAST_SUBJECT
    roles[-1] = LAST
    return roles


def write_json(path: Path, content: Any):
    """Write plain data as JSON, whole or not at all."""
    _write(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _write(path: Path, content: bytes):
    def write(temporary: Path):
        temporary.write_bytes(content)

    write_atomically(path, write)
