"""`evaluate`: did the edit take, does it generalise, and what else did it change.

Each prompt runs once for both of its targets: what follows the prompt attends to its cached keys and values,
a target of one token needs no second pass at all, and logits are made at the positions of target tokens only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxedit.data.tokens import Memo, spaced, target_ids
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.batching import MIN_LENGTH, batches, bucket, pad
from jaxedit.evaluation.generation import continue_rows
from jaxedit.evaluation.report import Kind, PromptRecord, Report, RequestRecord, Score
from jaxedit.evaluation.scoring import score
from jaxedit.evaluation.specificity import check_models, divergence
from jaxedit.models.transformer import Decoder
from jaxedit.sharding import data_shards, mesh_of, place_rows
from jaxedit.types import EditRequest

Ids = tuple[int, ...]


def evaluate(
    base: Decoder,
    edited: Decoder,
    tokenizer,
    requests: Sequence[EditRequest],
    *,
    generate: bool = False,
    batch_tokens: int = 8192,
    max_neighbours: int | None = None,
) -> Report:
    """Measure both models on every prompt of every request. Definitions as in MEMIT's evaluation:

    success: the share of prompts where the wanted target is likelier than the other one, by negative
        log-likelihood averaged over its tokens. Wanted is the new target at the rewrite prompt (efficacy) and
        at paraphrases, the true one at neighbourhood prompts (`neighbourhood_answers` where given).
    magnitude: ``exp(-nll wanted) - exp(-nll other)``. Both need the true target to be known.
    accuracy: every token of the wanted target is the likeliest one, the earlier ones given (teacher forcing).
    score: the harmonic mean of the three successes.
    generation_accuracy (`generate`): greedy generation gives the new target, token by token.
    specificity: see `jaxedit.evaluation.specificity`, over all neighbourhood prompts.

    batch_tokens: tokens, padding included, in one pass of a device. A mesh that the models were loaded on splits the
    prompts over its "data" axis. max_neighbours: use the first so many neighbourhood
    prompts of each request. Log-likelihoods are float32 (float64 for a float64 model).

    Raises JaxEditError where the models differ in architecture or there are no requests, and RequestError
    naming every prompt that does not fit the model's context with its target.
    """
    check_models(base, edited, tokenizer)
    if not requests:
        raise JaxEditError("there are no requests to evaluate")
    wanted = [w for i, r in enumerate(requests) for w in _prompts(i, r, max_neighbours)]
    items = _tokenise(tokenizer, requests, wanted, base.config.max_positions)
    unique = list(dict.fromkeys(items))
    found = _measure(base, edited, unique, {x for x, w in zip(items, wanted, strict=True) if w.near}, batch_tokens)
    spoken = _generated((base, edited), items, wanted) if generate else {}
    place = {item: i for i, item in enumerate(unique)}
    records: list[list[PromptRecord]] = [[] for _ in requests]
    for item, w in zip(items, wanted, strict=True):
        records[w.request].append(_record(w, item, found, place[item], spoken))
    return Report.of(
        [RequestRecord(i, r.id, tuple(records[i])) for i, r in enumerate(requests)],
    )


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """One prompt to be measured, as text; `true` is None where no true target is known."""

    request: int
    kind: Kind
    prompt: str
    new: str
    true: str | None

    @property
    def near(self) -> bool:
        return self.kind == "neighbourhood"


@dataclasses.dataclass(frozen=True)
class _Item:
    """One prompt to be run, as tokens: equal ones are run once."""

    prompt: Ids
    new: Ids
    true: Ids


@dataclasses.dataclass
class _Found:
    """Per unique item: nll and hit ``[2 models, n, 2 targets]``, kl ``[n]``, overlap ``[n, 3]``."""

    nll: np.ndarray
    hit: np.ndarray
    kl: np.ndarray
    overlap: np.ndarray


def _prompts(index: int, request: EditRequest, most: int | None) -> list[_Wanted]:
    answers = request.answers_nearby
    if len(answers) != len(request.neighbourhood):
        counts = f"{len(request.neighbourhood)} neighbourhood prompts, {len(answers)} neighbourhood_answers"
        raise RequestError([f"request {index} (id {request.id}) has {counts}"])
    own: list[tuple[Kind, str]] = [
        ("efficacy", request.prompt),
        *(("paraphrase", p) for p in request.paraphrases),
    ]
    made = [_Wanted(index, kind, prompt, request.target, request.target_true) for kind, prompt in own]
    near = list(zip(request.neighbourhood, answers, strict=True))[:most]
    return made + [_Wanted(index, "neighbourhood", p, request.target, answer) for p, answer in near]


def _tokenise(tokenizer, requests, wanted: Sequence[_Wanted], max_positions: int) -> list[_Item]:
    """The tokens of every prompt and target, or RequestError naming all that cannot be run."""
    pairs = [(w.prompt, t) for w in wanted for t in (w.new, w.true) if t is not None]
    joined = [p + spaced(t) for p, t in pairs]
    memo = Memo(tokenizer, [p for p, _ in pairs] + joined)
    problems: list[str] = []
    items = []
    for w in wanted:
        prompt = tuple(memo.known[w.prompt])
        new, true = (() if t is None else tuple(target_ids(memo, w.prompt, t)) for t in (w.new, w.true))
        where = f"request {w.request} (id {requests[w.request].id}), {w.kind} prompt {w.prompt!r}"
        longest = len(prompt) + max(len(new), len(true))
        if not prompt or not new or (w.true is not None and not true):
            problems.append(f"{where}: the prompt or a target has no tokens")
        elif longest > max_positions:
            problems.append(f"{where}: prompt and target have {longest} tokens; the model takes {max_positions}")
        items.append(_Item(prompt, new, true))
    if problems:
        raise RequestError(problems)
    return items


def _measure(base: Decoder, edited: Decoder, items: Sequence[_Item], near: set[_Item], budget: int) -> _Found:
    """Run both models on the same padded batches. Results stay on the device until all work is queued."""
    models, config, mesh = (base.params, edited.params), base.config, mesh_of(base.params)
    shapes = []
    for item in items:
        rest = max(len(item.new), len(item.true)) - 1
        shapes.append((bucket(len(item.prompt), MIN_LENGTH), *(2 * (bucket(rest, 4) if rest else 0,))))
    queued = []
    for batch in batches(shapes, budget, data_shards(mesh)):
        rows = batch.take(items)
        tokens, mask = pad([r.prompt for r in rows], batch.shape[0])
        targets, real = pad([t for r in rows for t in (r.new, r.true)], batch.shape[1] + 1)
        args = (config, *place_rows((tokens, mask, targets, real), mesh), mesh)
        (last, *ours), (edited_last, *theirs) = (score(params, *args) for params in models)
        drift = None
        if any(items[i] in near for i in batch.index):
            drift = divergence(*models, config, last, edited_last, mesh)
        queued.append((batch.index, ours, theirs, drift))
    n = len(items)
    found = _Found(np.zeros((2, n, 2)), np.zeros((2, n, 2), bool), np.zeros(n), np.zeros((n, 3)))
    for index, *sides, drift in jax.device_get(queued):
        for m, (nll, hit) in enumerate(sides):
            found.nll[m, index], found.hit[m, index] = nll[: len(index)], hit[: len(index)]
        if drift is not None:
            found.kl[index], found.overlap[index] = (x[: len(index)] for x in drift)
    return found


def _generated(models: Sequence[Decoder], items: Sequence[_Item], wanted: Sequence[_Wanted]):
    """Per (prompt, new target) of rewrite and paraphrase prompts: does each model generate it greedily?"""
    asked = list(dict.fromkeys((x.prompt, x.new) for x, w in zip(items, wanted, strict=True) if not w.near))
    need: dict[Ids, int] = {}
    for prompt, new in asked:
        need[prompt] = max(need.get(prompt, 0), len(new))
    # All in one go, but for prompts so long that only their own target fits behind them.
    most, room = max(need.values()), models[0].config.max_positions
    groups: dict[int, list[Ids]] = {}
    for prompt, n in need.items():
        groups.setdefault(most if len(prompt) + most <= room else n, []).append(prompt)
    answers = []
    for model in models:
        says: dict[Ids, list[int]] = {}
        for steps, some in groups.items():
            rows = continue_rows(model.params, model.config, some, steps)
            says |= zip(some, rows, strict=True)
        answers.append(says)
    return {(p, new): tuple(tuple(a[p][: len(new)]) == new for a in answers) for p, new in asked}


def _record(w: _Wanted, item: _Item, found: _Found, i: int, spoken) -> PromptRecord:
    known = w.true is not None
    says = (None, None) if w.near else spoken.get((item.prompt, item.new), (None, None))

    def of(m: int) -> Score:
        (new, true), (hit_new, hit_true) = found.nll[m, i].tolist(), found.hit[m, i].tolist()
        return Score(new, true if known else None, hit_new, hit_true if known else None, says[m])

    drift = (float(found.kl[i]), tuple(found.overlap[i].tolist())) if w.near else (None, None)
    return PromptRecord(w.kind, w.prompt, w.new, w.true, of(0), of(1), *drift)
