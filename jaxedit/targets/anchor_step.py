"""The loss of an anchor: what no step changes, what a step runs, and the loss itself.

δ has one part for each vector that is optimised, ``[lanes, parts, d_model]`` (see `AnchorConfig.site`).
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxedit.config import AnchorConfig
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import (
    Context,
    Params,
    Past,
    Ragged,
    after_attention,
    after_mlp,
    embed,
    layer,
    mlp_output,
    run,
    unembed,
)
from jaxedit.targets.anchor_plan import Places, Plan, places
from jaxedit.targets.anchor_room import Sizes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """What does not depend on δ, of n edits.

    h: hidden states of the suffixes after the layer ``[n, rows, tail, d_model]``; k, v: of the tokens before them in
    the layers above ``[layers, n, rows, prefix, n_kv_head, head_dim]``. entry: where δ is added inside the layer, what
    enters it at the decisive tokens and what its attention adds, both ``[n, rows, d_model]``; else None. init:
    ``[n, d_model]`` what δ's first part is added to. sizes, limits: ``[n, parts]`` the norms that weight decay is
    relative to, and the largest ‖δ‖. base_log_probs: ``[n, vocab]`` what the KL row said before.
    """

    h: jax.Array
    k: jax.Array
    v: jax.Array
    entry: tuple[jax.Array, jax.Array] | None
    init: jax.Array
    sizes: jax.Array
    limits: jax.Array
    base_log_probs: jax.Array


def prepare(params: Params, config: ModelConfig, plan: Plan, index: int, settings: AnchorConfig, sizes: Sizes) -> Fixed:
    """Everything about some edits, whose anchors are in layer `index`, that no step changes."""
    lanes, rows, longest = plan.tokens.shape
    lengths, lookups, starts = (x.reshape(-1) for x in (plan.lengths, plan.lookups, plan.starts))
    context, at = _ragged(starts, lengths, sizes.packed, longest)
    tokens = plan.tokens.reshape(-1, longest)[at.owner, at.index][None]
    h_in = embed(params, config, tokens, context)
    attended = None
    if not settings.of_mlp:
        h = run(params, config, h_in, context, 0, index + 1)
    else:
        h_in = run(params, config, h_in, context, 0, index)
        h, (attended,) = run(params, config, h_in, context, index, index + 1, probe=lambda inside: inside.attended)

    def pick(h, where):
        """Hidden states ``[…, d_model]`` at places, zero where there are none."""
        return jnp.take(h[0], where, axis=0, mode="fill", fill_value=0)

    before, there = _ragged(starts, lookups, sizes.before, sizes.prefix)
    h_before = pick(h, at.slots[there.owner, there.index])[None]
    above = partial(run, params, config, start=index + 1, stop=config.n_layer)
    _, (k, v) = above(h_before, before, probe=lambda inside: (inside.k, inside.v))
    k, v = (x.reshape(len(x), lanes, rows, *x.shape[2:]) for x in (k, v))

    tail = jnp.minimum(lookups[:, None] + jnp.arange(sizes.tail), longest - 1)
    suffix = pick(h, jnp.take_along_axis(at.slots, tail, 1)).reshape(lanes, rows, sizes.tail, -1)
    seen = _rows(starts, lookups, sizes.prefix)
    seen = jax.tree.map(lambda x: x.reshape(lanes, rows, -1)[:, -1], seen)
    last = Context((plan.lookups + plan.starts)[:, -1:], jnp.ones_like(plan.lookups[:, -1:]))
    h_last = above(suffix[:, -1, :1], last, past=Past(k[:, :, -1], v[:, :, -1], seen))
    base = jax.nn.log_softmax(unembed(params, config, h_last)[:, 0])

    dtype = wide(h.dtype)
    block_out = suffix[:, 0, 0].astype(dtype)
    entry, inits, sized = None, [block_out], [block_out]
    if attended is not None:
        decisive = at.slots[jnp.arange(len(lookups)), lookups].reshape(lanes, rows)
        entry = pick(h_in, decisive), pick(attended, decisive)
        clean = tuple(x[:, 0] for x in entry)
        block = layer(params, index)
        mlp_out = mlp_output(block, after_attention(block, config, *clean)[1]).astype(dtype)
        inits = sized = [mlp_out]
        if settings.site == "attention_and_mlp":
            # A small MLP output would leave δ no room, so published code clamps that part by the block's output
            inits, sized = [mlp_out, clean[1].astype(dtype)], [block_out, clean[1].astype(dtype)]
    limits = settings.clamp * jnp.stack([safe_norm(x) for x in sized], -1)
    return Fixed(suffix, k, v, entry, inits[0], jnp.stack([safe_norm(x) for x in inits], -1), limits, base)


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
    ``[asks]``: tokens at which a target token is predicted, and which one; asked, in_context ``[lanes, most]``: each
    lane's asks, and the context that each of them is in. Indices are out of range where there is none. entry,
    sizes, base_log_probs: see `Fixed`. forget ``[lanes]``, or None where no edit forgets.
    """

    h: jax.Array
    context: Context
    past: Past
    entry: tuple[jax.Array, jax.Array] | None
    sizes: jax.Array
    base_log_probs: jax.Array
    lookups: jax.Array
    asks: jax.Array
    answers: jax.Array
    asked: jax.Array
    in_context: jax.Array
    real: jax.Array
    forget: jax.Array | None


