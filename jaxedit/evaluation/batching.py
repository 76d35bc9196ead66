"""Rows of tokens into batches of few shapes: one compiled program a shape, and little padding."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

MIN_LENGTH = 8


@dataclasses.dataclass(frozen=True)
class Batch:
    """`index` says which items; `rows` is the padded number of rows and `shape` the padded sizes of a row."""

    index: list[int]
    rows: int
    shape: tuple[int, ...]

    @property
    def live(self) -> np.ndarray:
        """Boolean ``[rows]``: False at rows that only fill the batch up."""
        return np.arange(self.rows) < len(self.index)

    def take(self, items: Sequence):
        """The items of this batch, the first one repeated in the spare rows."""
        picked = [items[i] for i in self.index]
        return picked + picked[:1] * (self.rows - len(picked))


def bucket(n: int, least: int = 1) -> int:
    """The smallest of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, … that is at least `n` and `least`."""
    n = max(n, least)
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 32 and n <= power * 3 // 4 else power


def row_length(n: int) -> int:
    """The length that a row of `n` tokens is padded to: a `bucket`, and beyond 128 a multiple of 32."""
    return bucket(n, MIN_LENGTH) if n <= 128 else -(-n // 32) * 32


def batches(shapes: Sequence[tuple[int, ...]], budget: int, shards: int = 1) -> list[Batch]:
    """Group items of equal (already bucketed) shape.

    A row costs the sum of its shape, a batch at most `budget` (or one row) for each of the `shards` that its rows
    are split into evenly. Small groups are padded to the shape of another one: an eighth of a batch of padding is
    cheaper than compiling another program.
    """
    made, budget = [], budget * shards
    for shape, items in sorted(_groups(shapes, budget // 8).items()):
        most = max(1, budget // max(1, sum(shape)))
        size = -(-len(items) // -(-len(items) // most))
        rows = -(-min(bucket(size), max(most, size)) // shards) * shards
        made += [Batch(items[at : at + rows], rows, shape) for at in range(0, len(items), rows)]
    return made


def _groups(shapes: Sequence[tuple[int, ...]], spare: int) -> dict[tuple[int, ...], list[int]]:
    """Items by padded shape. Shapes are merged, the cheapest pair first, while the padding is <= `spare`."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(i)
    needed = {shape: sum(shape) * len(items) for shape, items in groups.items()}

    def joined(one, other):
        shape = tuple(map(max, one, other))
        n = len(groups[one]) + len(groups[other])
        return sum(shape) * n - needed[one] - needed[other], shape, one, other

    while len(groups) > 1:
        padding, shape, one, other = min(joined(*pair) for pair in itertools.combinations(sorted(groups), 2))
        if padding > spare:
            break
        items, cost = groups.pop(one) + groups.pop(other), needed.pop(one) + needed.pop(other)
        groups[shape] = sorted(groups.get(shape, []) + items)
        needed[shape] = needed.get(shape, 0) + cost
    return groups


def chunk(n: int, most: int = 256) -> int:
    """Rows at a time in a loop over `n`: a divisor of n near `most`, so that no remainder is compiled too."""
    pieces = range(-(-n // most), max(1, 2 * n // most) + 1)
    return next((n // p for p in pieces if n % p == 0), min(n, most))


def pad(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens and mask, int32 ``[b, length]``."""
    tokens = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    sizes = np.fromiter(map(len, rows), np.int32, len(rows))
    return tokens, (np.arange(length) < sizes[:, None]).astype(np.int32)
