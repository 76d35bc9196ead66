"""Anchors: the hidden state at the decisive token that makes the model say the target.

For each edit a vector δ is added to the output of one layer at the decisive token of every row, and Adam minimises

    nll + kl_weight · KL(edited ‖ base at "{subject} is a") + weight_decay · ‖δ‖ / ‖h‖²,

with ‖δ‖ clamped to a multiple of ‖h‖ (Meng et al. 2023, `compute_z`). The loss is tested before each update, so n
steps are at most n - 1 updates.

Nothing at or below the layer, and no token before the decisive one, depends on δ: their hidden states, keys and
values are computed once. The optimiser runs only the suffix tokens through the layers above, those of all edits end
to end without padding, and takes logits only where a target token is predicted. All edits of a bucket share one
compiled loop on the device; an edit that has converged is frozen and its lane goes to the next one.
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
from jaxedit.data.tokens import EditTokens, round_up
from jaxedit.memory import USABLE, anchor_cost, free_bytes, lanes_that_fit, tokens_per_step
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import Context, Params, Past, Ragged, embed, run, unembed
from jaxedit.sharding import data_shards, mesh_of, over_data, place_rows
from jaxedit.targets.anchor_plan import (
    Places,
    Plan,
    Shape,
    buckets,
    make_plan,
    n_asks,
    places,
    rows_of,
    shape_of,
    suffix_tokens,
)


class Anchors(NamedTuple):
    """Anchors of n edits at one layer.

    value, init: ``[n, d_model]``, the anchor and the unedited hidden state it started from; updates: ``[n]``
    Adam updates made; losses: ``[n, steps, 4]`` total, nll, weighted KL and weighted decay before each update,
    NaN after the last; padding: tokens run in all steps over those of edits that were being optimised.
    """

    value: np.ndarray
    init: np.ndarray
    updates: np.ndarray
    losses: np.ndarray
    padding: float

    @property
    def final_loss(self) -> np.ndarray:
        return self.losses[np.arange(len(self.updates)), self.updates, 0]


_CPU_TOKENS, _ACCELERATOR_TOKENS = 640, 16384  # suffix tokens a step beyond which products get hardly faster
# What of a layer is kept for the backward pass, from most memory and least work to least memory and most work
KEPT = (("q", "k", "v", "o", "gate", "up"), ("q", "k", "v", "o", "gate"), ("q", "k", "v", "o"), ())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Fixed:
    """What does not depend on δ, of some edits: hidden states of the suffixes ``[n, rows, tail, d_model]``, keys and
    values of the tokens before them in the layers above ``[layers, n, rows, prefix, n_kv_head, head_dim]``, the
    state that δ is added to, and what the KL row said before."""

    h: jax.Array
    k: jax.Array
    v: jax.Array
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
    dtype = np.dtype(wide(params["embed"]["tokens"].dtype))
    n = len(edits)
    value, init = (np.zeros((n, config.d_model), dtype) for _ in range(2))
    updates, losses = np.zeros(n, np.int32), np.full((n, settings.steps, 4), np.nan, dtype)
    spent = needed = 0
    for bucket in arrange(params, config, edits, layer, settings):
        resident = bucket.held * data_shards(mesh)
        # Shard k takes edits k, k + shards, … so that each begins with its largest
        order = np.arange(resident).reshape(bucket.held, -1).T.reshape(-1)
        for at in range(0, len(bucket.members), resident):
            chosen = bucket.members[at : at + resident]
            plan = make_plan([edits[i] for i in chosen], bucket.shape, resident)
            plan = place_rows(jax.tree.map(partial(np.take, indices=order, axis=0), plan), mesh)
            sizes, keep = bucket.sizes, bucket.keep
            found = _optimise(
                params, plan, config=config, layer=layer, settings=settings, sizes=sizes, keep=keep, mesh=mesh
            )
            back = np.argsort(order)[: len(chosen)]
            start, delta, count, log, steps = (np.asarray(x) for x in found)
            start, delta, count, log = (x[back] for x in (start, delta, count, log))
            value[chosen], init[chosen], updates[chosen], losses[chosen] = start + delta, start, count, log
            spent += bucket.sizes.tokens * int(steps.sum())
            needed += sum(suffix_tokens(edits[i]) * (int(updates[i]) + 1) for i in chosen)
            if on_progress is not None:
                on_progress(len(chosen))
    return Anchors(value, init, updates, losses, spent / needed)


class Sizes(NamedTuple):
    """What a program is compiled for, on each shard: edits optimised together, suffix tokens and asks of a step,
    tokens of so many edits and those before the decisive ones, and the longest prefix and suffix of a row."""

    lanes: int
    tokens: int
    asks: int
    packed: int
    before: int
    prefix: int
    tail: int


class Bucket(NamedTuple):
    """Edits that one program optimises: `members` of them, largest first, of which at most `held` are on the device
    (a shard each); keep: see `run`."""

    members: list[int]
    shape: Shape
    sizes: Sizes
    held: int
    keep: tuple[str, ...]


def arrange(
    params: Params, config: ModelConfig, edits: Sequence[EditTokens], layer: int, settings: AnchorConfig
) -> list[Bucket]:
    """The programs that `find_anchors` runs, by what the device has room for."""
    shards = data_shards(mesh_of(params))
    sizes = [suffix_tokens(e) for e in edits]
    free = free_bytes(next(iter(params["embed"]["tokens"].devices())))
    wanted = settings.tokens_per_step or (_CPU_TOKENS if free is None else _ACCELERATOR_TOKENS)
    made = []
    for members in buckets(sizes, settings.bucket_growth, wanted * shards):
        some = [edits[i] for i in members]
        share = [sizes[i] for i in members[::shards]]
        most = max(1, int(np.searchsorted(np.cumsum(share), wanted, side="right")))
        shape = shape_of(some)
        lanes, held, keep = _room(params, config, layer, shape, settings, len(share), most, free)

        def most_of(count, some=some, lanes=lanes) -> int:
            return sum(sorted(map(count, some))[-lanes:])

        step = Sizes(
            lanes=lanes,
            tokens=round_up(sum(share[:lanes]), 8),
            asks=most_of(n_asks),
            packed=most_of(lambda e: sum(len(r.tokens) for r in rows_of(e))),
            before=max(1, most_of(lambda e: sum(r.lookup for r in rows_of(e)))),
            prefix=shape.prefix,
            tail=shape.tail,
        )
        made.append(Bucket(members, shape, step, held, keep))
    return made


def _room(params, config: ModelConfig, layer: int, shape: Shape, settings: AnchorConfig, share: int, most: int, free):
    """How many of `share` edits to optimise together, at most `most`, how many to hold, and what to keep of a layer.

    As many as memory allows, and then as little work done twice as it allows.
    """
    dtype, keep = params["embed"]["tokens"].dtype, KEPT[0]
    costs = [anchor_cost(config, dtype, layer, shape, keep) for keep in KEPT]
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


@partial(jax.jit, static_argnames=("config", "layer", "settings", "sizes", "keep", "mesh"))
def _optimise(params, plan: Plan, *, config: ModelConfig, layer: int, settings, sizes: Sizes, keep, mesh: Mesh | None):
    """Adam on all edits of `plan`; the whole loop runs on the device.

    Returns ``(init [n, d_model], delta [n, d_model], updates [n], losses [n, steps, 4], steps of each shard)``.
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
    fixed = lax.map(lambda some: _prepare(params, config, some, layer, sizes), grouped)
    init = fixed.init.reshape(n, -1)
    dtype = init.dtype
    adam = optax.adam(settings.lr)
    limit = settings.clamp * safe_norm(init)

    def begin(edit) -> _Lanes:
        delta = jnp.zeros((lanes, config.d_model), dtype)
        log = jnp.full((lanes, settings.steps, 4), jnp.nan, dtype)
        count = jnp.zeros(lanes, jnp.int32)
        return _Lanes(edit, delta, jax.vmap(adam.init)(delta), count, log, ~jnp.asarray(plan.real)[edit])

    def step(now: _Lanes, here: Step) -> _Lanes:
        grad, terms = jax.grad(loss, has_aux=True)(now.delta, params, config, here, layer, settings, keep)
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
        now, results, following, steps = carry
        free = now.stopped
        waiting = following + jnp.cumsum(free) - 1
        fresh = free & (waiting < n)
        now = _where(fresh, begin(jnp.where(fresh, waiting, now.edit)), now)
        following = following + jnp.sum(fresh)
        here = _end_to_end(*_pick(fixed, grouped, now.edit, lanes), sizes)
        now, steps = lax.while_loop(
            lambda x: ~jnp.all(x[0].stopped) & ((following >= n) | ~jnp.any(x[0].stopped)),
            lambda x: (step(x[0], here), x[1] + 1),
            (now, steps),
        )
        results = jax.tree.map(lambda all, some: all.at[now.edit].set(some), results, (now.delta, now.count, now.log))
        return now, results, following, steps

    first = begin(jnp.arange(lanes))
    empty = (
        jnp.zeros((n, config.d_model), dtype), jnp.zeros(n, jnp.int32), jnp.full((n, settings.steps, 4), jnp.nan, dtype)
    )  # fmt: skip
    _, results, _, steps = lax.while_loop(
        lambda carry: (carry[2] < n) | ~jnp.all(carry[0].stopped),
        refill,
        (first, empty, jnp.asarray(lanes), jnp.zeros((), jnp.int32)),
    )
    return init, *results, steps[None]


