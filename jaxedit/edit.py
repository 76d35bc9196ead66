"""`apply_edits`: the pipeline every locate-then-edit method is a filling of.

keys → anchor → targets → residuals → solve → regularise → ΔW, layer by layer from the bottom
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxedit.adapters.editors import Editor, editor_of
from jaxedit.adapting import add_rep, edit_with, host_of, tune
from jaxedit.chances import probabilities
from jaxedit.config import BackwardSpread, Method, PerLayer
from jaxedit.data.templates import sample_templates
from jaxedit.data.tokens import CLEAN, check_templates, template_weights, validate
from jaxedit.errors import JaxEditError
from jaxedit.export.patch import make_patch, with_matrices
from jaxedit.info import make_info
from jaxedit.layer_loop import Progress, anchor_progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.sites import refuse_adapters
from jaxedit.models.transformer import Decoder
from jaxedit.passes import Clock, Grouping, Passes
from jaxedit.plain import describe
from jaxedit.presets import REP, resolve
from jaxedit.result import EditResult
from jaxedit.sharding import mesh_of
from jaxedit.solvers.prepare import Prepared, prepare, protect_keys
from jaxedit.statistics import SecondMoments, second_moments
from jaxedit.targets.anchor_room import Rooms
from jaxedit.targets.strategies import Targets, make_targets
from jaxedit.tuning.named import Tuner, tuner_of
from jaxedit.types import EditRequest


def apply_edits(
    model: Decoder | EditResult,
    tokenizer,
    requests: Sequence[EditRequest],
    method: str | Method | Editor | Tuner = "fe",
    layers: Sequence[int] | None = None,
    stats: SecondMoments | None = None,
    targets: Targets | None = None,
    templates=None,
    *,
    factor: Prepared | None = None,
    anchor_cache: Path | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> EditResult:
    """Make all `requests` at once.

    model: stays as it is. An EditResult continues from its model with the keys of its edits protected (the
        published ``cache_c``), or, of an editor that adds parameters, from what it has added.
    method: a name (of METHODS, EDITORS or TUNERS; see `jaxedit.presets`) or settings: a `Method`, which is solved for
        the weights of some layers; an editor that adds parameters, such as `IReVa`; or a `FineTune` or `LoraEditor`.
        To the latter two stats, targets, templates, factor and anchor_cache mean nothing. layers: instead of the
        method's. A name of METHODS with "+rep", as in "rome+rep", adds REP's adaptors to that: see `jaxedit.add_rep`.
    stats: second moments of the keys at those layers, by default computed from the packaged corpus and cached.
    targets: made earlier by `targets` or elsewhere; by default found here. With PerLayer they may cover only some
        layers, and the others are found on the model as edited so far. templates: context templates, "{}"
        first; by default sampled from the model with `seed`.
    factor: of the second moments, from `jaxedit.solvers.prepare.prepare` (or `jaxedit.factorise`), to save preparing
        the solver again. A continued EditResult's own is preferred, as earlier keys are absorbed into that.
    anchor_cache: a folder in which finished anchors are kept, part by part, and from which a call with the same
        model, edits and settings takes them, so that one that was killed goes on where it was.
    on_progress: told (stage, done, total).

    With several processes (see `jaxedit.distributed`) all must make the same call; each finds its share of the
    anchors, and all return the same result.

    Raises RequestError naming every request that cannot be carried out, JaxEditError (StatisticsError) where
    method, layers, statistics or targets do not fit the model. Nothing is changed in that case.
    """
    requests = tuple(requests)
    if isinstance(method, str) and method.endswith(REP):
        given = (model, tokenizer, requests, method.removesuffix(REP), layers, stats, targets, templates)
        how: dict[str, Any] = {"seed": seed, "on_progress": on_progress}
        return add_rep(apply_edits(*given, factor=factor, anchor_cache=anchor_cache, **how), tokenizer, **how)
    config = host_of(model).config
    editor, tuner = editor_of(method, config, layers), tuner_of(method, config, layers)
    if editor is not None or tuner is not None:
        unused = {"stats": stats, "targets": targets, "templates": templates, "factor": factor}
        if given := [name for name, value in unused.items() if value is not None]:
            name = (editor or tuner).name  # type: ignore[union-attr]
            raise JaxEditError(f"{name!r} solves for no weights; leave out {', '.join(given)}")
    if editor is not None:
        return edit_with(editor, model, tokenizer, requests, seed=seed, on_progress=on_progress)
    if tuner is not None:
        return tune(tuner, model, tokenizer, requests, seed=seed, on_progress=on_progress)
    if not isinstance(method, str | Method):
        raise JaxEditError(
            f"method must be a name or a Method, an editor or a fine-tuning, got {type(method).__name__}"
        )
    return edit_grouped(
        *(model, tokenizer, requests, method, Grouping.of(len(requests)), layers, stats, targets, templates),
        factor=factor,
        anchor_cache=anchor_cache,
        seed=seed,
        on_progress=on_progress,
    )


def edit_grouped(
    model: Decoder | EditResult,
    tokenizer,
    requests: tuple[EditRequest, ...],
    method: str | Method,
    grouping: Grouping,
    layers: Sequence[int] | None = None,
    stats: SecondMoments | None = None,
    targets: Targets | None = None,
    templates=None,
    *,
    factor: Prepared | None = None,
    anchor_cache: Path | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
    rooms: Rooms | None = None,
) -> EditResult:
    """`apply_edits` for requests in groups, and for batches of a stream, which hand on `rooms`."""
    previous = model if isinstance(model, EditResult) else None
    base = host_of(model)
    refuse_adapters(base, "solve for its weights")
    clock = Clock()
    config = base.config
    method = resolve(method, config, layers)
    with clock("tokens"):
        validate(tokenizer, requests, CLEAN, config.max_positions)
        if templates is None:
            templates = previous.info.templates if previous is not None else sample_templates(base, tokenizer, seed)
        templates = check_templates(templates)
        edits = validate(tokenizer, requests, templates, config.max_positions)
        edits = [dataclasses.replace(e, goal=goal) for e, goal in zip(edits, grouping.goals, strict=True)]
    _check_targets(targets, method, len(edits), config)
    if method.at_once is not None and (len(grouping.parts) > 1 or set(grouping.goals) != {"say"}):
        raise JaxEditError(f"{method.name!r} makes {method.at_once} edit(s) at a time, and groups are solved together")
    with clock("statistics"):
        stats = _statistics(stats, previous, base, tokenizer, method, on_progress)
    with clock("factor"):
        prepared = _prepared(factor, previous, base, stats, method)
        past = dict(previous.keys) if previous is not None else {}
        own = [
            None if s is None else _prepared(None, None, base, _checked(s, base, method), method)
            for s in grouping.stats
        ]
    work = Passes(base, method, templates, clock, anchor_cache, on_progress, past, rooms)
    targets, prepared = work.run(edits, grouping, targets, prepared, own)
    with clock("patch"):
        patch, matrices = make_patch(describe(method), requests, work.originals, work.deltas)
        edited = with_matrices(base, matrices)
    with clock("probabilities"):
        chances = [probabilities(m.params, config, edits) for m in (base, edited)]
    info = make_info(method, templates, targets, work, matrices, chances, clock.seconds)
    return EditResult(edited, patch, info, targets, work.keys, stats, prepared)


def find_targets(
    model: Decoder,
    tokenizer,
    requests: Sequence[EditRequest],
    method: str | Method = "fe",
    layers: Sequence[int] | None = None,
    templates=None,
    *,
    anchor_cache: Path | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Targets:
    """Anchors and per-layer targets on the model as it is, without editing: see `apply_edits` and `Targets`.

    The targets of one edit, ``found.take([i])``, are what it would get alone.

    With PerLayer (BLUE) each layer's anchor is found on the unedited model here, while `apply_edits` finds the
    later ones on the model as edited so far.
    """
    refuse_adapters(model, "find targets on it")
    method = resolve(method, model.config, layers)
    templates = check_templates(sample_templates(model, tokenizer, seed) if templates is None else templates)
    edits = validate(tokenizer, tuple(requests), templates, model.config.max_positions)
    contexts = template_weights(templates, method.key_average)
    report = anchor_progress(on_progress, edits)
    return make_targets(model.params, model.config, edits, method, contexts, report, anchor_cache)


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
    if stats is None and previous is not None and previous.stats and set(method.layers) <= set(previous.stats.layers):
        stats = previous.stats
    if stats is None:
        report = None if on_progress is None else partial(on_progress, "statistics")
        stats = second_moments(base, tokenizer, None, method.layers, on_progress=report)
    return _checked(stats, base, method)


def _checked(stats: SecondMoments, base: Decoder, method: Method) -> SecondMoments:
    stats.check(base)
    for l in method.layers:
        stats[l]
    return stats


def _prepared(given: Prepared | None, previous, base: Decoder, stats: SecondMoments, method: Method) -> Prepared:
    """What to solve with, which protects all keys of earlier edits."""
    if given is not None and not _fits(given, method):
        raise JaxEditError("factor was made for another solver or other layers")
    if given is not None and any(part.protected for part in given.parts.values()):
        raise JaxEditError("factor has keys absorbed; pass it as factorise made it (earlier edits' are absorbed here)")
    keys = previous.keys if previous is not None and method.protect else {}
    carried = None if previous is None or previous.stats is not stats else previous.factor
    if carried is not None and _fits(carried, method) and (method.protect or not _protects(carried)):
        if any(carried[l].protected > len(keys.get(l, ())) for l in carried.layers):
            raise JaxEditError("the EditResult's factor protects more keys than it has; set its factor to None")
        return protect_keys(carried, keys)
    return protect_keys(given or prepare(method.solver, stats, method.layers, mesh=mesh_of(base.params)), keys)


def _fits(prepared: Prepared, method: Method) -> bool:
    return prepared.solver == method.solver and set(method.layers) <= set(prepared.layers)


def _protects(prepared: Prepared) -> bool:
    return any(part.protected for part in prepared.parts.values())
