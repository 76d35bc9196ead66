"""The passes of an edit: usually one, over all edits at once.

Methods that make few edits at a time (ROME) have a pass for each so many, on the model as edited so far; those that
edit in rounds (NSE) have several for the same edits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxedit.config import Method, NeuronSubset, PerLayer
from jaxedit.data.tokens import EditTokens, template_weights
from jaxedit.errors import JaxEditError
from jaxedit.export.patch import Delta, add, sum_deltas, with_matrices
from jaxedit.layer_loop import LayerLoop, Part, Progress, anchor_progress, edit_keys
from jaxedit.models.transformer import Decoder
from jaxedit.solvers.prepare import Prepared, protect_keys
from jaxedit.statistics import SecondMoments
from jaxedit.targets.anchor_room import Rooms
from jaxedit.targets.strategies import Targets, anchors_of, clean_states, join_targets, make_targets


class Clock:
    """Seconds per stage; inner stages are subtracted from the outer one."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def __call__(self, stage: str):
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent - self._inner.pop()
            self._inner[-1] += spent


class Grouping(NamedTuple):
    """What `jaxedit.groups` says of n requests: the weight of each ``[n]``, which of them are solved for together, with
    second moments of their own or None for those of the call, and the goal of each (see `EditTokens`)."""

    weights: np.ndarray
    parts: tuple[np.ndarray, ...]
    stats: tuple[SecondMoments | None, ...]
    goals: tuple[str, ...]

    @classmethod
    def of(cls, n: int) -> Grouping:
        """n ordinary edits."""
        return cls(np.ones(n), (np.arange(n),), (None,), ("say",) * n)


