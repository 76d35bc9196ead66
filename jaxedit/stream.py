"""Streams of edits: batch after batch, with the keys of earlier ones protected, and a guard against collapse.

A batch costs what it would alone: earlier keys are absorbed into the factor (or kept as rows, see
`jaxedit.solvers.nullspace`), and no d_ff × d_ff matrix is kept for them beside it.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxedit.config import Method
from jaxedit.edit import EditResult, edit_grouped
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.perplexity import PerplexityProbe
from jaxedit.export.patch import Delta, EditPatch, make_patch, sum_deltas, with_matrices
from jaxedit.models.transformer import Decoder
from jaxedit.passes import Grouping
from jaxedit.plain import describe
from jaxedit.statistics import SecondMoments
from jaxedit.targets.anchor_room import Rooms
from jaxedit.types import EditRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollapseGuard:
    """What is watched while edits accumulate.

    texts: held-out texts, any corpus that `jaxedit.data.corpus.read_corpus` takes; by default the packaged one.
    max_tokens: of them, measured after every `every`-th batch. max_ratio: of the edited model's perplexity to the
    base's. max_update: of ‖ΔW‖ to ‖W‖ in any layer, of all batches together. stop: end the stream before the batch
    that crosses a limit, instead of only warning.
    """

    texts: Sequence[str] | str | Path | None = None
    max_tokens: int = 4096
    every: int = 1
    max_ratio: float = 1.25
    max_update: float = 0.5
    stop: bool = False

    def __post_init__(self):
        if self.max_tokens < 2 or self.every < 1:
            raise JaxEditError("CollapseGuard.max_tokens must be at least 2 and every at least 1")
        if not self.max_ratio > 1 or not self.max_update > 0:
            raise JaxEditError("CollapseGuard.max_ratio must be above 1 and max_update positive")


@dataclasses.dataclass(frozen=True)
class StreamStep:
    """After one batch.

    edits: made so far. seconds: of this batch, without measuring. updates: per layer ‖ΔW‖ / ‖W‖ of all batches
    together. perplexity: of the edited model, None where it was not measured; ratio: to the base's. warning: what
    limit was crossed, or None.
    """

    edits: int
    seconds: float
    updates: dict[int, float]
    perplexity: float | None
    ratio: float | None
    warning: str | None


@dataclasses.dataclass(frozen=True)
class StreamResult:
    """last: the result of the last batch, from which a further stream continues. patch: all batches as one patch of
    the model that the stream began with, and `model` what it makes of that. stopped: whether the guard ended the
    stream; the last step is then of the batch that was left out."""

    last: EditResult
    model: Decoder
    patch: EditPatch
    steps: tuple[StreamStep, ...]
    stopped: bool


def edit_stream(
    model: Decoder | EditResult,
    tokenizer,
    batches: Iterable[Sequence[EditRequest]],
    method: str | Method = "fe",
    layers: Sequence[int] | None = None,
    stats: SecondMoments | None = None,
    templates=None,
    *,
    guard: CollapseGuard | None = None,
    seed: int = 0,
    on_step: Callable[[StreamStep, EditResult], None] | None = None,
    **options,
) -> StreamResult:
    """Make the edits of each batch on the model that the batches before it left, with their keys protected.

    batches: may be a generator; the next batch is asked for when the last one is written. guard: None watches nothing
        and costs nothing. on_step: told after each batch. options: further ones of `apply_edits`.

    Anchors are found on the model as edited so far, as in published sequential editing. Warns where the guard's limits
    are crossed. Raises what `apply_edits` raises; the batches before are then in what `on_step` was given.
    """
    base = model.model if isinstance(model, EditResult) else model
    probe, start = None, float("nan")
    if guard is not None:
        length = min(512, base.config.max_positions)
        probe = PerplexityProbe.of(tokenizer, guard.texts, max_tokens=guard.max_tokens, length=length)
        start = probe(base)
    now: Decoder | EditResult = model
    rooms = Rooms()
    last, stopped = None, False
    deltas: dict[int, Delta] = {}
    originals: dict[int, np.ndarray] = {}
    norms: dict[int, float] = {}
    requests: list[EditRequest] = []
    steps: list[StreamStep] = []
    for number, batch in enumerate(batches):
        begun = time.perf_counter()
        batch = tuple(batch)
        arguments = (now, tokenizer, batch, method, Grouping.of(len(batch)), layers, stats, None, templates)
        result = edit_grouped(*arguments, seed=seed, rooms=rooms, **options)
        spent = time.perf_counter() - begun
        total = {
            l: sum_deltas((deltas[l], d), d.left.dtype) if l in deltas else d for l, d in result.patch.deltas.items()
        }
        if not originals:
            originals = {l: np.asarray(base.params["blocks"]["down"]["w"][l]) for l in total}
            norms = {l: float(np.linalg.norm(w.astype(np.float64))) for l, w in originals.items()}
        sizes = {l: d.norm() / norms[l] for l, d in total.items()}
        measured = (
            probe(result.model) if probe is not None and guard is not None and number % guard.every == 0 else None
        )
        warning = None if guard is None else _crossed(guard, sizes, measured, start)
        ratio = None if measured is None else measured / start
        steps.append(StreamStep(len(requests) + len(batch), spent, sizes, measured, ratio, warning))
        if warning is not None:
            warnings.warn(f"batch {number}, after {len(requests) + len(batch)} edits: {warning}", stacklevel=2)
            if guard is not None and guard.stop:
                stopped = True
                break
        now = last = result
        deltas, stats = total, result.stats
        requests += batch
        if on_step is not None:
            on_step(steps[-1], result)
    if last is None:
        reason = (
            f"the first batch crossed a limit of the guard: {steps[0].warning}" if steps else "there are no batches"
        )
        raise JaxEditError(f"nothing was edited: {reason}")
    patch, matrices = make_patch(describe(last.info.solved), requests, originals, deltas)
    return StreamResult(last, with_matrices(base, matrices), patch, tuple(steps), stopped)


def _crossed(guard: CollapseGuard, sizes: dict[int, float], measured: float | None, start: float) -> str | None:
    found = []
    if measured is not None and not measured <= guard.max_ratio * start:
        found.append(f"perplexity on held-out text went from {start:.4g} to {measured:.4g}")
    layer = max(sizes, key=lambda l: sizes[l])
    if not sizes[layer] <= guard.max_update:
        found.append(f"the updates of layer {layer} have {sizes[layer]:.2f} times the norm of its matrix")
    return "; ".join(found) or None
