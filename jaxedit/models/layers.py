"""Norms, activations, rotary embedding and attention: the parts every family shares.

Norms, softmax and rotary angles are computed in float32, or float64 where the model is float64.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxedit.models.config import ModelConfig, Rope

_QUERIES = 128  # in a block of queries


def wide(dtype) -> jnp.dtype:
    """The dtype in which sums over `dtype` values are kept: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def linear(x, p):
    """``x @ w (+ b)``, accumulated in float32 (float64), returned in the dtype of x.

    A matrix wider than x keeps its precision: edited matrices are float32 while the rest may be bfloat16.
    """
    dtype = jnp.promote_types(x.dtype, p["w"].dtype)
    if dtype.itemsize == 2:
        # Products of 16-bit numbers are summed in float32 anyway. Asking for a float32 result would make the
        # gradient's products float32 ones, with a float32 copy of the weights
        y = jnp.matmul(x, p["w"])
        return y + p["b"] if "b" in p else y
    y = jnp.matmul(x.astype(dtype), p["w"].astype(dtype), preferred_element_type=wide(dtype))
    if "b" in p:
        y = y + p["b"]
    return y.astype(x.dtype)


@jax.custom_vjp
def vocabulary_product(x, w):
    """``x [..., d] @ w [v, d]ᵀ`` of 16-bit numbers, in float32; the gradient's products are 16-bit ones again.

    So there is no forward-mode derivative of it.
    """
    return jnp.einsum("...d,vd->...v", x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def _vocabulary_forward(x, w):
    return vocabulary_product(x, w), (x, w)


def _vocabulary_backward(kept, cotangent):
    x, w = kept
    narrow = cotangent.astype(w.dtype)
    dw = jnp.einsum("...v,...d->vd", narrow, x.astype(w.dtype))
    return jnp.einsum("...v,vd->...d", narrow, w).astype(x.dtype), dw


vocabulary_product.defvjp(_vocabulary_forward, _vocabulary_backward)


@jax.custom_vjp
def permute(x, order, inverse):
    """``x[order]`` along the first axis, zeros where `order` is out of range.

    `inverse` is the permutation back, by which the gradient is gathered: a scatter would be slow on a CPU and in no
    fixed order on a GPU. So there is no forward-mode derivative of it.
    """
    return jnp.take(x, order, axis=0, mode="fill", fill_value=0)


def _permute_forward(x, order, inverse):
    return permute(x, order, inverse), (order, inverse)


def _permute_backward(kept, cotangent):
    order, inverse = kept
    return permute(cotangent, inverse, order), None, None


permute.defvjp(_permute_forward, _permute_backward)


def norm(x, p, config: ModelConfig):
    """LayerNorm or RMSNorm over the last axis."""
    y = x.astype(wide(x.dtype))
    if config.norm == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + config.norm_eps)
    scale = p["scale"].astype(y.dtype)
    y = y * (scale + 1.0 if config.norm == "rms_plus_one" else scale)
    if config.norm == "layer":
        y = y + p["bias"].astype(y.dtype)
    return y.astype(x.dtype)


def activation(x, kind: str):
    y = x.astype(wide(x.dtype))
    match kind:
        case "silu":
            y = jax.nn.silu(y)
        case "gelu":
            y = jax.nn.gelu(y, approximate=False)
        case "gelu_tanh":
            y = jax.nn.gelu(y, approximate=True)
        case "relu":
            y = jax.nn.relu(y)
        case _:
            raise ValueError(f"unknown activation {kind!r}")
    return y.astype(x.dtype)