class Passes:
    """All passes of an edit of `base`, and what they leave behind.

    originals: ``{layer: [d_ff, d_model]}`` the matrices of `base`; deltas: what is added to them by all passes; keys:
    of these and of earlier edits. residuals, norms: per layer, the largest residual of a solve, and ‖k‖ of each pass's
    edits. remaining: ``[layers + 1, n]``, see `EditInfo`.
    """

    def __init__(
        self,
        base: Decoder,
        method: Method,
        templates,
        clock: Clock,
        anchor_cache: Path | None = None,
        report: Progress | None = None,
        past: Mapping[int, np.ndarray] | None = None,
        rooms: Rooms | None = None,
    ):
        self.base, self.method, self.clock = base, method, clock
        self.contexts = template_weights(templates, method.key_average)
        self.anchor_cache, self.on_progress = anchor_cache, report
        self.keys: dict[int, np.ndarray] = dict(past or {})
        self.rooms = Rooms() if rooms is None and method.at_once is not None else rooms
        self.originals: dict[int, np.ndarray] = {}
        self.deltas: dict[int, Delta] = {}
        self.residuals: dict[int, float] = {}
        self.norms: dict[int, list[np.ndarray]] = {}
        self.condition: dict[int, float] = {}
        self.remaining = np.zeros((0, 0))
        self.targets_given = False

    def _model(self) -> Decoder:
        """The model as edited by the passes so far."""
        if not self.deltas:
            return self.base
        return with_matrices(self.base, {l: add(self.originals[l], d) for l, d in self.deltas.items()})

    def run(
        self, edits: Sequence[EditTokens], grouping: Grouping, targets: Targets | None, prepared: Prepared, own: list
    ):
        """Make all passes. Returns the targets of all edits, and `prepared` with the keys of earlier passes protected.

        own: for each part of the grouping what it is solved with instead, or None.
        """
        method, n, self.targets_given = self.method, len(edits), targets is not None
        self.condition = {l: float(prepared[l].condition) for l in method.layers}
        self.remaining = np.full((len(method.layers) + 1, n), np.nan)
        size = method.at_once or n
        done = []
        for start in range(0, n, size):
            chosen = range(start, min(start + size, n))
            rows = np.asarray(chosen)
            if start and method.protect:
                prepared = protect_keys(prepared, self.keys)
                own = [None if mine is None else protect_keys(mine, self.keys) for mine in own]
            some = [edits[i] for i in chosen]
            given = None if targets is None else targets.take(rows)
            parts = [
                Part(np.flatnonzero(np.isin(rows, members)), prepared if mine is None else mine)
                for members, mine in zip(grouping.parts, own, strict=True)
            ]
            emphasis = None if np.all(grouping.weights == 1) else grouping.weights[rows]
            done.append(self._edit(some, rows, given, [p for p in parts if len(p.rows)], emphasis))
        return join_targets(done), prepared

    def _edit(self, edits, rows: np.ndarray, targets: Targets | None, parts: list[Part], emphasis) -> Targets:
        """One pass, or all rounds, over some edits."""
        method, config, model = self.method, self.base.config, self._model()
        report = anchor_progress(self.on_progress, edits)
        if targets is None and not isinstance(method.targets, PerLayer):
            with self.clock("targets"):
                arguments = (model.params, config, edits, method, self.contexts, report, self.anchor_cache)
                targets = make_targets(*arguments, self.rooms)
        if not isinstance(method.solver, NeuronSubset):
            return self._loop(model, edits, rows, targets, parts, emphasis, self._finder(model, edits, report))
        if targets is None:
            raise JaxEditError("NeuronSubset edits in rounds towards targets that stay; PerLayer has none")
        before = self.keys
        for number in range(method.solver.rounds):
            chosen = self._far(model, edits, rows, targets, number)
            if not len(chosen):
                break
            some = [edits[i] for i in chosen]
            here = [Part(np.flatnonzero(np.isin(chosen, p.rows)), p.prepared) for p in parts]
            weights = None if emphasis is None else emphasis[chosen]
            self._loop(model, some, rows[chosen], targets.take(chosen), here, weights, None)
            self.keys, model = before, self._model()
        made = edit_keys(model, method, edits, self.contexts)
        if emphasis is not None:
            made = {l: k * np.sqrt(emphasis)[:, None] for l, k in made.items()}
        self.keys = _appended(before, made)
        return targets

    def _far(self, model: Decoder, edits, rows: np.ndarray, targets: Targets, number: int) -> np.ndarray:
        """Edits whose residual at the last layer is within the solver's limits."""
        solver, last = self.method.solver, self.method.layers[-1]
        assert isinstance(solver, NeuronSubset)
        now = clean_states(model.params, model.config, edits, (last,), self.method.anchor.of_mlp)[0]
        size = np.linalg.norm(targets.at(last) - now, axis=-1)
        if number == 0:
            self.remaining[:, rows] = size
        upper = np.inf if solver.upper is None else solver.upper
        chosen = np.flatnonzero((size > solver.lower) & (size < upper))
        if number == 0 and not len(chosen):
            raise JaxEditError(
                f"no edit has a residual between lower={solver.lower:g} and upper={upper:g}: they are "
                f"{size.min():.3g} to {size.max():.3g}. The published limits are for one model each; choose others"
            )
        return chosen

    def _finder(self, model: Decoder, edits, report):
        """Anchors of PerLayer, found on the model as edited so far."""
        kept: dict[int, np.ndarray] = {}
        if isinstance(self.method.targets, PerLayer) and any(e.goal == "keep" for e in edits):
            layers = self.method.layers
            states = clean_states(model.params, model.config, edits, layers, self.method.anchor.of_mlp)
            kept = dict(zip(layers, states, strict=True))

        def find(params, layer: int):
            with self.clock("targets"):
                arguments = (params, self.base.config, edits, layer, self.method.anchor, kept.get(layer))
                return anchors_of(*arguments, report, self.anchor_cache, self.rooms)

        return find

    def _loop(self, model: Decoder, edits, rows: np.ndarray, targets: Targets | None, parts, emphasis, find) -> Targets:
        with self.clock("layers"):
            loop = LayerLoop(model, self.method, edits, self.contexts, parts, find, self.clock, emphasis)
            targets = loop.run(targets, self.on_progress)
        aim = targets.at(self.method.layers[-1])
        remaining = np.stack([np.linalg.norm(aim - h, axis=-1) for h in loop.last_states])
        fresh = np.isnan(self.remaining[0, rows])
        self.remaining[0, rows] = np.where(fresh, remaining[0], self.remaining[0, rows])
        self.remaining[1:, rows] = remaining[1:]
        for l in self.method.layers:
            self.originals.setdefault(l, loop.originals[l])
            before = self.deltas.get(l)
            mine = loop.deltas[l]
            self.deltas[l] = mine if before is None else sum_deltas((before, mine), mine.left.dtype)
            self.residuals[l] = max(self.residuals.get(l, 0.0), loop.solutions[l].residual)
            self.norms.setdefault(l, []).append(np.linalg.norm(loop.keys[l], axis=1))
        self.keys = _appended(self.keys, loop.keys)
        return targets


def _appended(past: Mapping[int, np.ndarray], keys: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    return dict(past) | {l: np.concatenate([past[l], k]) if l in past else k for l, k in keys.items()}
