"""A ledger without its model: what its file holds, how it is read, replaced and locked. Needs no JAX.

The file is one safetensors file, replaced whole. Its arrays are the edits' targets; one more, of bytes, is the rest as
JSON, which in the header could not be larger than 100 MB.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy, and so safetensors, what bfloat16 is)
import numpy as np

from jaxedit.cache import write_atomically
from jaxedit.errors import JaxEditError
from jaxedit.types import EditRequest

FORMAT = "jaxedit-ledger-1"
_TEXT, _HELD = "record", "adapter."


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LedgerRecord:
    """The edits of a ledger, in order, and what they belong to.

    method: as `jaxedit.edit.describe` gives it. templates: what anchors are found in; seed: that they were sampled
    with, None where they were given. base, dtype: fingerprint and dtype of the base's weights. statistics: which were
    given to solve with (`jaxedit.ledger_targets.identity`), None for the default ones.
    requests: by id. arrays: the edits' targets and how they were found, each with the edit as its first axis; none
    where targets depend on other edits.
    adapter, held: of an editor that adds parameters, what is attached to the base, as plain data and arrays (see
    `jaxedit.adapters.attached.to_plain`), None and empty without edits; numbers: of each edit by id in it, also of
    those that were withdrawn and have yet to be taken out; given: how many it was ever given.
    next_id: the number that the next edit without an id gets. No number is given twice.
    lineage: hashes of this state, which is the last, and of those it was made from since it was read or created.
    """

    method: Mapping[str, Any]
    templates: tuple[tuple[str, ...], ...]
    seed: int | None
    base: str
    dtype: str
    statistics: Mapping[str, Any] | None
    requests: Mapping[str, EditRequest] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    next_id: int = 0
    lineage: tuple[str, ...] = ()
    adapter: Mapping[str, Any] | None = None
    held: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    numbers: Mapping[str, int] = dataclasses.field(default_factory=dict)
    given: int = 0

    def __post_init__(self):
        if not self.lineage:
            about = (self.method, self.templates, self.base, self.dtype, self.statistics)
            object.__setattr__(self, "lineage", (_hash(*about),))
        sizes = {name: len(x) for name, x in self.arrays.items() if len(x) != len(self.requests)}
        if sizes:
            raise JaxEditError(f"a ledger of {len(self.requests)} edits cannot have targets of {sizes}")

    def rows(self, ids: Iterable[str | int]) -> list[int]:
        """Where edits stand. Raises JaxEditError naming every id that is unknown or given twice."""
        places = {id: row for row, id in enumerate(self.requests)}
        wanted = [str(id) for id in ids]
        unknown = sorted(set(wanted) - places.keys())
        if unknown:
            some = ", ".join(list(places)[:10]) + ", …" * (len(places) > 10)
            raise JaxEditError(f"there are no edits {', '.join(unknown)} in the ledger; its edits: {some or 'none'}")
        twice = sorted({id for id in wanted if wanted.count(id) > 1})
        if twice:
            raise JaxEditError(f"edits {', '.join(twice)} are named twice")
        return [places[id] for id in wanted]

    def numbered(self, requests: Iterable[EditRequest]) -> tuple[dict[str, EditRequest], list[str]]:
        """The requests by the ids they get, their own or the next number, and what is wrong with their own ids."""
        made: dict[str, EditRequest] = {}
        problems, requests = [], tuple(requests)
        number = _after(self.next_id, (str(r.id) for r in requests))
        for i, request in enumerate(requests):
            if request.id is None:
                request, number = dataclasses.replace(request, id=number), number + 1
            id = str(request.id)
            if id in made or id in self.requests:
                other = (made.get(id) or self.requests[id]).prompt
                problems.append(f"request {i}: id {id} is that of {other!r} already; give it another id, or none")
            made[id] = request
        return made, problems

    def with_edits(self, requests: Mapping[str, EditRequest], arrays: Mapping[str, np.ndarray]) -> LedgerRecord:
        """More edits after these ones; ids are new."""
        if self.arrays:
            self._check_names(arrays)
            arrays = {name: np.concatenate([x, arrays[name]]) for name, x in self.arrays.items()}
        return self._next(requests={**self.requests, **requests}, arrays=arrays)

    def with_replaced(self, id: str, request: EditRequest, arrays: Mapping[str, np.ndarray]) -> LedgerRecord:
        """Another request, with its targets (one edit's), in the place of an edit."""
        (row,) = self.rows([id])
        self._check_names(arrays)
        changed = {name: np.concatenate([x[:row], arrays[name], x[row + 1 :]]) for name, x in self.arrays.items()}
        return self._next(requests={**self.requests, id: request}, arrays=changed)

    def without(self, ids: Iterable[str | int]) -> LedgerRecord:
        """All edits but these."""
        gone = set(self.rows(ids))
        stay = [row for row in range(len(self.requests)) if row not in gone]
        kept = {id: r for row, (id, r) in enumerate(self.requests.items()) if row not in gone}
        if not kept:
            return self._next(requests={}, arrays={}, adapter=None, held={}, numbers={}, given=0)
        return self._next(requests=kept, arrays={name: x[stay] for name, x in self.arrays.items()})

    def with_adapter(
        self,
        requests: Mapping[str, EditRequest],
        attached: tuple[Mapping[str, Any], Mapping[str, np.ndarray]],
        numbers: Mapping[str, int],
        given: int,
    ) -> LedgerRecord:
        """Other edits, and what is attached to the base for them."""
        adapter, held = attached
        return self._next(requests=dict(requests), adapter=adapter, held=held, numbers=dict(numbers), given=given)

    def with_statistics(self, statistics: Mapping[str, Any] | None) -> LedgerRecord:
        """The same edits, to be solved with other statistics."""
        return self._next(statistics=statistics)

    def found(self, id: str | int) -> dict[int, dict[str, float]]:
        """How an edit's anchors were found, by layer: Adam's updates, the loss before the first and after the last of
        them, and the norms of the hidden state and of what was added to it."""
        (row,) = self.rows([id])
        made = {}
        for l in sorted(int(name.split(".")[1]) for name in self.arrays if name.endswith(".updates")):
            names = ("value", "init", "updates", "losses")
            value, init, updates, losses = (self.arrays[f"anchors.{l}.{name}"][row] for name in names)
            made[l] = {
                "updates": int(updates),
                "first_loss": float(losses[0, 0]),
                "final_loss": float(losses[updates, 0]),
                "init_norm": float(np.linalg.norm(init)),
                "delta_norm": float(np.linalg.norm(value - init)),
            }
        return made

    def _next(self, **changes) -> LedgerRecord:
        """Another state. Targets follow from the rest, so its hash leaves them out."""
        made = dataclasses.replace(self, **changes)
        requests = {id: dataclasses.asdict(r) for id, r in made.requests.items()}
        state = _hash(self.lineage[-1], made.statistics, requests)
        number = _after(self.next_id, made.requests)
        return dataclasses.replace(made, next_id=number, lineage=(*self.lineage, state))

    def _check_names(self, arrays: Mapping[str, np.ndarray]):
        if arrays.keys() != self.arrays.keys():
            differ = sorted(arrays.keys() ^ self.arrays.keys())
            raise JaxEditError(
                f"the ledger's targets were made by another version of jaxedit, with other arrays "
                f"({', '.join(differ)}); make a new ledger of its requests"
            )


def _after(number: int, ids: Iterable[str]) -> int:
    """The first number that is larger than those of all `ids`, and not below `number`."""
    return max([number, *(int(id) + 1 for id in ids if id.isdecimal())])


def _hash(*content) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


# The file.


@contextmanager
def locked(path) -> Iterator[None]:
    """Keep other processes from changing the ledger at `path` for as long as the block runs. May be nested.

    The lock is one of the operating system's on ``PATH.lock``, so it ends with the process, however that ends.
    Raises JaxEditError at once where another process has it.
    """
    import filelock

    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(f"{path}.lock", timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise JaxEditError(
            f"the ledger {path} is being changed by another process, which holds {path}.lock; "
            "try again when that one has finished"
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_record(record: LedgerRecord, path) -> Path:
    """Create or replace the file: it appears whole or not at all, whenever the process ends.

    Raises JaxEditError where another process is changing it, or where what is there is neither the state that the
    record was made from nor one in between, so nobody's changes are lost.
    """
    from safetensors.numpy import save_file

    text = json.dumps(
        {
            field.name: getattr(record, field.name)
            for field in dataclasses.fields(record)
            if field.name not in ("requests", "arrays", "held", "lineage")
        }
        | {"requests": {id: dataclasses.asdict(r) for id, r in record.requests.items()}}
    )
    arrays = {**record.arrays, **{_HELD + name: x for name, x in record.held.items()}}
    tensors = {name: np.array(x, order="C") for name, x in arrays.items()}
    tensors[_TEXT] = np.frombuffer(text.encode(), np.uint8)
    header = {"jaxedit": json.dumps({"format": FORMAT, "state": record.lineage[-1]})}
    path = Path(path).resolve()
    with locked(path):
        if path.exists() and _state(path) not in record.lineage:
            raise JaxEditError(
                f"{path} holds another ledger, or was changed since this one was read from it; nothing was written. "
                "Read it again and repeat the change, or choose another file"
            )
        for left in path.parent.iterdir():  # by processes that were killed while they wrote: the lock is ours
            if re.fullmatch(rf"\.\d+-[0-9a-f]{{8}}-{re.escape(path.name)}", left.name):
                left.unlink(missing_ok=True)
        write_atomically(path, lambda p: save_file(tensors, p, metadata=header))
    return path


def read_record(path) -> LedgerRecord:
    """What `write_record` wrote. Raises JaxEditError on anything else."""
    with _opened(path) as (handle, state):
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        about = json.loads(tensors.pop(_TEXT).tobytes())
        about["templates"] = tuple(map(tuple, about["templates"]))
        about["requests"] = {id: EditRequest(**r) for id, r in about["requests"].items()}
        held = {name[len(_HELD) :]: tensors.pop(name) for name in list(tensors) if name.startswith(_HELD)}
        return LedgerRecord(**about, arrays=tensors, held=held, lineage=(state,))


def _state(path: Path) -> str:
    with _opened(path) as (_, state):
        return state


@contextmanager
def _opened(path) -> Iterator[tuple[Any, str]]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as handle:
            header = json.loads((handle.metadata() or {})["jaxedit"])
            if header["format"] != FORMAT:
                raise JaxEditError(f"{path} has format {header['format']!r}; this version reads {FORMAT!r}")
            yield handle, header["state"]
    except JaxEditError:
        raise
    except FileNotFoundError:
        raise JaxEditError(f"there is no ledger at {path}") from None
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise JaxEditError(f"{path} is not a complete jaxedit ledger: {type(error).__name__}: {error}") from None
