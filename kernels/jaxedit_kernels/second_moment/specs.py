"""Tuning of the kernels: tile sizes and pipelines, one frozen spec per kind of device, and the order of the tiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class HopperSpec:
    """Tuning of the Mosaic GPU kernel.

    A cluster of `cluster` blocks works on one tile of ``cluster * tile_m`` rows and `tile_n` columns of the result.
    Each block has its own rows and shares the columns' slice of x, which is loaded once for all by multicast.

    tile_m: rows of a block, of which each of the `consumers` warpgroups takes an equal share, a multiple of 64.
    tile_n: columns, a multiple of 64, at most 256.
    tile_k: rows of x (tokens) a pipeline stage, a multiple of 16.
    stages: stages of the pipeline, each ``2 * tile_k * (tile_m + tile_n)`` bytes of shared memory.
    delay_release: 1 leaves the products of a step in flight while the next step's are issued, 0 waits for them.
    epilogue_n: columns of float32 sums that move at a time, two pieces in flight per warpgroup; a multiple of 32.
    group: width, in tiles, of the column groups in which the triangle is walked; see `tile_order`.
    """

    tile_m: int = 128
    tile_n: int = 256
    tile_k: int = 64
    stages: int = 4
    consumers: int = 2
    cluster: int = 2
    delay_release: int = 0
    epilogue_n: int = 32
    group: int = 8

    def __post_init__(self):
        share = self.tile_m // self.consumers
        rules = {
            "tile_m must give each consumer a multiple of 64 rows": share * self.consumers == self.tile_m
            and share % 64 == 0,
            "tile_n must be a multiple of 64, at most 256": self.tile_n % 64 == 0 and self.tile_n <= 256,
            "tile_k must be a multiple of 16, of at least cluster * 8": self.tile_k % max(16, 8 * self.cluster) == 0,
            "stages must exceed delay_release": self.stages > self.delay_release,
            "epilogue_n must be a multiple of 32 that divides tile_n into at least two": self.epilogue_n % 32 == 0
            and self.tile_n % self.epilogue_n == 0
            and self.tile_n >= 2 * self.epilogue_n,
            f"tiles take {self.shared_bytes} bytes of shared memory, more than the {SHARED_BYTES} of a block": (
                self.shared_bytes <= SHARED_BYTES
            ),
        }
        for rule, kept in rules.items():
            if not kept:
                raise ValueError(f"{self}: {rule}")

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: pipeline stages of 16-bit inputs and the pieces of float32 sums in flight."""
        inputs = self.stages * self.tile_k * (self.tile_m + self.tile_n) * 2
        return inputs + 2 * self.tile_m * self.epilogue_n * 4 + _RESERVED


@dataclass(frozen=True)
class TPUSpec:
    """Tuning of the Mosaic TPU kernel.

    tile: rows and columns of a tile of the result; tile_k: tokens a step. Both are multiples of 128.
    group: as in `HopperSpec`.
    """

    tile: int = 512
    tile_k: int = 1024
    group: int = 4

    def __post_init__(self):
        if self.tile % 128 or self.tile_k % 128:
            raise ValueError(f"{self}: tile and tile_k must be multiples of 128")


SHARED_BYTES = 227 * 1024  # what one block may have on compute capability 9.0
_RESERVED = 3 * 1024  # barriers, and scratch that the compiler keeps for reductions

# Chosen by the arithmetic in README.md; none is measured on hardware yet.
# The first is the default: 256 x 256 tiles by two blocks, 48 KiB a stage. The others are worth timing against it.
HOPPER_CANDIDATES: tuple[HopperSpec, ...] = (
    HopperSpec(),
    HopperSpec(delay_release=1),
    HopperSpec(stages=3, epilogue_n=64),
    HopperSpec(cluster=1),
    HopperSpec(tile_n=128, stages=6, epilogue_n=32, group=16),
    HopperSpec(group=4),
    HopperSpec(group=16),
)


def hopper_spec(d: int, device_kind: str) -> HopperSpec:
    """The spec for vectors of d numbers on a device such as "NVIDIA H100 80GB HBM3"."""
    if d <= 2048:  # fewer tiles than multiprocessors: smaller ones keep more of them busy
        return HopperSpec(tile_n=128, stages=6, cluster=1)
    return HopperSpec()


def tpu_spec(d: int) -> TPUSpec:
    """The spec for vectors of d numbers: the largest tile that divides d, or else the smallest there is."""
    return TPUSpec(tile=next((tile for tile in (512, 256) if d % tile == 0), 128))


def tile_order(d: int, tile_m: int, tile_n: int, group: int) -> np.ndarray:
    """Tiles that touch the upper triangle of a d x d matrix, each once, as (row tile, column tile).

    Column groups of `group` tiles are walked from the top down, so that tiles worked on at the same time form a
    patch of about `group` by `group` and share their inputs through the cache.
    Returns int32 ``[tiles, 2]``.
    """
    rows, columns = -(-d // tile_m), -(-d // tile_n)
    found = [
        (i, j)
        for first in range(0, columns, group)
        for i in range(rows)
        for j in range(first, min(first + group, columns))
        if i * tile_m < (j + 1) * tile_n
    ]
    return np.array(found, np.int32)