def end_to_end(fixed: Fixed, plan: Plan, sizes: Sizes) -> Step:
    """Lay the suffixes of the lanes' edits end to end, and their asks."""
    lanes, rows, tail, _ = fixed.h.shape
    contexts = rows - 1
    lookups, starts = plan.lookups.reshape(-1), plan.starts.reshape(-1)
    counts = plan.lengths.reshape(-1) - lookups
    context, at = _ragged(starts + lookups, counts, sizes.tokens, tail)
    k, v = (x.reshape(len(x), lanes * rows, *x.shape[3:]) for x in (fixed.k, fixed.v))
    # The last tokens of a row predict its target, in every context
    most = plan.targets.shape[1] * contexts
    asked = places(plan.n_target * contexts, sizes.asks, most)
    targets = jnp.maximum(plan.n_target[asked.owner], 1)
    row, which = asked.owner * rows + asked.index // targets, asked.index % targets
    asks = at.slots[row, counts[row] - targets + which]
    nowhere = at.slots.size + sizes.tokens + jnp.arange(sizes.asks)
    return Step(
        h=fixed.h.reshape(lanes * rows, tail, -1)[at.owner, at.index][None],
        context=context,
        past=Past(k, v, _rows(starts, lookups, sizes.prefix)),
        entry=fixed.entry,
        sizes=fixed.sizes,
        base_log_probs=fixed.base_log_probs,
        lookups=at.slots[:, 0].reshape(lanes, rows),
        asks=jnp.where(asked.used, asks, nowhere),
        answers=plan.targets[asked.owner, which],
        asked=asked.slots,
        in_context=jnp.arange(most) // jnp.maximum(plan.n_target, 1)[:, None],
        real=plan.real,
        forget=plan.forget,
    )


def logits_at(delta, params, config: ModelConfig, step: Step, at, index: int, keep=None):
    """Logits ``[q, vocab]`` at the tokens `at`, all different, with ``delta [lanes, parts, d_model]`` added."""
    rows = (*step.lookups.shape, delta.shape[-1])
    parts = [jnp.broadcast_to(delta[:, i, None].astype(step.h.dtype), rows) for i in range(delta.shape[1])]
    here = step.h.at[0, step.lookups]
    if step.entry is None:
        h = here.add(parts[0], mode="drop", unique_indices=True)
    else:
        block, (h_in, attended) = layer(params, index), step.entry
        stream, key = after_attention(block, config, h_in, attended + parts[1] if len(parts) > 1 else attended)
        changed = after_mlp(block, config, stream, mlp_output(block, key) + parts[0])
        h = here.set(changed, mode="drop", unique_indices=True)
    h = run(params, config, h, step.context, index + 1, config.n_layer, past=step.past, keep=keep)
    picked = jnp.take(h[0], at, axis=0, mode="fill", fill_value=0, unique_indices=True)
    return unembed(params, config, picked)


def safe_norm(x):
    """‖x‖ over the last axis, with gradient 0 at 0."""
    square = jnp.sum(x * x, -1)
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def loss(delta, params, config: ModelConfig, step: Step, index: int, settings: AnchorConfig, keep):
    """Sum over lanes of the loss, and its terms ``[lanes, 4]``."""
    n = len(step.asks)
    logits = logits_at(delta, params, config, step, jnp.concatenate([step.asks, step.lookups[:, -1]]), index, keep)
    log_sums = jax.nn.logsumexp(logits, -1)
    chosen = logits[jnp.arange(n), step.answers] - log_sums[:n]
    own = jnp.take(chosen, step.asked, mode="fill", fill_value=0, unique_indices=True)
    nll = -jnp.sum(own, -1) / jnp.maximum(jnp.sum(step.asked < n, -1), 1)
    if step.forget is not None:
        nll = jnp.where(step.forget, _unlikelihood(own, step), nll)
    now = logits[n:] - log_sums[n:, None]
    kl = settings.kl_weight * jnp.sum(jnp.exp(now) * (now - step.base_log_probs), -1)
    decay = settings.weight_decay * jnp.sum(safe_norm(delta) / step.sizes**2, -1)
    total = nll + kl + decay
    return jnp.sum(jnp.where(step.real, total, 0)), jnp.stack([total, nll, kl, decay], -1)


def _unlikelihood(own, step: Step):
    """``-log(1 - p)`` of the whole target, mean over contexts ``[lanes]``, from log-probabilities of its tokens."""
    contexts = step.lookups.shape[1] - 1
    member = (step.in_context[..., None] == jnp.arange(contexts)).astype(own.dtype)
    log_p = jnp.einsum("lm,lmc->lc", own, member)
    # A probability of one has an infinite loss with no use for a gradient
    return jnp.mean(-jnp.log(-jnp.expm1(jnp.minimum(log_p, -1e-6))), -1)
