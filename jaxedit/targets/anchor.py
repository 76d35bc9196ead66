"""Anchors: the hidden state at the decisive token that makes the model say the target.

For each edit a vector δ is added to the output of one layer at the decisive token of every row, and Adam minimises

    nll + kl_weight · KL(edited ‖ base at "{subject} is a") + weight_decay · ‖δ‖ / ‖h‖²,

with ‖δ‖ clamped to a multiple of ‖h‖ (Meng et al. 2023, `compute_z`). The loss is tested before each update, so n
steps are at most n - 1 updates.

Nothing at or below the layer, and no token before the decisive one, depends on δ: their hidden states, keys and
values are computed once. The optimiser runs only the suffix tokens through the layers above, packed without
padding, and takes logits only where a target token is predicted. All edits of a bucket share one compiled loop on
the device; an edit that has converged is frozen and its lane goes to the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxedit.config import AnchorConfig
from jaxedit.data.tokens import EditTokens, Packed, pack, round_up
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import Context, Params, Past, embed, run, unembed

Array = jax.Array | np.ndarray


class Anchors(NamedTuple):
    """Anchors of n edits at one layer.

    value, init: ``[n, d_model]``, the anchor and the unedited hidden state it started from; updates: ``[n]``
    Adam updates made; losses: ``[n, steps, 4]`` total, nll, weighted KL and weighted decay before each update,
    NaN after the last; padding: tokens run per step over tokens that were needed.
    """

    value: np.ndarray
    init: np.ndarray
    updates: np.ndarray
    losses: np.ndarray
    padding: float

    @property
    def final_loss(self) -> np.ndarray:
        return self.losses[np.arange(len(self.updates)), self.updates, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Plan:
    """Where things stand in the packed rows of n edits; the leading axis of every field is the edit.

    suffix, prefix: indices into the packed row, -1 where there is none. asks: indices into the suffix at which a
    target token `answers` is predicted, with `weights` that make the sum over asks the published mean. essence:
    index into the suffix of the KL row's decisive token.
    """

    tokens: Array
    positions: Array
    segments: Array
    suffix: Array
    prefix: Array
    is_lookup: Array
    asks: Array
    answers: Array
    weights: Array
    essence: Array
    real: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Fixed:
    """What does not depend on δ, one edit a row (`k`, `v`: ``[n, layers, t, n_kv_head, head_dim]``)."""

    h: jax.Array
    context: Context
    k: jax.Array
    v: jax.Array
    past: Context
    init: jax.Array
    base_log_probs: jax.Array
    plan: _Plan


def find_anchors(
    params: Params,
    config: ModelConfig,
    edits: Sequence[EditTokens],
    layer: int,
    settings: AnchorConfig,
    on_progress: Callable[[int], None] | None = None,
) -> Anchors:
    """Optimise the anchors of `edits` at the output of `layer`.

    on_progress is told how many edits each finished bucket held. Losses and δ are float32 (float64 for a float64
    model), whatever the dtype of the weights.
    """
    dtype = np.dtype(wide(params["embed"]["tokens"].dtype))
    n = len(edits)
    value, init = (np.zeros((n, config.d_model), dtype) for _ in range(2))
    updates, losses = np.zeros(n, np.int32), np.full((n, settings.steps, 4), np.nan, dtype)
    needed = [suffix_tokens(e) for e in edits]
    spent = 0
    for members, size in buckets(needed, settings.bucket_growth):
        rounds = -(-len(members) // max(1, _tokens_per_step(settings) // size))
        lanes = -(-len(members) // rounds)  # even rounds: lanes that run empty still cost their tokens
        resident = min(lanes * settings.resident_rounds, round_up(len(members), lanes))
        shape = _shape([edits[i] for i in members], size)
        for at in range(0, len(members), resident):
            chosen = members[at : at + resident]
            plan = _plan([edits[i] for i in chosen], shape, resident)
            fixed = _prepare(params, config, plan, layer, lanes)
            found = _optimise(params, config, fixed, layer, settings, lanes)
            delta, count, log = (np.asarray(x)[: len(chosen)] for x in found)
            start = np.asarray(fixed.init)[: len(chosen)]
            value[chosen], init[chosen], updates[chosen], losses[chosen] = start + delta, start, count, log
            spent += size * len(chosen)
            if on_progress is not None:
                on_progress(len(chosen))
    return Anchors(value, init, updates, losses, spent / sum(needed))


def suffix_tokens(edit: EditTokens) -> int:
    """Tokens of one edit that depend on δ: from the decisive token on in each context, and one of the KL row."""
    return sum(len(r.tokens) - r.lookup for r in edit.contexts) + 1


def buckets(sizes: Sequence[int], growth: float) -> list[tuple[list[int], int]]:
    """Group edits by suffix size: ``(members, padded size)``. A bucket's largest is at most `growth` its smallest."""
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    groups: list[list[int]] = []
    for i in order:
        if not groups or sizes[i] > growth * sizes[groups[-1][0]] + 4:
            groups.append([])
        groups[-1].append(i)
    return [(sorted(g), round_up(max(sizes[i] for i in g), 4)) for g in groups]


