"""The kernel for Hopper GPUs, in Pallas Mosaic GPU: only tiles that touch the upper triangle are computed.

Blocks stay on their multiprocessor and take one tile of the triangle after the other. In a block, one warpgroup
only loads: it streams the two slices of x that make a tile through a ring of shared memory stages. The others
multiply (wgmma, float32 accumulators in registers), then add the tile to the sum in global memory piece by piece;
loads of the next tile run meanwhile. Tiles that hang over an edge of x or of the sum are filled with zeros on load
and clipped on store by the hardware.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxedit_kernels.second_moment.specs import HopperSpec, tile_order

_SWIZZLE = 128  # bytes
_SLOTS = 2  # pieces of the sum in flight, per warpgroup


def second_moment(x: jax.Array, total: jax.Array, slot: jax.Array | int, spec: HopperSpec, cores: int) -> jax.Array:
    """``total`` with ``xᵀ x`` added to ``total[slot]``, on and right of the diagonal at least.

    x: ``[n, d]`` bfloat16 or float16, d a multiple of 64; n is padded to a multiple of 8.
    total: ``[slots, d, d]`` float32, updated in place where it is donated (the kernel's output is aliased to it).
    cores: multiprocessors of the device.
    """
    x = jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))  # bulk copies come in whole rows of the tiling
    order = tile_order(x.shape[1], spec.cluster * spec.tile_m, spec.tile_n, spec.group)
    kernel = plgpu.kernel(
        partial(_kernel, tiles=len(order), spec=spec),
        out_type=(),
        grid=(max(cores // spec.cluster, 1),),
        grid_names=("worker",),
        cluster=(spec.cluster,),
        cluster_names=("cluster",),
        num_threads=spec.consumers + 1,
        thread_name="warpgroup",
        kernel_name="second_moment",
    )
    ref = jax.new_ref(total)
    kernel(x, jnp.asarray(order), jnp.asarray(slot, jnp.int32).reshape(1), ref)
    return jax.freeze(ref)


def _kernel(x, order, slot, total, *, tiles: int, spec: HopperSpec):
    """x, order, slot and total are in global memory; see `second_moment`."""
    allocations = _pipeline(x, 0, 0, _nothing, _nothing, spec).get_allocations(x, x)
    share = spec.tile_m // spec.consumers
    pieces = plgpu.SMEM(
        (spec.consumers, _SLOTS, share, spec.epilogue_n), jnp.float32, transforms=_transforms(jnp.float32)
    )
    arrived = plgpu.Barrier(num_barriers=spec.consumers * _SLOTS)
    pl.run_scoped(
        partial(_tiles, x, order, slot, total, tiles=tiles, spec=spec),
        allocations=allocations,
        pieces=pieces,
        arrived=arrived,
        collective_axes="warpgroup",
    )


def _tiles(x, order, slot, total, *, allocations, pieces, arrived, tiles: int, spec: HopperSpec):
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("cluster")
    share = spec.tile_m // spec.consumers
    layer = slot[0]

    @plgpu.nd_loop((tiles,), collective_axes="worker")
    def _(loop):
        (index,) = loop.index
        i, j = order[index, 0] * spec.cluster + block, order[index, 1]
        parts = spec.tile_n // spec.epilogue_n

        def place(part):
            rows = pl.ds(i * spec.tile_m + warpgroup * share, share)
            return total.at[layer, rows, pl.ds(j * spec.tile_n + part * spec.epilogue_n, spec.epilogue_n)]

        def load(part):
            at = part % _SLOTS
            plgpu.copy_gmem_to_smem(place(part), pieces.at[warpgroup, at], arrived.at[warpgroup * _SLOTS + at])

        def compute(run):
            """Runs in the multiplying warpgroups only; the first pieces of the sum arrive during the products."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for part in range(_SLOTS):
                load(part)
            pl.run_scoped(partial(finish, run), plgpu.WGMMAAccumulatorRef((share, spec.tile_n), jnp.float32))

        def finish(run, accumulator):
            run(accumulator)
            gram = accumulator[...]
            for part in range(parts):
                at = part % _SLOTS
                plgpu.barrier_wait(arrived.at[warpgroup * _SLOTS + at])
                pieces[warpgroup, at] += gram[:, part * spec.epilogue_n : (part + 1) * spec.epilogue_n]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(pieces.at[warpgroup, at], place(part))
                if part + _SLOTS < parts:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    load(part + _SLOTS)

        def multiply(_, rows, columns, accumulator):
            mine = rows.at[:, pl.ds(warpgroup * share, share)]
            plgpu.wgmma(accumulator, mine.transpose((1, 0)), columns)
            plgpu.wgmma_wait(spec.delay_release)
            return accumulator

        _pipeline(x, i, j, multiply, compute, spec)(x, x, allocations=allocations)

    plgpu.wait_smem_to_gmem(0)


def _pipeline(x, i, j, multiply, compute, spec: HopperSpec):
    """Streams the slices of x for row tile i and column tile j through `multiply`, `tile_k` tokens at a time."""
    block_spec = partial(plgpu.BlockSpec, transforms=_transforms(x.dtype), delay_release=spec.delay_release)
    return plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(-(-x.shape[0] // spec.tile_k),),
        memory_registers=40,
        in_specs=[
            block_spec((spec.tile_k, spec.tile_m), lambda k: (k, i)),
            block_spec(
                (spec.tile_k, spec.tile_n),
                lambda k: (k, j),
                collective_axes=("cluster",) if spec.cluster > 1 else (),
            ),
        ],
        wg_axis="warpgroup",
        num_compute_wgs=spec.consumers,
        max_concurrent_steps=spec.stages,
        compute_context=compute,
    )


def _transforms(dtype):
    """The layout in shared memory that wgmma reads and bulk copies write without bank conflicts."""
    tiling = plgpu.TilingTransform((8, _SWIZZLE // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(_SWIZZLE)  # pyright: ignore[reportAbstractUsage]


def _nothing(*_, **__):
    """Stands for functions that have no influence on what a pipeline allocates."""
