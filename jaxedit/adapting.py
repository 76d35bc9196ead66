"""`apply_edits` for what does not solve for weights: editors that add parameters, and fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxedit.adapters.attached import adapters_of, attach, detach
from jaxedit.adapters.editors import Editor, describe_editor, state_of
from jaxedit.adapters.rep import Rep, rep_for
from jaxedit.chances import probabilities
from jaxedit.data.queries import RobustQueries, robust_queries
from jaxedit.data.tokens import CLEAN, validate
from jaxedit.errors import JaxEditError
from jaxedit.export.patch import adapter_patch, make_patch, with_matrices
from jaxedit.info import EditInfo
from jaxedit.layer_loop import Progress
from jaxedit.models.sites import refuse_adapters
from jaxedit.models.transformer import Decoder
from jaxedit.passes import Clock
from jaxedit.plain import plain_fields
from jaxedit.result import EditResult
from jaxedit.tuning.named import Tuner
from jaxedit.types import EditRequest


def edit_with(
    editor: Editor,
    model: Decoder | EditResult,
    tokenizer,
    requests: Sequence[EditRequest],
    *,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> EditResult:
    """Make the requests by what `editor` adds to the model, beside all that it has already.

    Adapters of other kinds stay, but what is added is made for the model without them. An EditResult of the same
    editor is gone on with: the result's patch then holds its edits too.
    """
    clock, previous = Clock(), model if isinstance(model, EditResult) else None
    now = host_of(model)
    host, others = detach(now), adapters_of(now)
    state: Any = None
    earlier: tuple[EditRequest, ...] = ()
    kind = state_of(editor)
    if mine := [a for a in others if isinstance(a, kind)]:
        if previous is None or not any(isinstance(a, kind) for a in previous.patch.adapters):
            raise JaxEditError(
                f"this model has a {kind.__name__} already; pass the EditResult that it came from, to go on with that"
            )
        (state,), earlier = mine, previous.patch.requests
    with clock("edit"):
        made: Any
        made, trace = editor.edit(host, tokenizer, requests, state=state, seed=seed, on_progress=on_progress)
    edited = attach(host, *(a for a in others if not isinstance(a, kind)), made)
    result = adapted(editor, tokenizer, (*earlier, *requests), requests, now, edited, made, trace, clock)
    if previous is None:
        return result
    kept = {name: getattr(previous, name) for name in ("targets", "keys", "stats", "factor")}
    return dataclasses.replace(result, **kept)


def adapted(
    editor: Editor, tokenizer, every, asked, before: Decoder, after: Decoder, state, trace, clock
) -> EditResult:
    """The result of an editor whose `state` is attached in `after`.

    every: the requests that it holds; asked: those that the report is about.
    """
    with clock("patch"):
        patch = adapter_patch(describe_editor(editor), every, detach(after), state)
    with clock("probabilities"):
        edits = validate(tokenizer, asked, CLEAN, after.config.max_positions)
        chances = [probabilities(m.params, m.config, edits) for m in (before, after)]
    info = _info(editor, chances, clock, trace)
    return EditResult(after, patch, info, None, {}, None)


def add_rep(
    result: EditResult,
    tokenizer,
    queries: Sequence[RobustQueries] | None = None,
    rep: Rep | None = None,
    *,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> EditResult:
    """REP's adaptors for the edits that a result has written into weights; its patch then holds both.

    queries: of each request, of which those in domain are trained on; None for what rules and the packaged corpus make,
        with texts of 512 tokens before the prompt, or of half the model's context where that is less.
    rep: settings; None for the model's preset. on_progress is told of "adaptors".
    Raises JaxEditError where the result is not of a method that solves for weights with second moments, or its model
    has adapters already; RequestError where a request or a text does not fit the model.
    """
    method, requests, edited = result.info.solved, result.patch.requests, result.model
    refuse_adapters(edited, "add REP's adaptors")
    if result.stats is None:
        raise JaxEditError("REP needs the second moments that the edits were solved with, and the result has none")
    clock = Clock()
    rep = rep_for(edited.config) if rep is None else rep
    with clock("rep"):
        if queries is None:
            length = min(512, edited.config.max_positions // 2)
            queries = robust_queries(tokenizer, requests, context_tokens=length, seed=seed)
        keys = {l: np.asarray(result.keys[l])[-len(requests) :] for l in method.layers}
        state: Any
        state, trace = rep.edit(
            *(edited, tokenizer, requests),
            layers=method.layers,
            stats=result.stats,
            queries=queries,
            keys=keys,
            seed=seed,
            on_progress=on_progress,
        )
    adapted_model = attach(edited, state)
    with clock("probabilities"):
        edits = validate(tokenizer, requests, CLEAN, edited.config.max_positions)
        after = probabilities(adapted_model.params, edited.config, edits)
    seconds = {**result.info.seconds, **clock.seconds}
    info = dataclasses.replace(result.info, trace=trace, probability_after=after, seconds=seconds)
    patch = dataclasses.replace(result.patch, adapters=(state,))
    return dataclasses.replace(result, model=adapted_model, patch=patch, info=info)


def tune(
    tuner: Tuner,
    model: Decoder | EditResult,
    tokenizer,
    requests: Sequence[EditRequest],
    *,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> EditResult:
    """Make the requests by descending on them. Earlier edits are not protected."""
    clock, base = Clock(), host_of(model)
    refuse_adapters(base, "fine-tune it")
    with clock("edit"):
        deltas, trace = tuner.edit(base, tokenizer, requests, seed=seed, on_progress=on_progress)
    with clock("patch"):
        down = base.params["blocks"]["down"]["w"]
        originals = {l: np.asarray(down[l]) for l in deltas}
        patch, matrices = make_patch({"name": tuner.name, **plain_fields(tuner)}, requests, originals, deltas)
        edited = with_matrices(base, matrices)
    with clock("probabilities"):
        edits = validate(tokenizer, requests, CLEAN, base.config.max_positions)
        chances = [probabilities(m.params, m.config, edits) for m in (base, edited)]
    return EditResult(edited, patch, _info(tuner, chances, clock, trace), None, {}, None)


def _info(method: Editor | Tuner, chances: list[np.ndarray], clock: Clock, trace: dict[str, np.ndarray]) -> EditInfo:
    return EditInfo(
        method=method,
        templates=CLEAN,
        layers=(),
        remaining=np.zeros((0, len(chances[0]))),
        targets_given=False,
        updates=None,
        final_loss=None,
        init_norm=None,
        delta_norm=None,
        probability_before=chances[0],
        probability_after=chances[1],
        seconds=dict(clock.seconds),
        trace=trace,
    )


def host_of(model: Decoder | EditResult) -> Decoder:
    """The model itself. Raises JaxEditError where it is neither."""
    found = model.model if isinstance(model, EditResult) else model
    if not isinstance(found, Decoder):
        raise JaxEditError(f"model must be a Decoder (from jaxedit.load) or an EditResult, got {type(found).__name__}")
    return found
