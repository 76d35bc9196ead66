"""Anchors: the hidden state at the decisive token that makes the model say the target.

For each edit a vector δ is added to the output of one layer at the decisive token of every row, and Adam minimises

    nll + kl_weight · KL(edited ‖ base at "{subject} is a") + weight_decay · ‖δ‖ / ‖h‖²,

with ‖δ‖ clamped to a multiple of ‖h‖ (Meng et al. 2023, `compute_z`). The loss is tested before each update, so n
steps are at most n - 1 updates. An edit that is to make the model forget its target has -log(1 - p) of the whole
target, mean over contexts, in the place of nll (unlikelihood, Welleck et al. 2020).

Nothing at or below the layer, and no token before the decisive one, depends on δ: their hidden states, keys and
values are computed once. The optimiser runs only the suffix tokens through the layers above, those of all edits end
to end without padding, and takes logits only where a target token is predicted. All edits of a bucket share one
compiled loop on the device; an edit that has converged is frozen and its lane goes to the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import Params
from jaxedit.sharding import data_shards, mesh_of, over_data, place_rows
from jaxedit.targets.anchor_plan import Plan, make_plan, suffix_tokens
from jaxedit.targets.anchor_room import Rooms, Sizes, arrange
from jaxedit.targets.anchor_step import Fixed, Step, end_to_end, loss, prepare, safe_norm


class Anchors(NamedTuple):
    """Anchors of n edits at one layer.

    value, init: ``[n, d_model]``, the anchor and the unedited state it started from (see `AnchorConfig.site`);
    updates: ``[n]`` Adam updates made; losses: ``[n, steps, 4]`` total, nll, weighted KL and weighted decay before each
    update, NaN after the last; padding: tokens run in all steps over those of edits that were being optimised.
    """

    value: np.ndarray
    init: np.ndarray
    updates: np.ndarray
    losses: np.ndarray
    padding: float

    @property
    def final_loss(self) -> np.ndarray:
        return self.losses[np.arange(len(self.updates)), self.updates, 0]


def find_anchors(
    params: Params,
    config: ModelConfig,
    edits: Sequence[EditTokens],
    layer: int,
    settings: AnchorConfig,
    on_progress: Callable[[int], None] | None = None,
    rooms: Rooms | None = None,
) -> Anchors:
    """Optimise the anchors of `edits` at the output of `layer`.

    Where the weights lie on a mesh, each device of its "data" axis takes its share of the edits.
    on_progress is told how many edits each finished bucket held. rooms: of a stream of small batches. Losses and δ are
    float32 (float64 for a float64 model), whatever the dtype of the weights.
    """
    mesh = mesh_of(params)
    dtype = np.dtype(wide(params["embed"]["tokens"].dtype))
    n = len(edits)
    value, init = (np.zeros((n, config.d_model), dtype) for _ in range(2))
    updates, losses = np.zeros(n, np.int32), np.full((n, settings.steps, 4), np.nan, dtype)
    spent = needed = 0
    for bucket in arrange(params, config, edits, layer, settings, rooms):
        resident = bucket.held * data_shards(mesh)
        # Shard k takes edits k, k + shards, … so that each begins with its largest
        order = np.arange(resident).reshape(bucket.held, -1).T.reshape(-1)
        for at in range(0, len(bucket.members), resident):
            chosen = bucket.members[at : at + resident]
            plan = make_plan([edits[i] for i in chosen], bucket.shape, resident, settings.left_padded)
            plan = place_rows(jax.tree.map(partial(np.take, indices=order, axis=0), plan), mesh)
            sizes, keep = bucket.sizes, bucket.keep
            found = _optimise(
                params, plan, config=config, layer=layer, settings=settings, sizes=sizes, keep=keep, mesh=mesh
            )
            back = np.argsort(order)[: len(chosen)]
            start, delta, count, log, steps = (np.asarray(x) for x in found)
            start, delta, count, log = (x[back] for x in (start, delta, count, log))
            value[chosen], init[chosen], updates[chosen], losses[chosen] = start + delta[:, 0], start, count, log
            spent += bucket.sizes.tokens * int(steps.sum())
            needed += sum(suffix_tokens(edits[i]) * (int(updates[i]) + 1) for i in chosen)
            if on_progress is not None:
                on_progress(len(chosen))
    return Anchors(value, init, updates, losses, spent / needed)


@partial(jax.jit, static_argnames=("config", "layer", "settings", "sizes", "keep", "mesh"))
def _optimise(params, plan: Plan, *, config: ModelConfig, layer: int, settings, sizes: Sizes, keep, mesh: Mesh | None):
    """Adam on all edits of `plan`; the whole loop runs on the device.

    Returns ``(init [n, d_model], delta [n, parts, d_model], updates [n], losses [n, steps, 4], steps of each shard)``.
    """
    share = partial(_optimise_share, config=config, layer=layer, settings=settings, sizes=sizes, keep=keep)
    return over_data(share, mesh)(params, plan)


class _Lanes(NamedTuple):
    """The edits being optimised, one a lane: which, δ, Adam's moments, updates made, losses, and whether to stop."""

    edit: jax.Array
    delta: jax.Array
    moments: optax.OptState
    count: jax.Array
    log: jax.Array
    stopped: jax.Array


