"""The ledger: edits that are added, changed and withdrawn one by one, while the model is always that of all of them.

Targets are found on the base model, for each edit by itself. So a ledger keeps each edit's request and targets, and its
model is solved from them: withdrawing an edit is solving again without it, at no anchor's cost, and gives what
editing from scratch with the remaining requests gives. Targets that depend on other edits (PerLayer's above the first
layer; all, where edits are made one after the other) are not kept, but found while solving.

Of an editor that adds parameters, what it has added is kept, and added to or taken from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxedit.adapters.attached import attach, from_plain, to_plain
from jaxedit.adapters.editors import Editor, describe_editor, editor_from_plain, editor_of
from jaxedit.adapting import adapted
from jaxedit.config import Method
from jaxedit.data.templates import sample_templates
from jaxedit.data.tokens import CLEAN, check_templates, template_weights, validate
from jaxedit.edit import EditResult, apply_edits
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.export.patch import EditPatch
from jaxedit.layer_loop import Progress, anchor_progress
from jaxedit.ledger_files import LedgerRecord, locked, read_record, write_record
from jaxedit.ledger_targets import from_arrays, identity, own_layers, statistics_named, to_arrays
from jaxedit.models.fingerprint import whole_fingerprint
from jaxedit.models.sites import refuse_adapters
from jaxedit.models.transformer import Decoder
from jaxedit.passes import Clock
from jaxedit.plain import describe, method_from_plain
from jaxedit.presets import resolve
from jaxedit.solvers.prepare import Prepared
from jaxedit.statistics import SecondMoments
from jaxedit.targets.strategies import Targets, make_targets
from jaxedit.tuning.named import Tuner, tuner_of
from jaxedit.types import EditRequest


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Ledger:
    """The edits of one base model by one method, from `create` or `load`. `add`, `update` and `withdraw` return a new
    ledger and leave this one as it is.

    record: the edits and all else that a file holds. stats: what to solve with, by default made of the packaged
    corpus. factor: of the statistics, from an earlier state's solution.
    """

    base: Decoder
    tokenizer: Any
    method: Method | Editor
    record: LedgerRecord
    stats: SecondMoments | None = None
    factor: Prepared | None = None

    @classmethod
    def create(
        cls,
        base: Decoder,
        tokenizer,
        method: str | Method | Editor | Tuner = "fe",
        layers: Sequence[int] | None = None,
        stats: SecondMoments | None = None,
        templates=None,
        *,
        seed: int = 0,
    ) -> Ledger:
        """A ledger without edits. The arguments are those of `jaxedit.apply_edits`; they hold for all its edits.

        Context templates are sampled here, once, as anchors depend on them. Raises JaxEditError (StatisticsError)
        where method, layers or statistics do not fit the model.
        """
        if not isinstance(base, Decoder):
            raise JaxEditError(f"a ledger needs the unedited Decoder (from jaxedit.load), got {type(base).__name__}")
        refuse_adapters(base, "keep a ledger of it")
        editor = editor_of(method, base.config, layers)
        if editor is not None:
            if stats is not None or templates is not None:
                raise JaxEditError(f"{editor.name!r} solves for no weights; leave out stats and templates")
            about = (whole_fingerprint(base.params, base.config), str(base.dtype), None)
            return cls(base, tokenizer, editor, LedgerRecord(describe_editor(editor), CLEAN, seed, *about))
        if tuner_of(method, base.config) is not None:
            raise JaxEditError("fine-tuning mixes all edits; a ledger is of edits that can be taken back one by one")
        if not isinstance(method, str | Method):
            raise JaxEditError(f"method must be a name, a Method or an editor, got {type(method).__name__}")
        method = resolve(method, base.config, layers)
        plain = describe(method)
        if method_from_plain(plain) != method:
            raise JaxEditError(f"the method {method.name!r} cannot be kept in a file: it holds more than plain data")
        statistics, given = identity(stats, method, base), templates is not None
        record = LedgerRecord(
            method=plain,
            templates=check_templates(templates if given else sample_templates(base, tokenizer, seed)),
            seed=None if given else seed,
            base=whole_fingerprint(base.params, base.config),
            dtype=str(base.dtype),
            statistics=statistics,
        )
        return cls(base, tokenizer, method, record, stats)

    @classmethod
    def load(cls, path, base: Decoder, tokenizer, stats: SecondMoments | None = None) -> Ledger:
        """Read what `save` wrote. Raises JaxEditError on anything else, and where model or statistics are not those
        of the ledger."""
        record = read_record(path)
        if record.dtype != str(base.dtype):
            raise JaxEditError(f"the ledger {path} is of a {record.dtype} model and this one is {base.dtype}")
        if record.base != whole_fingerprint(base.params, base.config):
            raise JaxEditError(f"the ledger {path} is of another base model; give the one that it was created with")
        editor = editor_from_plain(record.method)
        if editor is not None:
            if stats is not None:
                raise JaxEditError(f"the ledger {path} is of {editor.name!r}, which solves for no weights")
            return cls(base, tokenizer, editor, record)
        method = method_from_plain(record.method)
        if stats is not None and identity(stats, method, base) != record.statistics:
            raise JaxEditError(
                f"the ledger {path} is solved with other second moments ({statistics_named(record.statistics)}); give "
                "those, or leave stats out and change them with `with_stats`"
            )
        read = cls(base, tokenizer, method, record, stats)
        try:
            _ = read.targets if record.requests else None
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, JaxEditError):
                raise
            raise JaxEditError(f"{path} holds targets of another version of jaxedit ({error})") from None
        return read

    def save(self, path) -> Path:
        """Create or replace the file; it appears whole or not at all, whenever the process ends.

        Raises JaxEditError where another process holds it (see `locked`) or has changed it since this ledger was
        read from it.
        """
        return write_record(self.record, path)

    locked = staticmethod(locked)

    def __len__(self) -> int:
        return len(self.record.requests)

    def __repr__(self) -> str:
        return f"Ledger({self.method.name}, {len(self)} edits)"

    def list(self) -> Mapping[str, EditRequest]:
        """All requests, by id, in the order in which they were added."""
        return dict(self.record.requests)

    def get(self, id: str | int) -> EditRequest:
        """One request. Raises JaxEditError where there is no such edit."""
        self.record.rows([id])
        return self.record.requests[str(id)]

    def add(
        self,
        requests: Iterable[EditRequest],
        *,
        anchor_cache: Path | None = None,
        on_progress: Progress | None = None,
    ) -> Ledger:
        """The ledger with more edits, whose targets are found here.

        An edit's id is its request's own, as text, or the next number. anchor_cache, on_progress: as in
        `jaxedit.apply_edits`. Raises RequestError naming every request that cannot be carried out, that repeats or
        contradicts another or an edit of the ledger, or whose id is taken; nothing is computed in that case.
        """
        requests = tuple(requests)
        made, problems = self.record.numbered(requests)
        _check(self, requests, self.record.requests, problems)
        if not isinstance(self.method, Method):
            return self._attached({**self.record.requests, **made}, tuple(made), on_progress)
        return self._with(self.record.with_edits(made, self._find(requests, anchor_cache, on_progress)))

    def update(
        self, id: str | int, request: EditRequest, *, anchor_cache: Path | None = None, on_progress=None
    ) -> Ledger:
        """The ledger with another request in the place of an edit and under its id. Raises as `add`."""
        old, id = self.get(id), str(id)
        request = dataclasses.replace(request, id=old.id)
        _check(self, (request,), {other: r for other, r in self.record.requests.items() if other != id})
        if not isinstance(self.method, Method):
            return self.withdraw(id)._attached({**self.record.requests, id: request}, (id,), on_progress)
        arrays = self._find((request,), anchor_cache, on_progress)
        return self._with(self.record.with_replaced(id, request, arrays))

    def withdraw(self, ids: str | int | Iterable[str | int]) -> Ledger:
        """The ledger without some edits. Raises JaxEditError naming every id that it does not have."""
        return self._with(self.record.without([ids] if isinstance(ids, str | int) else ids))

    def with_stats(self, stats: SecondMoments | None) -> Ledger:
        """The same edits, solved with other second moments; None for the default ones. Their targets stay."""
        if not isinstance(self.method, Method):
            raise JaxEditError(f"{self.method.name!r} solves for no weights, so it needs no second moments")
        record = self.record.with_statistics(identity(stats, self.method, self.base))
        return Ledger(self.base, self.tokenizer, self.method, record, stats)

    @property
    def targets(self) -> Targets | None:
        """Targets of all edits, at the layers where they depend on no other edit; None where there are none such."""
        if not len(self):
            raise JaxEditError("the ledger holds no edits")
        layers = own_layers(self.method) if isinstance(self.method, Method) else ()
        return from_arrays(self.record.arrays, layers) if layers else None

    @property
    def state(self) -> Any:
        """What an editor that adds parameters has added; None where that is nothing."""
        return self._settled[0]

    @property
    def model(self) -> Decoder:
        """The base with all edits; the base itself where there are none."""
        if not isinstance(self.method, Method):
            return self.base if self.state is None else attach(self.base, self.state)
        return self.result.model if len(self) else self.base

    @property
    def patch(self) -> EditPatch:
        """All edits as one patch of the base."""
        return self.result.patch

    @cached_property
    def result(self) -> EditResult:
        """`solve()`, once."""
        return self.solve()

    def solve(self, *, anchor_cache: Path | None = None, on_progress: Progress | None = None) -> EditResult:
        """Write all edits into the base at once, as `jaxedit.apply_edits` does, from the targets that are known.

        Raises JaxEditError where the ledger holds no edits.
        """
        requests = tuple(self.record.requests.values())
        if not isinstance(self.method, Method):
            if not requests:
                raise JaxEditError("the ledger holds no edits")
            pair = (self.base, self.model)
            return adapted(self.method, self.tokenizer, requests, requests, *pair, self.state, {}, Clock())
        return apply_edits(
            self.base,
            self.tokenizer,
            requests,
            self.method,
            stats=self.stats,
            targets=self.targets,
            templates=self.record.templates,
            factor=self.factor,
            anchor_cache=anchor_cache,
            on_progress=on_progress,
        )

    def _with(self, record: LedgerRecord) -> Ledger:
        """Another state, which need not make again what this one has solved with."""
        solved: EditResult | None = self.__dict__.get("result")
        if solved is None or not isinstance(self.method, Method):
            return dataclasses.replace(self, record=record)
        factor = solved.factor
        if factor is not None and any(part.protected for part in factor.parts.values()):
            factor = None  # it holds this state's keys in place
        return dataclasses.replace(self, record=record, stats=solved.stats, factor=factor)

    def _more(self, state, requests: Sequence[EditRequest], on_progress: Progress | None) -> Any:
        """A state with more edits."""
        assert not isinstance(self.method, Method)
        seed = self.record.seed or 0
        return self.method.edit(self.base, self.tokenizer, requests, state=state, seed=seed, on_progress=on_progress)[0]

    @cached_property
    def _settled(self) -> tuple[Any, Mapping[str, int], int]:
        """What is added, without edits that were withdrawn since; the edits' numbers in it; how many it was given.
        Where edits share what was added, those that remain are made again."""
        record = self.record
        if record.adapter is None:
            return None, {}, 0
        assert not isinstance(self.method, Method)
        state = from_plain(record.adapter, record.held)
        numbers = {id: record.numbers[id] for id in record.requests}
        gone = [number for id, number in record.numbers.items() if id not in numbers]
        if gone and not self.method.separable:
            state = self._more(None, tuple(record.requests.values()), None)
            return state, {id: i for i, id in enumerate(numbers)}, len(numbers)
        return state.without(gone) if gone else state, numbers, record.given  # type: ignore[attr-defined]

    def _attached(self, requests: Mapping[str, EditRequest], new: Sequence[str], on_progress) -> Ledger:
        """The ledger of `requests`, of which the `new` ones are added now."""
        state, numbers, given = self._settled
        state = self._more(state, tuple(requests[id] for id in new), on_progress)
        numbers = {**numbers, **{id: given + i for i, id in enumerate(new)}}
        record = self.record.with_adapter(requests, to_plain(state), numbers, given + len(new))
        return dataclasses.replace(self, record=record)

    def _find(self, requests, anchor_cache: Path | None, on_progress: Progress | None) -> dict[str, np.ndarray]:
        """Targets of some requests on the base, where they depend on no other edit."""
        assert isinstance(self.method, Method)
        config, templates, layers = self.base.config, self.record.templates, own_layers(self.method)
        edits = validate(self.tokenizer, requests, templates, config.max_positions)
        if not layers:
            return {}
        method = dataclasses.replace(self.method, layers=layers)
        weights = template_weights(templates, method.key_average)
        report = anchor_progress(on_progress, edits)
        return to_arrays(make_targets(self.base.params, config, edits, method, weights, report, anchor_cache))


def _check(ledger: Ledger, requests: tuple[EditRequest, ...], others: Mapping[str, EditRequest], problems=()):
    """Raise RequestError with `problems` and all else that is wrong with `requests` beside the edits `others`."""
    problems = list(problems)
    try:
        validate(ledger.tokenizer, requests, CLEAN, ledger.base.config.max_positions)
    except RequestError as error:
        problems = [*error.problems, *problems]
    by_prompt = {_words(r.prompt): id for id, r in others.items()}
    for i, request in enumerate(requests):
        id = by_prompt.get(_words(request.prompt))
        if id is None:
            continue
        there = f"edit {id} of the ledger: {request.prompt!r} -> {others[id].target!r}"
        if request.target.strip() == others[id].target.strip():
            problems.append(f"request {i} repeats {there}")
        else:
            problems.append(f"request {i} contradicts {there} and {request.target!r}; update or withdraw that edit")
    if problems:
        raise RequestError(problems)


def _words(text: str) -> str:
    """Prompts that differ in nothing but white space ask for the same."""
    return " ".join(text.split())
