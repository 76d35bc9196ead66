"""Causal tracing: which layers carry a fact, and at which tokens (Meng et al. 2022, "Locating and Editing Factual
Associations in GPT", §2 and appendix B).

A clean run of a prompt gives its answer some probability; noise on the embeddings of the subject's tokens takes it
away (a corrupted run); putting one clean state back into a corrupted run gives some of it back. That gain is the
indirect effect of the state. Averaged over facts, by layer and by the token's role in the prompt, it shows where a
model looks a fact up, which is where editors write.

Three kinds of state are put back: the hidden state that a layer returns at one token ("hidden"), and what the MLPs
("mlp") or the attention ("attention") of a window of layers add at one token.

What is not computed twice: layers below the restored one, tokens before it, tokens before the subject (where nothing
changes and every effect is zero), padding, and logits elsewhere than at the prompt's end. See
`jaxedit.analysis.restoration`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxedit.analysis.record import KINDS, Kind, Trace
from jaxedit.analysis.restoration import Plan, Prompts, corrupt, make_plan, restore, rows_of
from jaxedit.data.facts import Fact
from jaxedit.data.tokens import encode, target_ids, token_at
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.generation import continue_rows
from jaxedit.layer_loop import Progress
from jaxedit.models.fingerprint import whole_fingerprint
from jaxedit.models.sites import refuse_adapters
from jaxedit.models.transformer import Decoder

_RUN_TOKENS = 8192  # of clean and corrupted runs, whose states in all layers are on the device at once
_CPU_TOKENS, _ACCELERATOR_TOKENS = 1024, 16384  # of restorations run together
_LOOKED_AT = 64  # facts that are asked of the model at a time


def trace(
    model: Decoder,
    tokenizer,
    facts: Sequence[Fact],
    *,
    kinds: Sequence[Kind] = KINDS,
    window: int | None = None,
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
    max_facts: int | None = None,
    on_progress: Progress | None = None,
) -> Trace:
    """Trace the facts that the model knows: its greedy continuation of the prompt begins with the attribute.

    The answer, whose probability is followed, is the first token of that continuation. Each fact is corrupted
    `samples` times with Gaussian noise of `noise` times the standard deviation of the embeddings of all traced
    subjects' tokens; probabilities are means over the samples.
    window: layers whose MLP (attention) is restored together, ``[l - window // 2, l + window - window // 2)`` for the
        effect of layer l, cut at the ends; by default 10 as published, but at most a third of the layers.
    max_facts: trace the first so many known facts; the rest is not looked at.
    seed: of the noise, which does not depend on how facts are batched. on_progress is told (stage, done, total).

    States have the model's dtype, probabilities are float32 (float64 for a float64 model), averages float64. Weights
    on a mesh stay there; rows are not split over its "data" axis.

    Raises JaxEditError on settings out of range and where the model knows none of the facts, RequestError naming
    every fact that does not fit the model's context.
    """
    refuse_adapters(model, "trace it")
    config = model.config
    window = max(1, min(10, config.n_layer // 3)) if window is None else window
    _check(tokenizer, facts, kinds, window, noise, samples, max_facts)
    found, answers, unknown = _known(model, tokenizer, facts, max_facts, on_progress)
    if not found:
        raise JaxEditError(
            f"the model knows none of the {len(unknown)} facts: it continues no prompt with its attribute; "
            "give other facts, or a base model that completes text"
        )
    prompts = _prompts([_row(tokenizer, f) for f in found], answers)
    sigma = noise * _spread(model, prompts)
    length, first = prompts.length, prompts.first
    effects, chances = _effects(model, prompts, tuple(kinds), window, sigma, samples, seed, on_progress)
    ids = [prompts.tokens[i, :n].tolist() for i, n in enumerate(length)]
    about = {
        **{"noise": float(noise), "sigma": sigma, "samples": samples, "window": window, "seed": seed},
        **{name: getattr(config, name) for name in ("family", "n_layer", "d_model", "d_ff")},
        "fingerprint": whole_fingerprint(model.params, config),
    }
    return Trace(
        facts=tuple(found),
        unknown=tuple(unknown),
        tokens=tuple(tuple(tokenizer.decode([t]) for t in row) for row in ids),
        answers=tuple(tokenizer.decode([a]) for a in answers),
        subjects=np.stack([first, prompts.last], 1),
        clean=chances[:, 0],
        corrupted=chances[:, 1:].mean(1),
        effects=effects,
        about=about,
    )


def _check(tokenizer, facts, kinds, window: int, noise: float, samples: int, max_facts: int | None):
    if tokenizer is None:
        raise JaxEditError("this model came without a tokenizer; pass one")
    if not facts:
        raise JaxEditError("there are no facts to trace")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise JaxEditError(f"kinds must be some of {', '.join(KINDS)}, got {list(kinds)}")
    if window < 1 or samples < 1 or noise < 0 or (max_facts is not None and max_facts < 1):
        raise JaxEditError(
            f"window, samples and max_facts must be at least 1 and noise not negative, got window={window}, "
            f"samples={samples}, max_facts={max_facts}, noise={noise}"
        )


class _Row(NamedTuple):
    """A prompt's token ids, and the first and last token of its subject."""

    tokens: tuple[int, ...]
    first: int
    last: int


def _row(tokenizer, fact: Fact) -> _Row:
    ids, offsets = encode(tokenizer, fact.prompt)
    start = fact.subject_start or 0
    last = token_at(tokenizer, fact.prompt, ids, offsets, start + len(fact.subject) - 1)
    if offsets is None:
        first = token_at(tokenizer, fact.prompt, ids, offsets, start)
    else:  # a character may be split over several tokens: the first of them is meant
        first = next(i for i, (a, b) in enumerate(offsets) if a <= start < b)
    return _Row(tuple(ids), first, last)


def _known(model: Decoder, tokenizer, facts: Sequence[Fact], most: int | None, on_progress: Progress | None):
    """The facts that the model knows, the first token of each answer, and the facts looked at that it does not know."""
    limit, problems = model.config.max_positions, []
    sizes = [len(target_ids(tokenizer, f.prompt, f.attribute)) for f in facts]
    rows = [encode(tokenizer, f.prompt)[0] for f in facts]
    for i, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        if len(row) + size > limit:
            problems.append(f"fact {i} has {len(row) + size} tokens with its attribute; the model takes {limit}")
    if problems:
        raise RequestError(problems)
    known, answers, unknown = [], [], []
    for at in range(0, len(facts), _LOOKED_AT):
        some = slice(at, at + _LOOKED_AT)
        said = continue_rows(model.params, model.config, rows[some], max(sizes[some]))
        for fact, ids in zip(facts[some], said, strict=True):
            if len(known) == most:
                break
            if tokenizer.decode(ids).strip().startswith(fact.attribute.strip()):
                known.append(fact)
                answers.append(ids[0])
            else:
                unknown.append(fact)
        enough = len(known) == most
        if on_progress is not None:
            done = len(known) + len(unknown)
            on_progress("facts", done, done if enough else len(facts))
        if enough:
            break
    return known, answers, unknown


def _prompts(rows: Sequence[_Row], answers: Sequence[int]) -> Prompts:
    length = np.asarray([len(r.tokens) for r in rows], np.int32)
    tokens = np.zeros((len(rows), int(length.max())), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : length[i]] = row.tokens
    first, last = (np.asarray(x, np.int32) for x in zip(*((r.first, r.last) for r in rows), strict=True))
    return Prompts(tokens, length, first, last, np.asarray(answers, np.int32), np.arange(len(rows), dtype=np.int32))


def _spread(model: Decoder, prompts: Prompts) -> float:
    """The standard deviation of all entries of the embeddings of the subjects' tokens, as they enter layer 0
    (without positions); float64."""
    subjects = zip(prompts.tokens, prompts.first, prompts.last, strict=True)
    ids = np.concatenate([tokens[a : b + 1] for tokens, a, b in subjects])
    return float(np.asarray(model.params["embed"]["tokens"][ids], np.float64).std()) * model.config.embed_scale


def _effects(model: Decoder, prompts: Prompts, kinds, window: int, sigma: float, samples: int, seed: int, on_progress):
    """Effects by kind ``[n_layer, all tokens]`` and chances ``[facts, 1 + samples]``, float64.

    Facts are taken in groups of one size, whose clean and corrupted runs are on the device together.
    """
    params, config = model.params, model.config
    n, width = prompts.tokens.shape
    groups = -(-n * (1 + samples) * width // _RUN_TOKENS)
    size = -(-n // groups)
    members = [np.arange(at, min(at + size, n)) for at in range(0, n, size)]
    platform = next(iter(params["embed"]["tokens"].devices())).platform
    budget = _CPU_TOKENS if platform == "cpu" else _ACCELERATOR_TOKENS
    rows = [rows_of(prompts.length[m].tolist(), prompts.first[m].tolist(), samples, budget) for m in members]
    longest = int((prompts.length - prompts.first).max())
    tokens = max(int(r.size.sum()) for some in rows for r in some)
    most = max(len(r.run) for some in rows for r in some)
    ends = np.cumsum(prompts.length).tolist()
    effects = {kind: np.zeros((config.n_layer, ends[-1])) for kind in kinds}
    chances = np.zeros((n, 1 + samples))
    key, steps = jax.random.key(seed), len(members) * config.n_layer * len(kinds)
    for g, (m, some) in enumerate(zip(members, rows, strict=True)):
        here = Prompts(*(np.pad(x[m], [(0, size - len(m))] + [(0, 0)] * (x.ndim - 1), mode="edge") for x in prompts))
        runs = corrupt(params, config, here, key, sigma, samples)
        chances[m] = np.asarray(runs.chance, np.float64)[: len(m)]
        plans = [jax.device_put(make_plan(r, longest, tokens, most)) for r in some]
        after = (prompts.length - prompts.first)[m]  # tokens from the subject's first on
        columns = np.concatenate([np.arange(ends[i] - k, ends[i]) for i, k in zip(m, after.tolist(), strict=True)])
        base = np.repeat(chances[m, 1:].mean(1), after)
        for k, kind in enumerate(kinds):
            for l in range(config.n_layer):
                found = _restored(params, config, runs, plans, here.answer, kind, l, window)
                found = np.concatenate([np.asarray(x)[: len(r.run)] for x, r in zip(found, some, strict=True)])
                effects[kind][l, columns] = found.astype(np.float64).reshape(-1, samples).mean(1) - base
                if on_progress is not None:
                    on_progress("tracing", (g * len(kinds) + k) * config.n_layer + l + 1, steps)
    return effects, chances


def _restored(params, config, runs, plans: Sequence[Plan], answers, kind: Kind, l: int, window: int):
    """Probabilities in all plans with the state of one kind and layer restored."""
    start, until = (l + 1, 0) if kind == "hidden" else (max(0, l - window // 2), l + window - window // 2)
    attention_until, mlp_until = (until if kind == x else 0 for x in ("attention", "mlp"))
    settings = (start, kind == "hidden", attention_until, mlp_until)
    return [restore(params, config, runs, plan, answers, *settings) for plan in plans]