def rope_frequencies(rope: Rope, dtype) -> np.ndarray:
    """Inverse frequencies ``[dim / 2]``, computed in `dtype` as the published models do."""
    exponent = np.arange(0, rope.dim, 2, dtype=dtype) / np.asarray(rope.dim, dtype)
    freq = np.asarray(1.0, dtype) / np.asarray(rope.theta, dtype) ** exponent
    if rope.scaling == "linear":
        freq = freq / np.asarray(rope.factor, dtype)
    elif rope.scaling == "llama3":
        turns = rope.original_max_positions * freq / np.asarray(2 * math.pi, dtype)
        span = rope.high_freq_factor - rope.low_freq_factor
        smooth = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
        freq = (1 - smooth) * freq / rope.factor + smooth * freq
    return freq.astype(dtype)


def rotary(x, positions, rope: Rope):
    """Rotate the first `rope.dim` channels of ``x [b, s, heads, head_dim]`` by ``positions [b, s]``."""
    dtype = wide(x.dtype)
    freq = jnp.asarray(rope_frequencies(rope, dtype))
    angle = positions[..., None].astype(dtype) * freq
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    turned, rest = x[..., : rope.dim].astype(dtype), x[..., rope.dim :]
    if rope.pairing == "half":
        a, b = jnp.split(turned, 2, -1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(turned.shape)
    return jnp.concatenate([turned.astype(x.dtype), rest], -1)


def visible(q_positions, q_segments, k_positions, k_segments, window):
    """Boolean ``[b, s, t]``: key t may be seen from query s.

    Same segment, not later, and within `window` tokens (0 or None: unlimited). Everything about padding,
    packing, caches and windows is in these two integers a token, so there is one rule.
    """
    gap = q_positions[:, :, None] - k_positions[:, None, :]
    seen = (q_segments[:, :, None] == k_segments[:, None, :]) & (gap >= 0)
    if window is not None:
        seen &= (window == 0) | (gap < window)
    return seen


def attend(q, k, v, mask, config: ModelConfig, past=None):
    """Grouped-query attention.

    q ``[b, s, n_head, head_dim]``; k, v ``[b, s, n_kv_head, head_dim]``; mask ``[b, s, s]``;
    past: None, or (k, v, mask) of tokens computed earlier, ``[b, t, …]`` and ``[b, s, t]``. The two parts share
    one softmax, and the cache is never copied. No token may see one that stands after it in its row: of long rows
    each block of queries meets only the keys up to its end.
    """
    s = q.shape[1]
    if past is None and s >= 2 * _QUERIES:
        ends = [min(at + _QUERIES, s) for at in range(0, s, _QUERIES)]
        parts = [
            _attend(q[:, at:end], [(k[:, :end], v[:, :end], mask[:, at:end, :end])], config)
            for at, end in zip([0, *ends], ends, strict=False)
        ]
        return jnp.concatenate(parts, 1)
    return _attend(q, [(k, v, mask)] if past is None else [past, (k, v, mask)], config)


def _attend(q, parts, config: ModelConfig):
    """Attention to ``(k, v, mask)`` of several stretches of tokens."""
    b, s, n_head, head_dim = q.shape
    n_kv = parts[0][0].shape[2]
    dtype = wide(q.dtype)
    q = q.reshape(b, s, n_kv, n_head // n_kv, head_dim)

    def scores(k, mask):
        logits = jnp.einsum("bskgh,btkh->bkgst", q, k, preferred_element_type=dtype) * config.attn_scale
        if config.attn_softcap is not None:
            logits = config.attn_softcap * jnp.tanh(logits / config.attn_softcap)
        return jnp.where(mask[:, None, None], logits, jnp.finfo(dtype).min)

    weights = jax.nn.softmax(jnp.concatenate([scores(k, m) for k, _, m in parts], -1), -1).astype(q.dtype)
    sizes = [v.shape[1] for _, v, _ in parts]
    split = zip(jnp.split(weights, np.cumsum(sizes)[:-1], -1), parts, strict=True)
    out = sum(jnp.einsum("bkgst,btkh->bskgh", w, value, preferred_element_type=dtype) for w, (_, value, _) in split)
    return jnp.asarray(out).astype(q.dtype).reshape(b, s, n_head * head_dim)
