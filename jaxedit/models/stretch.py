"""A stretch of layers as a function of the decisive token alone.

What is added to the decisive token in one layer reaches a later layer, at the same token, through that token only:
earlier tokens do not see it, and later ones are not seen by it. So with the attention keys and values of the earlier
tokens at hand, the layers in between run on one token a prompt.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxedit.errors import JaxEditError
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import (
    Context,
    Params,
    Past,
    after_mlp,
    layer,
    mlp_output,
    run,
    to_key,
    window_of,
)

_static = partial(dataclasses.field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stretch:
    """From what is added in a first layer to what a last layer makes of it, at the decisive tokens of n prompts, all
    other tokens held as computed.

    params: the blocks from the first layer to the last, `config` the same of the configuration. stream, out
    ``[n, d_model]``: of the first layer, what its MLP's output is added to, and that output. past: attention keys and
    values of earlier tokens in the layers after the first; here: where the decisive tokens stand ``[n, 1]``.
    site, to: what is added to and what is looked at, "block_out" (the layer's output) or "mlp_out" (its MLP's, before
    a norm of its own where it has one).

    All is float32 (float64 for a float64 model), and so are products with it, on a GPU too.
    """

    params: Params
    stream: jax.Array
    out: jax.Array
    past: Past
    here: Context
    config: ModelConfig = _static()
    site: str = _static()
    to: str = _static()

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, d_model)`` of what is added and of what arrives."""
        n, d = self.stream.shape
        return n, d

    def reach(self, delta):
        """What the last layer makes of the decisive tokens, ``[n, d_model]``, with `delta` ``[n, d_model]`` added."""
        with jax.default_matmul_precision("float32"):
            return self._reach(delta)

    def _reach(self, delta):
        p, config, last = layer(self.params, 0), self.config, self.config.n_layer - 1
        out = self.out + delta if self.site == "mlp_out" else self.out
        h = after_mlp(p, config, self.stream, out)
        h = h + delta if self.site == "block_out" else h
        if last == 0:
            return h if self.to == "block_out" else out
        if self.to == "block_out":
            return run(self.params, config, h[:, None], self.here, 1, last + 1, past=self.past)[:, 0]
        below = Past(self.past.k[:-1], self.past.v[:-1], self.past.context)
        h = run(self.params, config, h[:, None], self.here, 1, last, past=below) if last > 1 else h[:, None]
        p, here = layer(self.params, last), (self.past.k[-1], self.past.v[-1], self.past.context)
        _, key, _, _ = to_key(p, config, h, self.here, window_of(config, last), here)
        return mlp_output(p, key)[:, 0]


def make_stretch(
    band: Params, config: ModelConfig, stream, key, context: Context, lookup, site: str, to: str
) -> Stretch:
    """The stretch from the first block of `band` to its last, given what that first block's MLP is to be added to and
    its keys, at all tokens, ``[n, s, d_model]`` and ``[n, s, d_ff]``. lookup ``[n]``: the decisive tokens."""
    p, dtype = layer(band, 0), wide(stream.dtype)
    out = mlp_output(p, key)
    h = after_mlp(p, config, stream, out)
    at = partial(jnp.take_along_axis, indices=lookup[:, None], axis=1)
    _, (k, v) = run(band, config, h, context, 1, config.n_layer, probe=lambda inside: (inside.k, inside.v))
    before = jnp.arange(stream.shape[1]) < lookup[:, None]
    there = Context(context.positions, jnp.where(before, context.segments, 0))
    params, stream, out, k, v = jax.tree.map(
        lambda x: x.astype(dtype), (band, _at(stream, lookup), _at(out, lookup), k, v)
    )
    here = Context(at(context.positions), at(context.segments))
    return Stretch(params, stream, out, Past(k, v, there), here, config, site, to)


def _at(states, lookup):
    return jnp.take_along_axis(states, lookup[:, None, None], 1)[:, 0]


def between(config: ModelConfig, first: int, last: int) -> ModelConfig:
    """The configuration of the layers `first` to `last` alone."""
    return dataclasses.replace(config, n_layer=last - first + 1, windows=config.windows[first : last + 1])


def push(stretch: Stretch, tangents):
    """``J v`` for each of ``[…, n, d_model]``, at δ = 0. Raises JaxEditError on another shape."""
    return _push(stretch, batched(stretch, tangents)).reshape(jnp.shape(tangents))


def pull(stretch: Stretch, cotangents):
    """``Jᵀ u`` for each of ``[…, n, d_model]``, at δ = 0. Raises JaxEditError on another shape."""
    return _pull(stretch, batched(stretch, cotangents)).reshape(jnp.shape(cotangents))


def batched(stretch: Stretch, vectors):
    """Vectors ``[…, n, d_model]`` as ``[m, n, d_model]`` in the stretch's dtype."""
    if jnp.shape(vectors)[-2:] != stretch.shape:
        raise JaxEditError(f"a stretch takes {stretch.shape} at the end of a shape, got {jnp.shape(vectors)}")
    return jnp.asarray(vectors, stretch.stream.dtype).reshape(-1, *stretch.shape)


@jax.jit
def _push(stretch: Stretch, flat):
    _, forward = jax.linearize(stretch.reach, jnp.zeros_like(stretch.stream))
    return jax.vmap(forward)(flat)


@jax.jit
def _pull(stretch: Stretch, flat):
    _, backward = jax.vjp(stretch.reach, jnp.zeros_like(stretch.stream))
    return jax.vmap(lambda u: backward(u)[0])(flat)
