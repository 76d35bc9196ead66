"""Ridge on a subset of channels: those in which the keys of the edits are largest (NSE)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.config import NeuronSubset
from jaxedit.solvers.blas import quiet_blas
from jaxedit.solvers.by_layer import ByLayer
from jaxedit.solvers.ridge import Solution, relative_norm, rows_of


@dataclasses.dataclass(frozen=True, eq=False)
class LayerMoment:
    """The second moment of one layer ``[d_ff, d_ff]`` and its protected keys ``[protected, d_ff]``, on the host."""

    matrix: np.ndarray
    past: np.ndarray
    condition: float = float("nan")  # depends on the channels chosen

    @property
    def protected(self) -> int:
        return len(self.past)


@dataclasses.dataclass(frozen=True, eq=False)
class Moments(ByLayer[LayerMoment]):
    """Second moments of some layers, for `solver`, which cannot factor them before it knows the channels."""

    parts: Mapping[int, LayerMoment]
    solver: NeuronSubset


def gather_moments(solver: NeuronSubset, second_moments, layers: tuple[int, ...]) -> Moments:
    matrices = {l: np.asarray(second_moments[l].matrix) for l in layers}
    return Moments({l: LayerMoment(m, np.zeros((0, len(m)))) for l, m in matrices.items()}, solver)


def protect_moments(moments: Moments, keys: Mapping[int, np.ndarray]) -> Moments:
    """With all of `keys`, ``{layer: [m, d_ff]}``, protected."""
    parts = {
        l: dataclasses.replace(p, past=np.asarray(keys[l], np.float64)) if l in keys else p
        for l, p in moments.parts.items()
    }
    return dataclasses.replace(moments, parts=parts)


def largest_channels(keys: np.ndarray, share: float) -> np.ndarray:
    """Indices of the channels with the largest sums of |key| over edits, which together hold at most `share` of all."""
    size = np.abs(keys).sum(0)
    order = np.argsort(-size, kind="stable")
    if share == 1:
        return order
    return order[: max(1, int(np.sum(np.cumsum(size[order]) <= share * size.sum())))]


def solve_subset(moments: Moments, layer: int, keys, residuals) -> Solution:
    """The update of one layer for keys ``[n, d_ff]`` and residuals ``[n, d_model]``, in float64: rows of other channels
    are 0. The residual is that of the normal equations of the channels chosen."""
    part, solver = moments[layer], moments.solver
    k, r = rows_of(keys, len(part.matrix), layer), np.asarray(residuals, np.float64)
    chosen = largest_channels(k, solver.share)
    some, past = k[:, chosen], part.past[:, chosen]
    c = part.matrix[np.ix_(chosen, chosen)].astype(np.float64)
    a = solver.cov_weight / 2 * (c + c.T) + past.T @ past + some.T @ some
    with jax.enable_x64(True), quiet_blas(len(chosen)):
        factor = jax.scipy.linalg.cho_factor(jnp.asarray(a))
        x = np.asarray(jax.scipy.linalg.cho_solve(factor, jnp.asarray(some.T)))
    left = np.zeros((k.shape[1], len(k)))
    left[chosen] = x
    return Solution(left, r, relative_norm(a @ (x @ r) - some.T @ r, some.T @ r))
