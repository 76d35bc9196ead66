"""The kernel for TPUs, in Pallas: the tiles that touch the upper triangle, each summed over blocks of tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxedit_kernels.second_moment.specs import TPUSpec, tile_order


def second_moment(x: jax.Array, total: jax.Array, slot: jax.Array | int, spec: TPUSpec) -> jax.Array:
    """``total`` with ``xᵀ x`` added to ``total[slot]``, on and right of the diagonal at least.

    x: ``[n, d]`` bfloat16, d a multiple of `spec.tile`. total: ``[slots, d, d]`` float32, updated in place where
    it is donated.
    """
    n, d = x.shape
    tile, tile_k = spec.tile, spec.tile_k
    x = jnp.pad(x, ((0, -n % tile_k), (0, 0)))
    order = jnp.asarray(tile_order(d, tile, tile, spec.group).T)  # scalar memory pads the last axis
    sums = pl.BlockSpec((None, tile, tile), lambda t, k, slot, order: (slot[0], order[0, t], order[1, t]))
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct(total.shape, total.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(order.shape[1], x.shape[0] // tile_k),
            in_specs=[
                pl.BlockSpec((tile_k, tile), lambda t, k, slot, order: (k, order[0, t])),
                pl.BlockSpec((tile_k, tile), lambda t, k, slot, order: (k, order[1, t])),
                sums,
            ],
            out_specs=sums,
        ),
        input_output_aliases={4: 0},  # counted with the two prefetched arguments
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="second_moment",
    )(jnp.asarray(slot, jnp.int32).reshape(1), order, x, x, total)


def _kernel(slot, order, rows, columns, before, total):
    @pl.when(pl.program_id(1) == 0)
    def _():
        total[...] = before[...]

    total[...] += lax.dot_general(rows[...], columns[...], (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