def _optimise_share(params, plan: Plan, *, config: ModelConfig, layer: int, settings: AnchorConfig, sizes: Sizes, keep):
    """Two nested loops: the inner one makes steps until a lane is free and an edit waits for it; the outer one
    refills, which is when the lanes' inputs are copied."""
    lanes = sizes.lanes
    n, rounds = len(plan.real), len(plan.real) // lanes
    grouped = jax.tree.map(lambda x: jnp.asarray(x).reshape(rounds, lanes, *x.shape[1:]), plan)
    fixed = lax.map(lambda some: prepare(params, config, some, layer, settings, sizes), grouped)
    init, limits = (x.reshape(n, -1) for x in (fixed.init, fixed.limits))
    dtype, parts = init.dtype, limits.shape[-1]
    adam = optax.adam(settings.lr, *settings.betas)

    def begin(edit) -> _Lanes:
        delta = jnp.zeros((lanes, parts, config.d_model), dtype)
        log = jnp.full((lanes, settings.steps, 4), jnp.nan, dtype)
        count = jnp.zeros(lanes, jnp.int32)
        return _Lanes(edit, delta, jax.vmap(adam.init)(delta), count, log, ~jnp.asarray(plan.real)[edit])

    def step(now: _Lanes, here: Step) -> _Lanes:
        grad, terms = jax.grad(loss, has_aux=True)(now.delta, params, config, here, layer, settings, keep)
        active = ~now.stopped
        stop = now.stopped | (terms[:, 0] < settings.threshold) | (now.count == settings.steps - 1)
        change, moments = jax.vmap(adam.update)(grad, now.moments, now.delta)
        delta = now.delta + jnp.asarray(change)
        size, most = safe_norm(delta), limits[now.edit]
        delta = delta * jnp.where(size > most, most / jnp.where(size == 0, 1, size), 1)[..., None]
        at = jnp.arange(lanes), now.count
        log = now.log.at[at].set(jnp.where(active[:, None], terms, now.log[at]))
        delta, moments = _where(stop, (now.delta, now.moments), (delta, moments))
        return _Lanes(now.edit, delta, moments, now.count + ~stop, log, stop)

    def refill(carry):
        now, results, following, steps = carry
        free = now.stopped
        waiting = following + jnp.cumsum(free) - 1
        fresh = free & (waiting < n)
        now = _where(fresh, begin(jnp.where(fresh, waiting, now.edit)), now)
        following = following + jnp.sum(fresh)
        here = end_to_end(*_pick(fixed, grouped, now.edit, lanes), sizes)
        now, steps = lax.while_loop(
            lambda x: ~jnp.all(x[0].stopped) & ((following >= n) | ~jnp.any(x[0].stopped)),
            lambda x: (step(x[0], here), x[1] + 1),
            (now, steps),
        )
        results = jax.tree.map(lambda all, some: all.at[now.edit].set(some), results, (now.delta, now.count, now.log))
        return now, results, following, steps

    first = begin(jnp.arange(lanes))
    empty = (
        jnp.zeros((n, parts, config.d_model), dtype),
        jnp.zeros(n, jnp.int32),
        jnp.full((n, settings.steps, 4), jnp.nan, dtype),
    )
    _, results, _, steps = lax.while_loop(
        lambda carry: (carry[2] < n) | ~jnp.all(carry[0].stopped),
        refill,
        (first, empty, jnp.asarray(lanes), jnp.zeros((), jnp.int32)),
    )
    return init, *results, steps[None]


def _where(chosen, new, old):
    """Rows of `new` where `chosen`, of `old` elsewhere, in every array."""
    return jax.tree.map(lambda a, b: jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _pick(fixed: Fixed, grouped: Plan, edit, lanes: int) -> tuple[Fixed, Plan]:
    """What the lanes need: of the only group as it is, else copied from the groups ``[rounds, lanes, …]``."""
    if len(fixed.init) == 1:
        return jax.tree.map(lambda x: x[0], (fixed, grouped))
    group, member = edit // lanes, edit % lanes
    k, v = (jnp.moveaxis(x[group, :, member], 0, 1) for x in (fixed.k, fixed.v))
    rest = (replace(fixed, k=fixed.init, v=fixed.init), grouped)
    here, where = jax.tree.map(lambda x: x[group, member], rest)
    return replace(here, k=k, v=v), where