def _tokens_per_step(settings: AnchorConfig) -> int:
    if settings.tokens_per_step is not None:
        return settings.tokens_per_step
    return 256 if jax.default_backend() == "cpu" else 16384


class _Shape(NamedTuple):
    """Sizes that all rounds of a bucket share, so that one compiled loop serves them."""

    packed: int
    prefix: int
    suffix: int
    asks: int


def _shape(edits: Sequence[EditTokens], suffix: int) -> _Shape:
    rows = [(*e.contexts, e.essence) for e in edits]
    return _Shape(
        packed=round_up(max(sum(len(r.tokens) for r in each) for each in rows), 32),
        prefix=round_up(max(sum(r.lookup for r in each) for each in rows) or 1, 32),
        suffix=suffix,
        asks=max(len(e.target) for e in edits) * len(edits[0].contexts),
    )


def _plan(edits: Sequence[EditTokens], shape: _Shape, n: int) -> _Plan:
    """The plan of `edits`, filled up to `n` with edits that are done from the start."""
    rows: Packed = pack([(*e.contexts, e.essence) for e in edits], multiple=shape.packed)
    n_context, size, n_prefix, n_asks = len(edits[0].contexts), shape.suffix, shape.prefix, shape.asks
    suffix, prefix = np.full((n, size), -1, np.int32), np.full((n, n_prefix), -1, np.int32)
    asks, answers = np.zeros((n, n_asks), np.int32), np.zeros((n, n_asks), np.int32)
    weights, essence = np.zeros((n, n_asks), np.float64), np.zeros(n, np.int32)
    for i, edit in enumerate(edits):
        s = p = a = 0
        begin = rows.lookup[i] - [r.lookup for r in (*edit.contexts, edit.essence)]
        for j, row in enumerate(edit.contexts):
            tail = len(row.tokens) - row.lookup
            suffix[i, s : s + tail] = rows.lookup[i, j] + np.arange(tail)
            prefix[i, p : p + row.lookup] = begin[j] + np.arange(row.lookup)
            s, p, t = s + tail, p + row.lookup, len(edit.target)
            asks[i, a : a + t] = s - t + np.arange(t)
            answers[i, a : a + t] = edit.target
            weights[i, a : a + t] = 1 / (t * n_context)
            a += t
        suffix[i, s], essence[i] = rows.lookup[i, -1], s
        prefix[i, p : p + edit.essence.lookup] = begin[-1] + np.arange(edit.essence.lookup)
    spare = n - len(edits)

    def padded(x):
        return np.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1))

    is_lookup = (suffix[:, :, None] == padded(rows.lookup)[:, None, :]).any(-1) & (suffix >= 0)
    return _Plan(
        tokens=padded(rows.tokens),
        positions=padded(rows.positions),
        segments=padded(rows.segments),
        suffix=suffix,
        prefix=prefix,
        is_lookup=is_lookup,
        asks=asks,
        answers=answers,
        weights=weights,
        essence=essence,
        real=np.arange(n) < len(edits),
    )


@partial(jax.jit, static_argnames=("config", "layer", "lanes"))
def _prepare(params, config: ModelConfig, plan: _Plan, layer: int, lanes: int) -> _Fixed:
    """Everything that no step changes, `lanes` edits at a time."""

    def few(plan: _Plan) -> _Fixed:
        context = Context(jnp.asarray(plan.positions), jnp.asarray(plan.segments))
        h = run(params, config, embed(params, config, plan.tokens, context), context, 0, layer + 1)

        def pick(index):
            at = jnp.maximum(index, 0)
            take = partial(jnp.take_along_axis, indices=at, axis=1)
            there = Context(take(plan.positions), jnp.where(index < 0, 0, take(plan.segments)))
            return jnp.take_along_axis(h, at[..., None], 1), there

        h_suffix, here = pick(plan.suffix)
        h_prefix, past = pick(plan.prefix)
        _, (k, v) = run(
            params, config, h_prefix, past, layer + 1, config.n_layer, probe=lambda inside: (inside.k, inside.v)
        )
        k, v = jnp.moveaxis(k, 0, 1), jnp.moveaxis(v, 0, 1)
        init = h_suffix[:, 0].astype(wide(h.dtype))
        fixed = _Fixed(h_suffix, here, k, v, past, init, jnp.zeros(()), plan)
        log_probs = _log_probs(params, config, fixed, layer, jnp.zeros_like(init), plan.essence[:, None])
        return dataclasses.replace(fixed, base_log_probs=log_probs[:, 0])

    n = plan.tokens.shape[0]
    split = jax.tree.map(lambda x: jnp.asarray(x).reshape(n // lanes, lanes, *x.shape[1:]), plan)
    return jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), lax.map(few, split))


