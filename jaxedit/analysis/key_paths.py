"""How what an edit adds to values gets to the logits: the compiled part of `jaxedit.analysis.key_bounds`.

Rows are prompts padded on the right, ``tokens`` and ``mask`` ``[b, s]``; answers are asked for at their last token. Of
a row the gap is the logit of the new target minus that of the old one.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import linear, norm, wide
from jaxedit.models.transformer import (
    Context,
    Params,
    after_attention,
    after_mlp,
    attention,
    attention_added,
    embed,
    from_key,
    layer,
    mlp_added,
    mlp_output,
    run,
    to_key,
    window_of,
)

_EXACT = lax.Precision.HIGHEST


@partial(jax.jit, static_argnames=("config", "layers"))
def strongest(params: Params, config: ModelConfig, tokens, mask, columns, layers: tuple[int, ...]):
    """``α = kᵀx`` at the token of each row where its mean over layers is largest.

    columns ``[layers, b, d_ff]``: x of each row. Returns α ``[layers, b]`` and the token's index ``[b]``.
    """
    context, weights, at = Context.of_mask(mask), [], 0
    h = embed(params, config, tokens, context)
    for l, column in zip(layers, columns, strict=True):
        h = run(params, config, h, context, at, l)
        stream, key, _, _ = to_key(layer(params, l), config, h, context, window_of(config, l))
        h, at = from_key(layer(params, l), config, stream, key), l + 1
        weights.append(jnp.einsum("bsf,bf->bs", key.astype(column.dtype), column, precision=_EXACT))
    weights = jnp.stack(weights)
    best = jnp.where(mask > 0, weights.mean(0), -jnp.inf).argmax(-1)
    return jnp.take_along_axis(weights, best[None, :, None], 2)[..., 0], best


class Answers(NamedTuple):
    """Per row ``[b]``, float32 (float64): the gap before and after an edit, and of its change what goes by the direct
    path, the derivative, and the bound on the direct path's part of one token."""

    before: jax.Array
    after: jax.Array
    direct: jax.Array
    linear: jax.Array
    ceiling: jax.Array


@partial(jax.jit, static_argnames=("config", "layers"))
def answers(params: Params, config: ModelConfig, tokens, mask, pairs, at, deltas, layers: tuple[int, ...]) -> Answers:
    """The gaps of rows in a model and in its edited version.

    pairs ``[b, 2]``: first tokens of the new and the old target; at ``[b]``: the token whose bound is asked for;
    deltas: of the edited `layers`, ``(left, right)`` with ``ΔW = left @ right``, or ``(ΔW, None)``.
    """
    context = Context.of_mask(mask)
    where = jnp.arange(len(tokens)), mask.sum(-1) - 1
    first, top = layers[0], layers[-1]
    entered = run(params, config, embed(params, config, tokens, context), context, 0, first)
    added = dict(zip(layers, deltas, strict=True))

    def stretch(step):
        """The gaps with `step` times the edit."""
        h = entered
        for l in range(first, top + 1):
            p = layer(params, l)
            stream, key, _, _ = to_key(p, config, h, context, window_of(config, l))
            out = mlp_output(p, key)
            if l in added:
                out = out + (step * _times(key, added[l])).astype(out.dtype)
            h = after_mlp(p, config, stream, out)
        return _gap(params, config, run(params, config, h, context, top + 1, config.n_layer)[where], pairs)

    one = jnp.ones((), wide(entered.dtype))
    before, derivative = jax.jvp(stretch, (0 * one,), (one,))
    values = tuple(jnp.zeros_like(entered) for _ in layers)
    (_, changes), gradients = jax.value_and_grad(
        lambda v: _direct(params, config, entered, context, where, pairs, v, added), has_aux=True
    )(values)
    pairwise = [(g.astype(one.dtype), c.astype(one.dtype)) for g, c in zip(gradients, changes, strict=True)]
    direct = sum(jnp.sum(g * c, (1, 2)) for g, c in pairwise)
    row = jnp.arange(len(tokens)), at
    ceiling = sum(jnp.linalg.norm(g[row], axis=-1) * jnp.linalg.norm(c[row], axis=-1) for g, c in pairwise)
    return Answers(before, stretch(one), jnp.asarray(direct), derivative, jnp.asarray(ceiling))


def _times(key, delta):
    left, right = delta
    out = jnp.matmul(key.astype(left.dtype), left, precision=_EXACT)
    return out if right is None else jnp.matmul(out, right, precision=_EXACT)


def _gap(params: Params, config: ModelConfig, h, pairs):
    """Logit of the first token of each pair minus that of the second, ``[b]``, for hidden states ``[b, d_model]``."""
    x = norm(h, params["final_norm"], config)
    w = (params["embed"]["tokens"] if config.tied else params["unembed"]["w"])[pairs]
    y = jnp.einsum("bd,btd->bt", x.astype(wide(x.dtype)), w.astype(wide(x.dtype)), precision=_EXACT)
    if config.unembed_bias:
        y = y + params["unembed"]["b"][pairs].astype(y.dtype)
    if config.final_softcap is not None:
        y = config.final_softcap * jnp.tanh(y / config.final_softcap)
    return y[:, 0] - y[:, 1]


def _direct(params: Params, config: ModelConfig, h, context: Context, where, pairs, values, added):
    """The sum of all rows' gaps as a function of what is added to the values of the edited layers, if that goes to the
    logits by way of at most one attention layer, whose weights stay as they are, and of no MLP.

    values: per edited layer ``[b, s, d_model]``, zeros: it is the gradient that is wanted. Also returns what the edit
    adds to these values, at the base model's keys.
    """
    first, top = min(added), max(added)
    values, changes = iter(values), []

    def attend(p, window, h, said):
        """What attention adds to the stream; of what was `said` to it by the values only its own values know."""
        told = norm(h + said, p["attn_norm"], config) - norm(h, p["attn_norm"], config)
        bias = p["v"].get("b", 0) + linear(told, {"w": p["v"]["w"]})  # one for each token
        attended, _, _ = attention({**p, "v": {**p["v"], "b": bias}}, config, h, context, window)
        part = attention_added(p, config, attended)[where]
        return lax.stop_gradient(attended), part - lax.stop_gradient(part)

    said, heard = jnp.zeros_like(h), jnp.zeros_like(h[where])
    for l in range(first, top + 1):
        p = layer(params, l)
        attended, more = attend(p, window_of(config, l), h, said)
        stream, key = after_attention(p, config, h, attended)
        heard, out = heard + more, mlp_output(p, key)
        if l in added:
            changes.append(_times(key, added[l]))
            spoken = mlp_added(p, config, out + next(values))
            said = said + spoken - lax.stop_gradient(spoken)
        h = after_mlp(p, config, stream, out)

    def block(carry, index):
        h, heard = carry
        p = layer(params, index)
        attended, more = attend(p, window_of(config, index), h, said)
        stream, key = after_attention(p, config, h, attended)
        return (from_key(p, config, stream, key), heard + more), None

    (h, heard), _ = lax.scan(block, (h, heard), jnp.arange(top + 1, config.n_layer))
    return _gap(params, config, h[where] + heard + said[where], pairs).sum(), tuple(changes)
