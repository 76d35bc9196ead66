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
from jax.sharding import Mesh

from jaxedit.config import AnchorConfig
from jaxedit.data.tokens import EditTokens
from jaxedit.memory import USABLE, anchor_cost, free_bytes, lanes_that_fit, tokens_per_step
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import Context, Params, Past, embed, run, unembed
from jaxedit.sharding import data_shards, mesh_of, over_data, place_rows
from jaxedit.targets.anchor_plan import Plan, Shape, buckets, make_plan, shape_of, suffix_tokens


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


_CPU_TOKENS, _ACCELERATOR_TOKENS = 160, 16384  # suffix tokens a step beyond which products get no faster
# What of a layer is kept for the backward pass, from most memory and least work to least memory and most work
KEPT = (("q", "k", "v", "o", "gate", "up"), ("q", "k", "v", "o", "gate"), ("q", "k", "v", "o"), ())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Fixed:
    """What does not depend on δ, of some edits: hidden states of the suffix, what the tokens before it left in the
    layers above (`past`), the state that δ is added to, and what the KL row said before."""

    h: jax.Array
    context: Context
    past: Past
    init: jax.Array
    base_log_probs: jax.Array


def find_anchors(
    params: Params,
    config: ModelConfig,
    edits: Sequence[EditTokens],
    layer: int,
    settings: AnchorConfig,
    on_progress: Callable[[int], None] | None = None,
) -> Anchors:
    """Optimise the anchors of `edits` at the output of `layer`.

    Where the weights lie on a mesh, each device of its "data" axis takes its share of the edits.
    on_progress is told how many edits each finished bucket held. Losses and δ are float32 (float64 for a float64
    model), whatever the dtype of the weights.
    """
    mesh = mesh_of(params)
    shards = data_shards(mesh)
    dtype = np.dtype(wide(params["embed"]["tokens"].dtype))
    n = len(edits)
    value, init = (np.zeros((n, config.d_model), dtype) for _ in range(2))
    updates, losses = np.zeros(n, np.int32), np.full((n, settings.steps, 4), np.nan, dtype)
    needed = [suffix_tokens(e) for e in edits]
    spent = 0
    for members, size in buckets(needed, settings.bucket_growth):
        share = -(-len(members) // shards)
        shape = shape_of([edits[i] for i in members], size)
        lanes, held, keep = _room(params, config, layer, shape, settings, share)
        resident = held * shards
        for at in range(0, len(members), resident):
            chosen = members[at : at + resident]
            plan = place_rows(make_plan([edits[i] for i in chosen], shape, resident), mesh)
            found = _optimise(
                params, plan, config=config, layer=layer, settings=settings, lanes=lanes, keep=keep, mesh=mesh
            )
            start, delta, count, log = (np.asarray(x)[: len(chosen)] for x in found)
            value[chosen], init[chosen], updates[chosen], losses[chosen] = start + delta, start, count, log
            spent += size * len(chosen)
            if on_progress is not None:
                on_progress(len(chosen))
    return Anchors(value, init, updates, losses, spent / sum(needed))


def _room(params, config: ModelConfig, layer: int, shape: Shape, settings: AnchorConfig, share: int):
    """How many of `share` edits to optimise together, how many to hold on the device, and what to keep of a layer.

    As many tokens a step as are wanted, if memory allows, and then as little work done twice as it allows.
    """
    tokens = params["embed"]["tokens"]
    free = free_bytes(next(iter(tokens.devices())))
    wanted = settings.tokens_per_step or (_CPU_TOKENS if free is None else _ACCELERATOR_TOKENS)
    most, keep = max(1, wanted // shape.suffix), KEPT[0]
    costs = [anchor_cost(config, tokens.dtype, layer, **shape._asdict(), keep=keep) for keep in KEPT]
    if free is not None:
        enough = (i for i, cost in enumerate(costs) if lanes_that_fit(cost, free) >= min(most, share))
        chosen = next(enough, len(KEPT) - 1)
        keep, costs = KEPT[chosen], costs[chosen:]
        most = min(most, tokens_per_step(costs[0], shape.suffix, free) // shape.suffix)
    rounds = -(-share // most)
    lanes = -(-share // rounds)  # even rounds: lanes that run empty still cost their tokens
    held = min(settings.resident_rounds, rounds)
    if free is not None:
        held = next((r for r in range(held, 1, -1) if costs[0].total(lanes, lanes * r) <= USABLE * free), 1)
    return lanes, lanes * held, keep


@partial(jax.jit, static_argnames=("config", "layer", "settings", "lanes", "keep", "mesh"))
def _optimise(
    params, plan: Plan, *, config: ModelConfig, layer: int, settings: AnchorConfig, lanes: int, keep, mesh: Mesh | None
):
    """Adam on all edits of `plan`, `lanes` of them at a time on each shard; the whole loop runs on the device.

    Returns ``(init [n, d_model], delta [n, d_model], updates [n], losses [n, steps, 4])``.
    """
    share = partial(_optimise_share, config=config, layer=layer, settings=settings, lanes=lanes, keep=keep)
    return over_data(share, mesh)(params, plan)


class _Lanes(NamedTuple):
    """The edits being optimised, one a lane: which, δ, Adam's moments, updates made, losses, and whether to stop."""

    edit: jax.Array
    delta: jax.Array
    moments: optax.OptState
    count: jax.Array
    log: jax.Array
    stopped: jax.Array


def _optimise_share(params, plan: Plan, *, config: ModelConfig, layer: int, settings: AnchorConfig, lanes: int, keep):
    """Two nested loops: the inner one makes steps until a lane is free and an edit waits for it; the outer one
    refills, which is when the lanes' inputs are copied."""
    n, rounds = len(plan.real), len(plan.real) // lanes
    grouped = jax.tree.map(lambda x: jnp.asarray(x).reshape(rounds, lanes, *x.shape[1:]), plan)
    fixed = lax.map(lambda some: _prepare(params, config, some, layer), grouped)
    init = fixed.init.reshape(n, -1)
    dtype = init.dtype
    adam = optax.adam(settings.lr)
    limit = settings.clamp * safe_norm(init)

    def begin(edit) -> _Lanes:
        delta = jnp.zeros((lanes, config.d_model), dtype)
        log = jnp.full((lanes, settings.steps, 4), jnp.nan, dtype)
        count = jnp.zeros(lanes, jnp.int32)
        return _Lanes(edit, delta, jax.vmap(adam.init)(delta), count, log, ~jnp.asarray(plan.real)[edit])

    def step(now: _Lanes, here: _Fixed, where: Plan) -> _Lanes:
        grad, terms = jax.grad(_loss, has_aux=True)(now.delta, params, config, here, where, layer, settings, keep)
        active = ~now.stopped
        stop = now.stopped | (terms[:, 0] < settings.threshold) | (now.count == settings.steps - 1)
        change, moments = jax.vmap(adam.update)(grad, now.moments, now.delta)
        delta = now.delta + jnp.asarray(change)
        size, most = safe_norm(delta), limit[now.edit]
        delta = delta * jnp.where(size > most, most / jnp.where(size == 0, 1, size), 1)[:, None]
        at = jnp.arange(lanes), now.count
        log = now.log.at[at].set(jnp.where(active[:, None], terms, now.log[at]))
        delta, moments = _where(stop, (now.delta, now.moments), (delta, moments))
        return _Lanes(now.edit, delta, moments, now.count + ~stop, log, stop)

    def refill(carry):
        now, results, following = carry
        free = now.stopped
        waiting = following + jnp.cumsum(free) - 1
        fresh = free & (waiting < n)
        now = _where(fresh, begin(jnp.where(fresh, waiting, now.edit)), now)
        following = following + jnp.sum(fresh)
        here, where = _pick(fixed, grouped, now.edit, lanes)
        now = lax.while_loop(
            lambda now: ~jnp.all(now.stopped) & ((following >= n) | ~jnp.any(now.stopped)),
            lambda now: step(now, here, where),
            now,
        )
        results = jax.tree.map(lambda all, some: all.at[now.edit].set(some), results, (now.delta, now.count, now.log))
        return now, results, following

    first = begin(jnp.arange(lanes))
    empty = (
        jnp.zeros((n, config.d_model), dtype), jnp.zeros(n, jnp.int32), jnp.full((n, settings.steps, 4), jnp.nan, dtype)
    )  # fmt: skip
    _, results, _ = lax.while_loop(
        lambda carry: (carry[2] < n) | ~jnp.all(carry[0].stopped), refill, (first, empty, jnp.asarray(lanes))
    )
    return init, *results


def _where(chosen, new, old):
    """Rows of `new` where `chosen`, of `old` elsewhere, in every array."""
    return jax.tree.map(lambda a, b: jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _pick(fixed: _Fixed, grouped: Plan, edit, lanes: int) -> tuple[_Fixed, Plan]:
    """What the lanes need: of the only group as it is, else copied from the groups ``[rounds, lanes, …]``."""
    if len(fixed.init) == 1:
        return jax.tree.map(lambda x: x[0], (fixed, grouped))
    group, member = edit // lanes, edit % lanes
    k, v = (jnp.moveaxis(x[group, :, member], 0, 1) for x in (fixed.past.k, fixed.past.v))
    rest = dataclasses.replace(fixed, past=fixed.past.context), grouped
    here, where = jax.tree.map(lambda x: x[group, member], rest)
    return dataclasses.replace(here, past=Past(k, v, here.past)), where


def _prepare(params, config: ModelConfig, plan: Plan, layer: int) -> _Fixed:
    """Everything about some edits that no step changes."""
    context = Context(jnp.asarray(plan.positions), jnp.asarray(plan.segments))
    h = run(params, config, embed(params, config, plan.tokens, context), context, 0, layer + 1)

    def pick(index):
        at = jnp.maximum(index, 0)
        take = partial(jnp.take_along_axis, indices=at, axis=1)
        there = Context(take(plan.positions), jnp.where(index < 0, 0, take(plan.segments)))
        return jnp.take_along_axis(h, at[..., None], 1), there

    h_suffix, here = pick(plan.suffix)
    h_prefix, before = pick(plan.prefix)
    _, (k, v) = run(
        params, config, h_prefix, before, layer + 1, config.n_layer, probe=lambda inside: (inside.k, inside.v)
    )
    init = h_suffix[:, 0].astype(wide(h.dtype))
    fixed = _Fixed(h_suffix, here, Past(k, v, before), init, jnp.zeros(()))
    log_probs = _logits(params, config, fixed, plan, layer, jnp.zeros_like(init), plan.essence[:, None])
    return dataclasses.replace(fixed, base_log_probs=jax.nn.log_softmax(log_probs[:, 0]))


def _logits(params, config: ModelConfig, fixed: _Fixed, plan: Plan, layer: int, delta, at, keep=None):
    """Logits ``[lanes, q, vocab]`` at suffix indices `at`, with ``delta [lanes, d_model]`` added."""
    h = fixed.h + jnp.where(plan.is_lookup[..., None], delta[:, None], 0).astype(fixed.h.dtype)
    h = run(params, config, h, fixed.context, layer + 1, config.n_layer, past=fixed.past, keep=keep)
    return unembed(params, config, jnp.take_along_axis(h, at[..., None], 1))


def safe_norm(x):
    """‖x‖ over the last axis, with gradient 0 at 0."""
    square = jnp.sum(x * x, -1)
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def _loss(delta, params, config: ModelConfig, fixed: _Fixed, plan: Plan, layer: int, settings: AnchorConfig, keep):
    """Sum over lanes of the loss, and its terms ``[lanes, 4]``."""
    at = jnp.concatenate([plan.asks, plan.essence[:, None]], 1)
    logits = _logits(params, config, fixed, plan, layer, delta, at, keep)
    log_sums = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits[:, :-1], plan.answers[..., None], 2)[..., 0] - log_sums[:, :-1]
    nll = -jnp.sum(plan.weights.astype(chosen.dtype) * chosen, -1)
    now = logits[:, -1] - log_sums[:, -1:]
    kl = settings.kl_weight * jnp.sum(jnp.exp(now) * (now - fixed.base_log_probs), -1)
    decay = settings.weight_decay * safe_norm(delta) / jnp.sum(fixed.init**2, -1)
    total = nll + kl + decay
    return jnp.sum(jnp.where(plan.real, total, 0)), jnp.stack([total, nll, kl, decay], -1)