def _where(chosen, new, old):
    """Rows of `new` where `chosen`, of `old` elsewhere, in every array."""
    return jax.tree.map(lambda a, b: jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _pick(fixed: _Fixed, grouped: Plan, edit, lanes: int) -> tuple[_Fixed, Plan]:
    """What the lanes need: of the only group as it is, else copied from the groups ``[rounds, lanes, …]``."""
    if len(fixed.init) == 1:
        return jax.tree.map(lambda x: x[0], (fixed, grouped))
    group, member = edit // lanes, edit % lanes
    k, v = (jnp.moveaxis(x[group, :, member], 0, 1) for x in (fixed.k, fixed.v))
    rest = (dataclasses.replace(fixed, k=fixed.init, v=fixed.init), grouped)
    here, where = jax.tree.map(lambda x: x[group, member], rest)
    return dataclasses.replace(here, k=k, v=v), where


def _prepare(params, config: ModelConfig, plan: Plan, layer: int, sizes: Sizes) -> _Fixed:
    """Everything about some edits that no step changes."""
    lanes, rows, longest = plan.tokens.shape
    lengths, lookups = plan.lengths.reshape(-1), plan.lookups.reshape(-1)
    context, at = _ragged(jnp.zeros_like(lookups), lengths, sizes.packed, longest)
    tokens = plan.tokens.reshape(-1, longest)[at.owner, at.index][None]
    h = run(params, config, embed(params, config, tokens, context), context, 0, layer + 1)

    def pick(index):
        """Hidden states ``[…, d_model]`` at places, zero where there are none."""
        return jnp.take(h[0], index, axis=0, mode="fill", fill_value=0)

    before, there = _ragged(jnp.zeros_like(lookups), lookups, sizes.before, sizes.prefix)
    h_before = pick(at.slots[there.owner, there.index])[None]
    above = partial(run, params, config, start=layer + 1, stop=config.n_layer)
    _, (k, v) = above(h_before, before, probe=lambda inside: (inside.k, inside.v))
    k, v = (x.reshape(len(x), lanes, rows, *x.shape[2:]) for x in (k, v))

    tail = jnp.minimum(lookups[:, None] + jnp.arange(sizes.tail), longest - 1)
    suffix = pick(jnp.take_along_axis(at.slots, tail, 1)).reshape(lanes, rows, sizes.tail, -1)
    seen = _rows(jnp.zeros_like(lookups), lookups, sizes.prefix)
    seen = jax.tree.map(lambda x: x.reshape(lanes, rows, -1)[:, -1], seen)
    last = Context(plan.lookups[:, -1:], jnp.ones_like(plan.lookups[:, -1:]))
    h_last = above(suffix[:, -1, :1], last, past=Past(k[:, :, -1], v[:, :, -1], seen))
    base = jax.nn.log_softmax(unembed(params, config, h_last)[:, 0])
    return _Fixed(suffix, k, v, suffix[:, 0, 0].astype(wide(h.dtype)), base)


def _rows(start, counts, longest: int) -> Context:
    """Rows of `counts` tokens, padded to the longest; the first token stands at position `start`."""
    item = jnp.arange(longest)
    return Context(start[:, None] + item, (item < counts[:, None]).astype(jnp.int32))


def _ragged(start, counts, length: int, longest: int) -> tuple[Context, Places]:
    """The same rows end to end in `length` places."""
    at = places(counts, length, longest)
    context = Context((start[at.owner] + at.index)[None], at.used.astype(jnp.int32)[None])
    return dataclasses.replace(context, ragged=Ragged(at.slots, at.back, _rows(start, counts, longest))), at


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """What the loss of the edits in the lanes is made of; their suffix tokens, and their asks, lie end to end.

    h ``[1, tokens, d_model]``; lookups ``[lanes, rows]``: tokens that δ is added to, the KL row's last; asks, answers
    ``[asks]``: tokens at which a target token is predicted, and which one; asked ``[lanes, most]``: each lane's asks.
    Indices are out of range where there is none.
    """

    h: jax.Array
    context: Context
    past: Past
    init: jax.Array
    base_log_probs: jax.Array
    lookups: jax.Array
    asks: jax.Array
    answers: jax.Array
    asked: jax.Array
    real: jax.Array


def _end_to_end(fixed: _Fixed, plan: Plan, sizes: Sizes) -> Step:
    """Lay the suffixes of the lanes' edits end to end, and their asks."""
    lanes, rows, tail, _ = fixed.h.shape
    contexts = rows - 1
    lookups = plan.lookups.reshape(-1)
    counts = plan.lengths.reshape(-1) - lookups
    context, at = _ragged(lookups, counts, sizes.tokens, tail)
    k, v = (x.reshape(len(x), lanes * rows, *x.shape[3:]) for x in (fixed.k, fixed.v))
    # The last tokens of a row predict its target, in every context
    asked = places(plan.n_target * contexts, sizes.asks, plan.targets.shape[1] * contexts)
    targets = jnp.maximum(plan.n_target[asked.owner], 1)
    row, which = asked.owner * rows + asked.index // targets, asked.index % targets
    asks = at.slots[row, counts[row] - targets + which]
    nowhere = at.slots.size + sizes.tokens + jnp.arange(sizes.asks)
    return Step(
        h=fixed.h.reshape(lanes * rows, tail, -1)[at.owner, at.index][None],
        context=context,
        past=Past(k, v, _rows(jnp.zeros_like(lookups), lookups, sizes.prefix)),
        init=fixed.init,
        base_log_probs=fixed.base_log_probs,
        lookups=at.slots[:, 0].reshape(lanes, rows),
        asks=jnp.where(asked.used, asks, nowhere),
        answers=plan.targets[asked.owner, which],
        asked=asked.slots,
        real=plan.real,
    )


def logits_at(delta, params, config: ModelConfig, step: Step, at, layer: int, keep=None):
    """Logits ``[q, vocab]`` at the tokens `at`, all different, with ``delta [lanes, d_model]`` added."""
    added = jnp.broadcast_to(delta[:, None].astype(step.h.dtype), (*step.lookups.shape, delta.shape[-1]))
    h = step.h.at[0, step.lookups].add(added, mode="drop", unique_indices=True)
    h = run(params, config, h, step.context, layer + 1, config.n_layer, past=step.past, keep=keep)
    picked = jnp.take(h[0], at, axis=0, mode="fill", fill_value=0, unique_indices=True)
    return unembed(params, config, picked)


def safe_norm(x):
    """‖x‖ over the last axis, with gradient 0 at 0."""
    square = jnp.sum(x * x, -1)
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def loss(delta, params, config: ModelConfig, step: Step, layer: int, settings: AnchorConfig, keep):
    """Sum over lanes of the loss, and its terms ``[lanes, 4]``."""
    n = len(step.asks)
    logits = logits_at(delta, params, config, step, jnp.concatenate([step.asks, step.lookups[:, -1]]), layer, keep)
    log_sums = jax.nn.logsumexp(logits, -1)
    chosen = logits[jnp.arange(n), step.answers] - log_sums[:n]
    own = jnp.take(chosen, step.asked, mode="fill", fill_value=0, unique_indices=True)
    nll = -jnp.sum(own, -1) / jnp.maximum(jnp.sum(step.asked < n, -1), 1)
    now = logits[n:] - log_sums[n:, None]
    kl = settings.kl_weight * jnp.sum(jnp.exp(now) * (now - step.base_log_probs), -1)
    decay = settings.weight_decay * safe_norm(delta) / jnp.sum(step.init**2, -1)
    total = nll + kl + decay
    return jnp.sum(jnp.where(step.real, total, 0)), jnp.stack([total, nll, kl, decay], -1)
