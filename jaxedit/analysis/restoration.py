"""Runs of a model with corrupted subjects in which one clean state is put back: the compiled part of causal tracing.

A run in which something of (token i, layer l) is restored is the corrupted run in every layer below and at every
token before. Those are read from the corrupted run, which is computed once: only tokens i and later go through the
layers from the restored one up, and see the keys and values of the corrupted run. Such rows are of every length; they
lie end to end without padding (`Ragged`), rows of many prompts, tokens and noise samples together. The first layer to
run, and up to which layer what is restored, are traced values, so one compiled program serves all layers and kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxedit.evaluation.batching import chunk
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import (
    Context,
    Params,
    Ragged,
    attention,
    attention_added,
    embed,
    layer,
    mlp_added,
    mlp_key,
    mlp_output,
    unembed,
    window_of,
)

Array = Any  # NumPy's on the host, JAX's within a program


class Prompts(NamedTuple):
    """Facts as token ids ``[g, s]``, right-padded; per fact ``[g]`` the number of tokens, the first and the last token
    of the subject, the first token of the answer, and the number that its noise depends on."""

    tokens: Array
    length: Array
    first: Array
    last: Array
    answer: Array
    number: Array


class Runs(NamedTuple):
    """The clean and the corrupted runs of g facts with m noise samples, rows ``[g · (1 + m)]``, the clean one first.

    states: ``[n_layer + 1, rows, s, d_model]``, what enters each layer and what the last one returns; k, v:
    ``[n_layer, rows, s, n_kv_head, head_dim]``; attended, out: ``[n_layer, g, s, d_model]``, what attention and MLP
    add in the clean runs; chance: ``[g, 1 + m]``, the probability of the answer.
    """

    states: jax.Array
    k: jax.Array
    v: jax.Array
    attended: jax.Array
    out: jax.Array
    chance: jax.Array


def subject_noise(key, number, place, samples: int, width: int):
    """Standard normal noise ``[samples, width]``, float32, for token `place` of the subject of fact `number`.

    It depends on nothing else, so a fact's noise is the same however facts are grouped.
    """
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, number), place), (samples, width), jnp.float32)


@partial(jax.jit, static_argnames=("config", "samples"))
def corrupt(params: Params, config: ModelConfig, prompts: Prompts, key, sigma, samples: int) -> Runs:
    """Run each fact clean, and `samples` times with noise of standard deviation `sigma` added to the embeddings of
    the subject's tokens. Nothing is saved here; it is a small part of the work."""
    tokens, length, first, last, answer, number = (jnp.asarray(x) for x in prompts)
    g, s = tokens.shape
    at = jnp.arange(s)
    of_tokens = jax.vmap(lambda n, place: subject_noise(key, n, place, samples, config.d_model), (None, 0))
    noise = jax.vmap(of_tokens)(number, jnp.maximum(at - first[:, None], 0))
    inside = (at >= first[:, None]) & (at <= last[:, None])
    noise = jnp.moveaxis(jnp.where(inside[..., None, None], noise, 0), 2, 1)
    noise = jnp.pad(noise, [(0, 0), (1, 0), (0, 0), (0, 0)]).reshape(-1, s, config.d_model)
    rows = partial(jnp.repeat, repeats=1 + samples, axis=0)
    context = Context.of_mask(rows((at < length[:, None]).astype(jnp.int32)))
    h = embed(params, config, rows(tokens), context)
    h = h + (sigma * noise.astype(wide(h.dtype))).astype(h.dtype)
    clean = slice(None, None, 1 + samples)

    def block(h, index):
        p = layer(params, index)
        attended, k, v = attention(p, config, h, context, window_of(config, index))
        attended = attention_added(p, config, attended)
        out = _mlp(p, config, h, h + attended)
        return h + attended + out, (h, k, v, attended[clean], out[clean])

    end, (states, k, v, attended, out) = lax.scan(block, h, jnp.arange(config.n_layer))
    chance = _chance(params, config, end[jnp.arange(len(end)), rows(length) - 1], rows(answer))
    states = jnp.concatenate([states, end[None]])
    return Runs(states, k, v, attended, out, chance.reshape(g, 1 + samples))


def _mlp(p: Params, config: ModelConfig, h, stream):
    """What the MLP adds."""
    return mlp_added(p, config, mlp_output(p, mlp_key(p, config, h, stream)))


def _chance(params: Params, config: ModelConfig, h, answers):
    """Probability ``[n]`` of one token each after hidden states ``[n, d_model]``, float32 (float64 for float64)."""

    def one(row):
        logits = unembed(params, config, row[0])
        return jnp.exp(logits[row[1]] - jax.nn.logsumexp(logits))

    return lax.map(one, (h, answers), batch_size=chunk(len(h)))