def _log_probs(params, config: ModelConfig, fixed: _Fixed, layer: int, delta, at):
    """Log-probabilities ``[lanes, q, vocab]`` at suffix indices `at`, with ``delta [lanes, d_model]`` added."""
    h = fixed.h + jnp.where(fixed.plan.is_lookup[..., None], delta[:, None], 0).astype(fixed.h.dtype)
    past = Past(jnp.moveaxis(fixed.k, 1, 0), jnp.moveaxis(fixed.v, 1, 0), fixed.past)
    h = run(params, config, h, fixed.context, layer + 1, config.n_layer, past=past, remat=True)
    h = jnp.take_along_axis(h, at[..., None], 1)
    return jax.nn.log_softmax(unembed(params, config, h), -1)


def safe_norm(x):
    """‖x‖ over the last axis, with gradient 0 at 0."""
    square = jnp.sum(x * x, -1)
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def _loss(delta, params, config: ModelConfig, fixed: _Fixed, layer: int, settings: AnchorConfig):
    """Sum over lanes of the loss, and its terms ``[lanes, 4]``."""
    plan = fixed.plan
    at = jnp.concatenate([plan.asks, plan.essence[:, None]], 1)
    log_probs = _log_probs(params, config, fixed, layer, delta, at)
    chosen = jnp.take_along_axis(log_probs[:, :-1], plan.answers[..., None], 2)[..., 0]
    nll = -jnp.sum(plan.weights.astype(chosen.dtype) * chosen, -1)
    now = log_probs[:, -1]
    kl = settings.kl_weight * jnp.sum(jnp.exp(now) * (now - fixed.base_log_probs), -1)
    decay = settings.weight_decay * safe_norm(delta) / jnp.sum(fixed.init**2, -1)
    total = nll + kl + decay
    return jnp.sum(jnp.where(plan.real, total, 0)), jnp.stack([total, nll, kl, decay], -1)


@partial(jax.jit, static_argnames=("config", "layer", "settings", "lanes"))
def _optimise(params, config: ModelConfig, fixed: _Fixed, layer: int, settings: AnchorConfig, lanes: int):
    """Adam on all edits of one bucket, `lanes` of them at a time; the whole loop runs on the device.

    Returns ``(delta [n, d_model], updates [n], losses [n, steps, 4])``. State is kept per edit, so a frozen edit
    keeps its δ and its moments, and `lane` says which edit each lane works on.
    """
    n, d_model = fixed.init.shape
    dtype = fixed.init.dtype
    adam = optax.adam(settings.lr)
    limit = settings.clamp * safe_norm(fixed.init)
    delta = jnp.zeros((n, d_model), dtype)
    state = jax.vmap(adam.init)(delta)
    log = jnp.full((n, settings.steps, 4), jnp.nan, dtype)

    def step(carry):
        delta, state, count, log, done, lane, following = carry
        here = fixed if n == lanes else jax.tree.map(lambda x: x[lane], fixed)
        d, s, c = delta[lane], jax.tree.map(lambda x: x[lane], state), count[lane]
        grad, terms = jax.grad(_loss, has_aux=True)(d, params, config, here, layer, settings)
        active = ~done[lane]
        stop = active & ((terms[:, 0] < settings.threshold) | (c == settings.steps - 1))
        move = active & ~stop
        change, s_next = jax.vmap(adam.update)(grad, s)
        d_next = d + change
        size = safe_norm(d_next)
        most = limit[lane]
        d_next = d_next * jnp.where(size > most, most / jnp.where(size == 0, 1, size), 1)[:, None]

        def keep(new, old):
            return jnp.where(move.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        delta = delta.at[lane].set(keep(d_next, d))
        state = jax.tree.map(lambda full, new, old: full.at[lane].set(keep(new, old)), state, s_next, s)
        log = log.at[lane, c].set(jnp.where(active[:, None], terms, log[lane, c]))
        count = count.at[lane].set(c + move)
        done = done.at[lane].set(done[lane] | stop)
        waiting = following + jnp.cumsum(stop) - 1
        lane = jnp.where(stop & (waiting < n), waiting, lane)
        return delta, state, count, log, done, lane, following + jnp.sum(stop)

    start = (
        delta, state, jnp.zeros(n, jnp.int32), log, ~fixed.plan.real, jnp.arange(lanes), jnp.asarray(lanes)
    )  # fmt: skip
    end = lax.while_loop(lambda carry: ~jnp.all(carry[4]), step, start)
    return end[0], end[2], end[3]
