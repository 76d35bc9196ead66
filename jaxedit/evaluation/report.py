"""The result of an evaluation: every prompt's numbers, their summaries, and a plain-text table.

Definitions follow MEMIT's evaluation (Meng et al. 2023): see `jaxedit.evaluation.metrics.evaluate`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jaxedit.evaluation.specificity import Specificity
from jaxedit.plain import finite

Kind = Literal["efficacy", "paraphrase", "neighbourhood"]
KINDS: tuple[Kind, ...] = ("efficacy", "paraphrase", "neighbourhood")
Summary = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Score:
    """One model on one prompt.

    nll_new, nll_true: negative log-likelihood of the new and the true target, nats, mean over target tokens.
    correct_new, correct_true: every token of that target is the likeliest one, the earlier ones given.
    generated: greedy generation gives the new target; None where it was not asked for.
    What concerns the true target is None where that is not known.
    """

    nll_new: float
    nll_true: float | None
    correct_new: bool
    correct_true: bool | None
    generated: bool | None = None


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """One prompt with both models' scores; at neighbourhood prompts also `kl` and `overlap` (1, 5, 10)."""

    kind: Kind
    prompt: str
    target_new: str
    target_true: str | None
    base: Score
    edited: Score
    kl: float | None = None
    overlap: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class RequestRecord:
    """The prompts of one request: `index` is its place in the list, `id` its own name."""

    index: int
    id: str | int | None
    prompts: tuple[PromptRecord, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """`base`, `edited`, `specificity`: summaries by metric, None where nothing could be measured.

    counts: how many prompts stand behind each metric. Rates are between 0 and 1, `kl` is in nats.
    """

    records: tuple[RequestRecord, ...]
    base: Summary
    edited: Summary
    specificity: Summary
    counts: dict[str, int]

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> Report:
        """Summarise: over the prompts of a record first, then over the records that have such prompts."""
        base, counts = _summary(records, lambda p: p.base)
        edited, _ = _summary(records, lambda p: p.edited)
        near = [p for r in records for p in r.prompts if p.kl is not None]
        drift = Specificity(np.array([p.kl for p in near]), np.array([p.overlap for p in near])).summary()
        return cls(tuple(records), base, edited, drift, counts | dict.fromkeys(drift, len(near)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is not a finite number becomes None."""
        return finite(dataclasses.asdict(self))

    def table(self) -> str:
        """The summaries as aligned text: rates in percent, base beside edited, and the number of prompts."""
        rows = [("", "base", "edited", "prompts")]
        for name in self.base:
            count = str(self.counts[name]) if name in self.counts else ""
            label = name.replace("_", " ")
            rows.append((label, _percent(self.base[name]), _percent(self.edited[name]), count))
        for name, value in self.specificity.items():
            label = "KL(base || edited)" if name == "kl" else f"top-{name[3:]} overlap"
            shown = _percent(value) if name != "kl" or value is None else f"{value:.4f}"
            rows.append((label, "", shown, str(self.counts[name])))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        return self.table()


def _summary(records: Sequence[RequestRecord], side: Callable[[PromptRecord], Score]):
    """Every metric of one model, and the number of prompts behind each."""
    means: Summary = {}
    counts: dict[str, int] = {}

    def add(name: str, kind: Kind, measure: Callable[[Score], float | None]):
        rows = [[measure(side(p)) for p in r.prompts if p.kind == kind] for r in records]
        known = [[x for x in row if x is not None] for row in rows]
        means[f"{kind}_{name}"] = mean([float(np.mean(row)) for row in known if row])
        counts[f"{kind}_{name}"] = sum(map(len, known))

    for kind in KINDS:
        sign = -1 if kind == "neighbourhood" else 1
        add("success", kind, lambda s, sign=sign: _success(s, sign))
        add("magnitude", kind, lambda s, sign=sign: _magnitude(s, sign))
        add("accuracy", kind, (lambda s: s.correct_true) if sign < 0 else (lambda s: s.correct_new))
    means["score"] = harmonic_mean([means[f"{kind}_success"] for kind in KINDS])
    if any(side(p).generated is not None for r in records for p in r.prompts):
        for kind in KINDS[:2]:
            add("generation_accuracy", kind, lambda s: s.generated)
    return means, counts


def _success(s: Score, sign: int) -> float | None:
    return None if s.nll_true is None else float(sign * s.nll_new < sign * s.nll_true)


def _magnitude(s: Score, sign: int) -> float | None:
    return None if s.nll_true is None else sign * (math.exp(-s.nll_new) - math.exp(-s.nll_true))


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return float(np.mean(values)) if values else None


def harmonic_mean(values: Sequence[float | None]) -> float | None:
    """The harmonic mean; 0 where a value is 0, None where one is not known."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    return 0.0 if 0 in known else len(known) / sum(1 / v for v in known)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
