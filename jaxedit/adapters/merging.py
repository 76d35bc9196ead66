"""Several changes of one matrix made into one: TIES and spherical interpolation. Float32 in, sums in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

PARALLEL = 0.9995  # cosine beyond which an arc is as good as straight


def ties(deltas: Sequence[np.ndarray], density: float) -> np.ndarray:
    """TIES (Yadav et al. 2023): of each delta the share `density` of largest magnitude is kept, each entry takes the
    sign of its sum, and the entries of that sign are averaged. Zeros do not vote."""
    kept = [_largest(delta, density) for delta in deltas]
    sign = np.sign(sum(x.astype(np.float64) for x in kept))
    total, count = np.zeros(kept[0].shape), np.zeros(kept[0].shape, np.int32)
    for x in kept:
        agrees = (np.sign(x) == sign) & (x != 0)
        total += np.where(agrees, x, 0)
        count += agrees
    return (total / np.maximum(count, 1)).astype(deltas[0].dtype)


def _largest(delta: np.ndarray, density: float) -> np.ndarray:
    size = np.abs(delta).reshape(-1)
    keep = int(density * size.size)
    if keep >= size.size:
        return delta
    if keep == 0:
        return np.zeros_like(delta)
    return np.where(np.abs(delta) >= np.partition(size, size.size - keep)[size.size - keep], delta, 0)


def slerp(deltas: Sequence[np.ndarray], density: float = 1.0) -> np.ndarray:
    """The middle of the arc between deltas as vectors, taken one by one so that each counts the same; lengths are
    interpolated with the directions. `density` as in `ties`."""
    kept = [_largest(delta, density).astype(np.float64) for delta in deltas]
    merged = kept[0]
    for i, other in enumerate(kept[1:], 2):
        merged = _between(merged, other, 1 / i)
    return merged.astype(deltas[0].dtype)


def _between(one: np.ndarray, other: np.ndarray, t: float) -> np.ndarray:
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    cosine = float(np.sum(one * other) / norms) if norms else 1.0
    if abs(cosine) > PARALLEL:
        return (1 - t) * one + t * other
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * other) / np.sin(angle)


MERGES: dict[str, Callable[[Sequence[np.ndarray], float], np.ndarray]] = {"ties": ties, "slerp": slerp}
