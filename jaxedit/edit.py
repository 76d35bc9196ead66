"""`apply_edits`: the pipeline every locate-then-edit method is a filling of.

keys → anchor → targets → residuals → solve → ΔW, layer by layer from the bottom
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.config import BackwardSpread, Method, PerLayer
from jaxedit.data.templates import sample_templates
from jaxedit.data.tokens import CLEAN, EditTokens, check_templates, chunks, pack, template_weights, validate
from jaxedit.errors import JaxEditError
from jaxedit.export.patch import Delta, EditPatch, make_patch, with_matrices
from jaxedit.info import EditInfo, LayerInfo
from jaxedit.layer_loop import LayerLoop, Progress, anchor_progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import (
    Context,
    Decoder,
    Params,
    embed,
    run,
    unembed,
)
from jaxedit.presets import resolve
from jaxedit.sharding import mesh_of
from jaxedit.solvers.ridge import Factor, factorise, protect
from jaxedit.statistics import SecondMoments, second_moments
from jaxedit.targets.strategies import Targets, make_targets
from jaxedit.types import EditRequest


@dataclasses.dataclass(frozen=True)
class EditResult:
    """The edited model, the edits as a patch, and what happened.

    keys: per layer ``[n, d_ff]``, this edit's and all earlier ones': what a further `apply_edits` on this result
    protects. factor: what was solved with, which protects the earlier ones' already; a further `apply_edits` with the
    same solver and statistics absorbs the rest into it. To protect other keys, replace `keys` and set factor to None;
    that also frees its memory.
    """

    model: Decoder
    patch: EditPatch
    info: EditInfo
    targets: Targets
    keys: dict[int, np.ndarray]
    stats: SecondMoments
    factor: Factor | None = None


def apply_edits(
    model: Decoder | EditResult,
    tokenizer,
    requests: Sequence[EditRequest],
    method: str | Method = "fe",
    layers: Sequence[int] | None = None,
    stats: SecondMoments | None = None,
    targets: Targets | None = None,
    templates=None,
    *,
    factor: Factor | None = None,
    anchor_cache: Path | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> EditResult:
    """Write all `requests` into the model at once.

    model: stays as it is. An EditResult continues from its model with the keys of its edits protected (the
        published ``cache_c``).
    method: a name (see `jaxedit.presets`) or a `Method`; layers: instead of the method's.
    stats: second moments of the keys at those layers, by default computed from the packaged corpus and cached.
    targets: made earlier by `targets` or elsewhere; by default found here. With PerLayer they may cover only some
        layers, and the others are found on the model as edited so far. templates: context templates, "{}"
        first; by default sampled from the model with `seed`.
    factor: of the second moments, from `jaxedit.solvers.ridge.factorise`, to save factoring again. A continued
        EditResult's own is preferred, as earlier keys are absorbed into that.
    anchor_cache: a folder in which finished anchors are kept, part by part, and from which a call with the same
        model, edits and settings takes them, so that one that was killed goes on where it was.
    on_progress: told (stage, done, total).

    With several processes (see `jaxedit.distributed`) all must make the same call; each finds its share of the
    anchors, and all return the same result.

    Raises RequestError naming every request that cannot be carried out, JaxEditError (StatisticsError) where
    method, layers, statistics or targets do not fit the model. Nothing is changed in that case.
    """
    previous = model if isinstance(model, EditResult) else None
    base = previous.model if previous is not None else model
    if not isinstance(base, Decoder):
        raise JaxEditError(f"model must be a Decoder (from jaxedit.load) or an EditResult, got {type(base).__name__}")
    clock = _Clock()
    config, requests = base.config, tuple(requests)
    method = resolve(method, config, layers)
    with clock("tokens"):
        validate(tokenizer, requests, CLEAN, config.max_positions)
        if templates is None:
            templates = previous.info.templates if previous is not None else sample_templates(base, tokenizer, seed)
        templates = check_templates(templates)
        edits = validate(tokenizer, requests, templates, config.max_positions)
        weights = template_weights(templates)
    _check_targets(targets, method, len(edits), config)
    with clock("statistics"):
        stats = _statistics(stats, previous, base, tokenizer, method, on_progress)
    with clock("factor"):
        factor = _factor(factor, previous, base, stats, method)
    given = targets is not None
    if targets is None and not isinstance(method.targets, PerLayer):
        with clock("targets"):
            report = anchor_progress(on_progress, edits)
            targets = make_targets(base.params, config, edits, method, weights, report, anchor_cache)
    with clock("layers"):
        past = previous.keys if previous else {}
        loop = LayerLoop(base, config, method, edits, weights, factor, past, clock, anchor_cache)
        targets = loop.run(targets, on_progress)
    with clock("patch"):
        patch, matrices = make_patch(describe(method), requests, loop.originals, loop.deltas)
        edited = with_matrices(base, matrices)
    with clock("probabilities"):
        chances = [probabilities(m.params, config, edits) for m in (base, edited)]
    info = _info(method, templates, targets, loop, matrices, chances, clock.seconds, given)
    return EditResult(edited, patch, info, targets, loop.all_keys, stats, factor)


def find_targets(
    model: Decoder,
    tokenizer,
    requests: Sequence[EditRequest],
    method: str | Method = "fe",
    layers: Sequence[int] | None = None,
    templates=None,
    *,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Targets:
    """Anchors and per-layer targets on the model as it is, without editing: see `apply_edits` and `Targets`.

    With PerLayer (BLUE) each layer's anchor is found on the unedited model here, while `apply_edits` finds the
    later ones on the model as edited so far.
    """
    method = resolve(method, model.config, layers)
    templates = check_templates(sample_templates(model, tokenizer, seed) if templates is None else templates)
    edits = validate(tokenizer, tuple(requests), templates, model.config.max_positions)
    weights = template_weights(templates)
    return make_targets(model.params, model.config, edits, method, weights, anchor_progress(on_progress, edits))


def describe(method: Method) -> dict[str, Any]:
    """The method as plain data, for patches and reports."""
    plain = dataclasses.asdict(method)
    plain["targets"] = {"kind": type(method.targets).__name__, **plain["targets"]}
    plain["solver"] = {"kind": type(method.solver).__name__, **plain["solver"]}
    plain["layers"] = list(method.layers)
    return plain


def _check_targets(targets: Targets | None, method: Method, n: int, config: ModelConfig):
    if targets is None:
        return
    match method.targets:
        case BackwardSpread():
            needed = method.layers[-1:]
        case PerLayer():  # finds the others itself
            needed = tuple(l for l in method.layers if l in targets.layers)
        case _:
            needed = method.layers
    for l in needed:
        shape = np.shape(targets.at(l))
        if shape != (n, config.d_model):
            raise JaxEditError(f"targets of layer {l} have shape {shape}, expected {(n, config.d_model)}")
        if not np.isfinite(targets.at(l)).all():
            raise JaxEditError(f"targets of layer {l} hold NaN or infinity")
    if method.keys == "replayed" and targets.keys is None:
        raise JaxEditError("keys='replayed' needs targets made with it: these hold no keys")


def _statistics(stats, previous, base, tokenizer, method, on_progress) -> SecondMoments:
    if stats is None and previous is not None and set(method.layers) <= set(previous.stats.layers):
        stats = previous.stats
    if stats is None:
        report = None if on_progress is None else partial(on_progress, "statistics")
        stats = second_moments(base, tokenizer, None, method.layers, on_progress=report)
    stats.check(base)
    for l in method.layers:
        stats[l]
    return stats


def _factor(given: Factor | None, previous, base: Decoder, stats: SecondMoments, method: Method) -> Factor:
    """The factor to solve with, which protects all keys of earlier edits."""
    if given is not None and not _fits(given, method):
        raise JaxEditError("factor was made for another solver or other layers")
    if given is not None and any(part.protected for part in given.parts.values()):
        raise JaxEditError("factor has keys absorbed; pass it as factorise made it (earlier edits' are absorbed here)")
    keys = {} if previous is None else previous.keys
    carried = None if previous is None or previous.stats is not stats else previous.factor
    if carried is not None and _fits(carried, method):
        if any(carried[l].protected > len(keys.get(l, ())) for l in carried.layers):
            raise JaxEditError("the EditResult's factor protects more keys than it has; set its factor to None")
        return protect(carried, keys)
    return protect(given or factorise(method.solver, stats, method.layers, mesh=mesh_of(base.params)), keys)


def _fits(factor: Factor, method: Method) -> bool:
    return factor.solver == method.solver and set(method.layers) <= set(factor.layers)


class _Clock:
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


def probabilities(params: Params, config: ModelConfig, edits: Sequence[EditTokens]) -> np.ndarray:
    """Probability ``[n]`` of each whole target after its clean prompt (float32 log-probabilities)."""
    packed = pack([e.contexts[:1] for e in edits])
    n, width = len(edits), max(len(e.target) for e in edits)
    at, answers, weights = np.zeros((n, width), np.int32), np.zeros((n, width), np.int32), np.zeros((n, width))
    for i, e in enumerate(edits):
        t = len(e.target)
        at[i, :t] = len(e.contexts[0].tokens) - t + np.arange(t)
        answers[i, :t], weights[i, :t] = e.target, 1
    columns = (*packed.as_tuple()[:3], at, answers, weights)
    parts = [_chances(params, config, *part) for part in chunks(columns, packed.tokens.shape[1])]
    return np.concatenate([np.asarray(p) for p in parts])[:n]


@partial(jax.jit, static_argnames=("config",))
def _chances(params, config: ModelConfig, tokens, positions, segments, at, answers, weights):
    context = Context(positions, segments)
    h = run(params, config, embed(params, config, tokens, context), context, 0, config.n_layer)
    log_probs = jax.nn.log_softmax(unembed(params, config, jnp.take_along_axis(h, at[..., None], 1)), -1)
    chosen = jnp.take_along_axis(log_probs, answers[..., None], 2)[..., 0]
    return jnp.exp(jnp.sum(chosen * weights.astype(chosen.dtype), -1))


def _info(method, templates, targets: Targets, loop: LayerLoop, matrices, chances, seconds, given: bool) -> EditInfo:
    last = targets.at(method.layers[-1])
    remaining = np.stack([np.linalg.norm(last - h, axis=-1) for h in loop.last_states])
    rows = []
    for i, l in enumerate(method.layers):
        delta = Delta(loop.solutions[l].left, loop.solutions[l].right).dense()
        original = loop.originals[l].astype(np.float64)
        size = float(np.linalg.norm(delta))
        rounding = float(np.linalg.norm(matrices[l].astype(np.float64) - original - delta))
        start = np.where(remaining[0] == 0, 1, remaining[0])
        rows.append(
            LayerInfo(
                layer=l,
                residual_before=float((remaining[i] / start).mean()),
                residual_after=float((remaining[i + 1] / start).mean()),
                key_norm=loop.key_norms[l],
                update_norm=size,
                relative_update_norm=size / float(np.linalg.norm(original)),
                solve_residual=loop.solutions[l].residual,
                condition=float(loop.factor.condition[loop.factor.layers.index(l)]),
                rounding_loss=rounding / size if size else 0.0,
            )
        )
    first_anchor = next(iter(targets.anchors.values()), None)
    return EditInfo(
        method=method,
        templates=templates,
        layers=tuple(rows),
        remaining=remaining,
        targets_given=given,
        updates=None if first_anchor is None else first_anchor.updates,
        final_loss=None if first_anchor is None else first_anchor.final_loss,
        init_norm=None if first_anchor is None else np.linalg.norm(first_anchor.init, axis=-1),
        delta_norm=None if first_anchor is None else np.linalg.norm(first_anchor.value - first_anchor.init, axis=-1),
        probability_before=chances[0],
        probability_after=chances[1],
        seconds=dict(seconds),
    )