class Rows(NamedTuple):
    """Rows to run, ``[r]`` each: the row of `Runs`, the place of the restored token, and the number of tokens from
    that one to the prompt's end."""

    run: np.ndarray
    start: np.ndarray
    size: np.ndarray


def rows_of(lengths: Sequence[int], firsts: Sequence[int], samples: int, budget: int) -> list[Rows]:
    """The restorations at every token from the subject's first on, in every noise sample of some facts, in the order
    fact, token, sample; cut into pieces of about `budget` tokens."""
    tokens = ((f, i) for f, n in enumerate(lengths) for i in range(firsts[f], n))
    fact, start = (np.repeat(np.asarray(x, np.int32), samples) for x in zip(*tokens, strict=True))
    sample = np.tile(np.arange(samples, dtype=np.int32), len(fact) // samples)
    size = np.asarray(lengths, np.int32)[fact] - start
    ends = np.cumsum(size)
    pieces = max(1, round(int(ends[-1]) / budget))
    piece = (ends - 1) * pieces // ends[-1]
    every = Rows(fact * (1 + samples) + 1 + sample, start, size)
    return [Rows(*(x[piece == i] for x in every)) for i in np.unique(piece)]


class Plan(NamedTuple):
    """Rows laid end to end, T tokens of R rows.

    Per token ``[T]``: the row of `Runs` that it is of, its place in the prompt, whether it is the restored one, and
    `back` (see `Ragged`). Per row ``[R]``: its row of `Runs`, the place of the restored token, where its last token
    lies, and `slots` ``[R, longest]``.
    """

    token_run: Array
    place: Array
    restored: Array
    back: Array
    run: Array
    start: Array
    final: Array
    slots: Array


def make_plan(rows: Rows, longest: int, tokens: int, n: int) -> Plan:
    """The plan of `rows`, filled up to T = `tokens` and R = `n` so that one compiled program serves all plans."""
    run, start, size = (np.pad(x, (0, n - len(x))) for x in rows)
    begin = np.cumsum(size) - size
    owner = np.repeat(np.arange(n), size)
    offset = np.arange(len(owner)) - begin[owner]
    along = np.arange(longest)

    def per_token(x, fill=0):
        return np.pad(x, (0, tokens - len(owner)), constant_values=fill)

    made = Plan(
        token_run=per_token(run[owner]),
        place=per_token(start[owner] + offset),
        restored=per_token(offset == 0),
        back=per_token(owner * longest + offset, n * longest),  # out of range, which reads as zero
        run=run,
        start=start,
        final=np.maximum(begin + size - 1, 0),
        slots=np.where(along < size[:, None], begin[:, None] + along, tokens),
    )
    return Plan(*(x if x.dtype == bool else x.astype(np.int32) for x in made))


@partial(jax.jit, static_argnames=("config",))
def restore(
    params: Params, config: ModelConfig, runs: Runs, plan: Plan, answers, start, whole, attention_until, mlp_until
):
    """The probability of the answer ``[R]`` in the runs of `plan`, float32 (float64 for a float64 model).

    answers: ``[g]``. Layers from `start` up are run. At the restored token the clean run's value stands for
    the state that enters layer `start` where `whole` is true, and for what attention (MLP) adds in layers `start` to
    ``attention_until - 1`` (``mlp_until - 1``).
    """
    plan = Plan(*(jnp.asarray(x) for x in plan))
    each, width = runs.chance.shape[1], runs.states.shape[2]  # rows of a fact, tokens of a row
    fact = plan.token_run // each
    source = jnp.where(plan.restored & whole, fact * each, plan.token_run)
    along = plan.start[:, None] + jnp.arange(plan.slots.shape[1])
    inside = (plan.slots < len(plan.place)).astype(jnp.int32)
    ragged = Ragged(plan.slots, plan.back, Context(along, inside))
    context = Context(plan.place[None], jnp.ones_like(plan.place)[None], ragged)
    places = jnp.broadcast_to(jnp.arange(width), (len(plan.run), width))
    before = Context(places, (places < plan.start[:, None]).astype(jnp.int32))

    def pick(x, index):
        return lax.dynamic_index_in_dim(x, index, keepdims=False)

    def block(index, h):
        p = layer(params, index)
        past = pick(runs.k, index)[plan.run], pick(runs.v, index)[plan.run], before

        def put(own, clean, until):
            here = (plan.restored & (index < until))[None, :, None]
            return jnp.where(here, pick(clean, index)[fact, plan.place][None], own)

        attended, _, _ = attention(p, config, h, context, window_of(config, index), past)
        stream = h + put(attention_added(p, config, attended), runs.attended, attention_until)
        return stream + put(_mlp(p, config, h, stream), runs.out, mlp_until)

    h = pick(runs.states, start)[source, plan.place][None]
    h = lax.fori_loop(start, config.n_layer, block, h)
    return _chance(params, config, h[0, plan.final], jnp.asarray(answers)[plan.run // each])
