"""Strips over the upper triangle, for any backend and dtype: the fallback where no kernel runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def second_moment(x: jax.Array, total: jax.Array, slot: jax.Array | int, strips: int = 8) -> jax.Array:
    """``total`` with ``xᵀ x`` added to ``total[slot]``, on and right of the diagonal at least.

    x: ``[n, d]``. total: ``[slots, d, d]``, updated in place where it is donated.
    strips: rows of the result are done in this many strips, each from its own diagonal block to the right edge,
        which takes ``(1 + 1/strips) / 2`` of the FLOPs of the square. 1 suits an x split over devices by columns.
    """
    d = x.shape[1]
    # Products of 16-bit numbers are exact in float32; those of float32 numbers need all passes of the hardware
    precision = lax.Precision.DEFAULT if x.dtype.itemsize == 2 else lax.Precision.HIGHEST
    width = max(-(-d // strips // 128) * 128, 128) if strips > 1 else d
    for a in range(0, d, width):
        gram = jnp.einsum(
            "td,te->de",
            x[:, a : a + width],
            x[:, a:],
            precision=precision,
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )
        here = (slot, a, a)
        before = lax.dynamic_slice(total, here, (1, *gram.shape))
        total = lax.dynamic_update_slice(total, before + gram[None].astype(total.dtype), here)
    return total
