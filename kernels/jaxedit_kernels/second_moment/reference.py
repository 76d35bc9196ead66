"""The definition, in plain jnp: what every other implementation is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def second_moment(x: jax.Array, total: jax.Array, slot: jax.Array | int) -> jax.Array:
    """``total`` with ``xᵀ x`` added to ``total[slot]``, the whole square of it.

    x: ``[n, d]``. total: ``[slots, d, d]``; the sum is taken in its dtype (float32 or float64).
    """
    wide = x.astype(total.dtype)
    return total.at[slot].add(jnp.matmul(wide.T, wide, precision=lax.Precision.HIGHEST))
