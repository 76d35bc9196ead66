"""One decoder for every family, as pure functions over a parameter tree.

A model is a composition of layer functions, so an intervention is function composition: run the layers below,
change the hidden state, run the layers above. `embed`, `run` and `unembed` are the three pieces; `run` takes any
stretch of layers. Nothing is hooked or sown: what a caller wants to see inside a layer it asks for with `probe`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import activation, attend, linear, norm, permute, rotary, visible, vocabulary_product, wide
from jaxedit.models.sites import Desk, Seen, take_digits

Params = dict[str, Any]


class Decoder(nnx.Module):
    """A decoder-only language model: a static `config`, the weights, and the config.json it came with.

    The functions of this module take ``model.params``, a plain nested dict, because dispatching a jitted call on
    it is several times cheaper than on the module.
    """

    def __init__(self, config: ModelConfig, params: Params, hf_config: str = "{}"):
        self.config = config
        self.hf_config = hf_config
        self.weights = nnx.data(jax.tree.map(nnx.Param, params))

    @property
    def params(self) -> Params:
        """The weights as a nested dict of arrays (no copy)."""
        return jax.tree.map(lambda p: p[...], self.weights, is_leaf=lambda p: isinstance(p, nnx.Param))

    @property
    def dtype(self):
        return self.weights["embed"]["tokens"].dtype

    def with_params(self, params: Params) -> Decoder:
        """The same architecture with other weights; this model stays as it is."""
        return Decoder(self.config, params, self.hf_config)

    def __call__(self, tokens, mask=None):
        return logits(self, tokens, mask)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Where each token stands: `positions` and `segments`, int32 ``[b, s]``.

    Tokens see earlier tokens of their own segment. Segment 0 is padding; documents packed into one row have
    segments 1, 2, … and positions that start again.
    ends: int32 ``[b, s]``, for adapters: where in the row the prompt of each token ends, negative where it did so
    before this row. None: every token counts as the last of its prompt.
    """

    positions: jax.Array
    segments: jax.Array
    ragged: Ragged | None = None
    ends: jax.Array | None = None

    @classmethod
    def of_mask(cls, mask) -> Context:
        """Right- or left-padded rows: `mask` is 1 at real tokens. Positions count real tokens from 0."""
        mask = jnp.asarray(mask, jnp.int32)
        return cls(jnp.maximum(jnp.cumsum(mask, -1) - 1, 0), mask)

    def ending(self, ends) -> Context:
        """The same rows; the prompt of row i ends at ``ends [b]``, or at each token's ``ends [b, s]``."""
        ends = jnp.asarray(ends, jnp.int32)
        ends = ends[:, None] if ends.ndim == 1 else ends
        return dataclasses.replace(self, ends=jnp.broadcast_to(ends, self.segments.shape))

    def as_prompts(self) -> Context:
        """The same rows, each a prompt that ends at its last token."""
        places = jnp.arange(self.segments.shape[1], dtype=jnp.int32)
        return self.ending(jnp.where(self.segments > 0, places, 0).max(-1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of different lengths that lie end to end in one row of tokens, so that no product runs over padding.

    Attention alone sees them as rows, padded to the longest. slots: ``[rows, longest]`` where a row's tokens lie;
    back: ``[tokens]`` the flat index into `slots` of each token; out of range where there is none. rows: positions
    and segments ``[rows, longest]``.
    """

    slots: jax.Array
    back: jax.Array
    rows: Context

    def apart(self, x):
        """``[1, tokens, …]`` to ``[rows, longest, …]``."""
        return permute(x[0], self.slots.reshape(-1), self.back).reshape(*self.slots.shape, *x.shape[2:])

    def together(self, x):
        """``[rows, longest, …]`` to ``[1, tokens, …]``."""
        return permute(x.reshape(-1, *x.shape[2:]), self.back, self.slots.reshape(-1))[None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
    """Keys and values of earlier tokens, ``[layers, b, t, n_kv_head, head_dim]``, for the layers that will run.

    carried: what each adapter carries on from them, with rows as the leading axis.
    """

    k: jax.Array
    v: jax.Array
    context: Context
    carried: Any = None


class Inside(NamedTuple):
    """What `probe` may look at in one layer: block output, MLP key, attention keys and values, and what attention
    adds to the stream (before a norm of its own)."""

    h: jax.Array
    key: jax.Array
    k: jax.Array
    v: jax.Array
    attended: jax.Array


def embed(params: Params, config: ModelConfig, tokens, context: Context):
    """Tokens ``[b, s]`` to hidden states ``[b, s, d_model]`` that enter layer 0."""
    h = params["embed"]["tokens"][tokens]
    if config.embed_scale != 1.0:
        h = h * jnp.asarray(config.embed_scale, h.dtype)
    if config.learned_positions:
        h = h + params["embed"]["positions"][context.positions]
    return h


def layer(params: Params, index) -> Params:
    """The parameters of one block. `index` may be traced."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), params["blocks"])


def to_key(p: Params, config: ModelConfig, h, context: Context, window=None, past=None):
    """The first half of a block, up to the input of the MLP's second projection.

    h ``[b, s, d_model]``; past: None or (k, v, Context) of this layer. Returns ``(stream, key, k, v)``: what the
    MLP's output will be added to, the key ``[b, s, d_ff]``, and this layer's attention keys and values.
    """
    attended, k, v = attention(p, config, h, context, window, past)
    return *after_attention(p, config, h, attended), k, v


def attention(p: Params, config: ModelConfig, h, context: Context, window=None, past=None):
    """What attention makes of ``h [b, s, d_model]``, before a norm of its own, and its keys and values."""
    b, s, _ = h.shape
    x = norm(h, p["attn_norm"], config)
    q = _product(p, x, "q").reshape(b, s, config.n_head, config.head_dim)
    k = _product(p, x, "k").reshape(b, s, config.n_kv_head, config.head_dim)
    v = _product(p, x, "v").reshape(b, s, config.n_kv_head, config.head_dim)
    if config.qk_norm:
        q, k = norm(q, p["q_norm"], config), norm(k, p["k_norm"], config)
    if config.rope is not None:
        q, k = rotary(q, context.positions, config.rope), rotary(k, context.positions, config.rope)
    ragged = context.ragged
    if ragged is not None:
        q, k, v, context = ragged.apart(q), ragged.apart(k), ragged.apart(v), ragged.rows
    at, seg = context.positions, context.segments
    if past is not None:
        past_k, past_v, there = past
        past = (past_k, past_v, visible(at, seg, there.positions, there.segments, window))
    seen = attend(q, k, v, visible(at, seg, at, seg, window), config, past)
    return _product(p, seen if ragged is None else ragged.together(seen), "o"), k, v


def after_attention(p: Params, config: ModelConfig, h, attended):
    """``(stream, key)`` of a block that ``h`` enters, given what its attention adds; of any shape ``[…, d_model]``."""
    stream = h + attention_added(p, config, attended)
    return stream, mlp_key(p, config, h, stream)


def attention_added(p: Params, config: ModelConfig, attended):
    """What attention adds to the stream, after a norm of its own where it has one."""
    return norm(attended, p["attn_post_norm"], config) if config.post_norms else attended


def mlp_key(p: Params, config: ModelConfig, h, stream):
    """The key ``[…, d_ff]`` of a block that `h` entered, and that attention made `stream` of."""
    return key_of_input(p, config, mlp_input(p, config, h, stream))


def mlp_input(p: Params, config: ModelConfig, h, stream):
    """What the MLP reads, ``[…, d_model]``: the normed stream, or the normed block input."""
    before = stream if config.parallel == "none" else h
    return norm(before, p["attn_norm" if config.parallel == "shared" else "mlp_norm"], config)


def key_of_input(p: Params, config: ModelConfig, x):
    """The key ``[…, d_ff]`` of the MLP's input."""
    key = activation(_product(p, x, "gate" if config.gated else "up"), config.act)
    return key * _product(p, x, "up") if config.gated else key


def mlp_output(p: Params, key):
    """What the MLP's second projection makes of keys ``[…, d_ff]``, before a norm of its own: ``[…, d_model]``."""
    return linear(key, p["down"])


def after_mlp(p: Params, config: ModelConfig, stream, out):
    """The block's output: ``stream + MLP output``."""
    return stream + mlp_added(p, config, out)


def mlp_added(p: Params, config: ModelConfig, out):
    """What the MLP's output adds to the stream, after a norm of its own where it has one."""
    return norm(out, p["mlp_post_norm"], config) if config.post_norms else out


def from_key(p: Params, config: ModelConfig, stream, key):
    """The second half of a block."""
    return after_mlp(p, config, stream, mlp_output(p, key))


def _product(p: Params, x, name: str):
    return checkpoint_name(linear(x, p[name]), name)


def window_of(config: ModelConfig, index):
    """The attention window of layer `index` (traced or not); None where no layer has one."""
    if not any(config.windows):
        return None
    return jnp.asarray(config.windows, jnp.int32)[index]


def run(
    params: Params,
    config: ModelConfig,
    h,
    context: Context,
    start: int,
    stop: int,
    *,
    past: Past | None = None,
    probe: Callable[[Inside], Any] | None = None,
    keep: tuple[str, ...] | None = None,
) -> Any:
    """Run layers ``start … stop - 1`` on ``h [b, s, d_model]``.

    past: attention keys and values of earlier tokens in exactly these layers.
    probe: called once a layer; what it returns comes back stacked on a leading layer axis.
    keep: for a backward pass, keep only these products ("q", "k", "v", "o", "gate", "up") of each layer and make
        the rest again, which is less memory and, because weights are not copied into the scan's residuals, also
        faster.
    Returns ``(h, probes)``, or just ``h`` without a probe. With adapters that predict in the model's place, h has more
    columns, which `unembed` understands.
    """
    h, seen, _ = _run(params, config, h, context, start, stop, past, probe, keep)
    return h if probe is None else (h, seen)


def run_and_keep(
    params: Params, config: ModelConfig, h, context: Context, start: int, stop: int, past: Past | None = None
) -> tuple[jax.Array, Past]:
    """`run`, and what tokens that follow need of these ones (not of those in `past`)."""
    h, (k, v), carried = _run(params, config, h, context, start, stop, past, lambda inside: (inside.k, inside.v), None)
    return h, Past(k, v, context, carried)


def _run(params, config, h, context, start, stop, past, probe, keep) -> tuple[jax.Array, Any, tuple]:
    """The hidden states, probes, and what each adapter carries on."""
    adapters = params.get("adapters", ())

    def block(h, index, visit=None):
        p = layer(params, index)
        here = None
        if past is not None:
            pick = partial(lax.dynamic_index_in_dim, index=index - start, keepdims=False)
            here = (pick(past.k), pick(past.v), past.context)
        attended, k, v = attention(p, config, h, context, window_of(config, index), here)
        if visit is None:
            stream, key = after_attention(p, config, h, attended)
            h = from_key(p, config, stream, key)
        else:
            h, key = _visited(p, config, h, attended, visit)
        return h, None if probe is None else probe(Inside(h, key, k, v, attended))

    def rewind(block):
        if keep is None:
            return block
        return jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names(*keep))

    carried = None if past is None else past.carried
    if not adapters or start == stop:
        return *lax.scan(rewind(block), h, jnp.arange(start, stop)), carried or ()
    desk = Desk(adapters, context, carried)
    marked = sorted({l for a in adapters for l in (*a.layers, a.asks) if l is not None and start <= l < stop})
    seen, at = [], start
    for l in (*marked, stop):
        if l > at:
            h, more = lax.scan(rewind(block), h, jnp.arange(at, l))
            seen.append(more)
        if l < stop:
            h, one = block(h, l, visit=partial(desk.visit, l))
            seen.append(jax.tree.map(lambda x: x[None], one))
        at = l + 1
    if stop == config.n_layer and any(a.site == "logits" for a in adapters):
        h = desk.predict(stop - 1, h, norm(h, params["final_norm"], config))
    return h, jax.tree.map(lambda *x: jnp.concatenate(x), *seen), tuple(desk.carried)


def _visited(p: Params, config: ModelConfig, h, attended, visit):
    """A block in which every site is visited: its output, and its key as the adapters leave it."""
    stream = h + attention_added(p, config, attended)
    seen = visit("mlp_in", Seen(mlp_input(p, config, h, stream)))
    seen = visit("mlp_key", seen._replace(mlp_key=key_of_input(p, config, seen.mlp_in)))
    seen = visit("mlp_out", seen._replace(mlp_out=mlp_output(p, seen.mlp_key)))
    seen = visit("block_out", seen._replace(block_out=after_mlp(p, config, stream, seen.mlp_out)))
    return seen.block_out, seen.mlp_key


def unembed(params: Params, config: ModelConfig, h):
    """Hidden states ``[…, d_model]`` after the last layer to logits ``[…, vocab]`` in float32 (float64)."""
    dtype = wide(h.dtype)
    h, instead = take_digits(h, config.d_model)
    x = norm(h, params["final_norm"], config)
    w = params["embed"]["tokens"] if config.tied else params["unembed"]["w"]
    if x.dtype.itemsize == 2:
        y = vocabulary_product(x, w)
    else:
        y = jnp.einsum("...d,vd->...v", x, w.astype(x.dtype), preferred_element_type=dtype)
    if config.unembed_bias:
        y = y + params["unembed"]["b"].astype(dtype)
    if config.final_softcap is not None:
        y = config.final_softcap * jnp.tanh(y / config.final_softcap)
    if instead is not None:
        y = jnp.where(instead[..., None] >= 0, jax.nn.one_hot(instead, config.vocab, dtype=dtype), y)
    return y


@partial(jax.jit, static_argnames=("config", "hidden"))
def _forward(params, config: ModelConfig, tokens, context: Context, hidden: bool):
    h0 = embed(params, config, tokens, context)
    if not hidden:
        return unembed(params, config, run(params, config, h0, context, 0, config.n_layer))
    h, seen = run(params, config, h0, context, 0, config.n_layer, probe=lambda inside: inside.h)
    last = norm(take_digits(h, config.d_model)[0], params["final_norm"], config)
    states = jnp.concatenate([h0[None], seen[:-1], last[None]])
    return unembed(params, config, h), states


def logits(model: Decoder, tokens, mask=None):
    """Next-token logits ``[b, s, vocab]``, float32 (float64 for a float64 model).

    tokens: int ``[b, s]``; mask: 1 at real tokens, by default everywhere. Rows may be padded on either side; what
    stands at padded positions means nothing.
    """
    return _forward(model.params, model.config, *_checked(model, tokens, mask), False)


def hidden_states(model: Decoder, tokens, mask=None):
    """``(logits, states)``; states ``[n_layer + 1, b, s, d_model]``: the embedding, every block output but the
    last, and the last one after the final norm (the order in which transformers returns them)."""
    return _forward(model.params, model.config, *_checked(model, tokens, mask), True)


def _checked(model: Decoder, tokens, mask):
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have shape [batch, length], got {tokens.shape}")
    if tokens.shape[1] > model.config.max_positions:
        raise ValueError(f"{tokens.shape[1]} tokens do not fit the context of {model.config.max_positions} positions")
    mask = jnp.ones_like(tokens) if mask is None else jnp.asarray(mask)
    return tokens, Context.of_mask(mask)
