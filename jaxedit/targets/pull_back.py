"""A residual at the last edited layer, pulled back through the layers between (`JacobianSpread`)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxedit.models.stretch import Stretch


@partial(jax.jit, static_argnames="iterations")
def least_change(of: Stretch, rest, damping, iterations: int):
    """For each prompt the δ that minimises ``‖J δ − rest‖² + damping ‖δ‖²``, by `iterations` of conjugate gradients on
    the normal equations ``(JᵀJ + damping·I) δ = Jᵀ rest``; J is never written out.

    rest: ``[n, d_model]``. Returns δ and ``‖right − left‖ / ‖right‖`` of those equations ``[n]``, both in the dtype of
    the stretch.
    """
    rest = rest.astype(of.stream.dtype)
    _, forward = jax.linearize(of.reach, jnp.zeros_like(rest))
    backward = jax.linear_transpose(forward, rest)

    def left(x):
        return backward(forward(x))[0] + damping * x

    def dot(a, b):
        return jnp.sum(a * b, -1, keepdims=True)

    def step(_, now):
        x, r, p, size = now
        q = left(p)
        a = size / jnp.maximum(dot(p, q), tiny)
        x, r = x + a * p, r - a * q
        smaller = dot(r, r)
        return x, r, r + smaller / jnp.maximum(size, tiny) * p, smaller

    tiny = jnp.finfo(rest.dtype).tiny
    (right,) = backward(rest)
    start = jnp.zeros_like(rest), right, right, dot(right, right)
    x, *_ = jax.lax.fori_loop(0, iterations, step, start)
    error = jnp.linalg.norm(right - left(x), axis=-1) / jnp.maximum(jnp.linalg.norm(right, axis=-1), tiny)
    return x, error
