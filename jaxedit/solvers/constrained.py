"""Equality constraints: the update that meets its targets and disturbs other keys least (ROME, R-ROME, EMMET).

    ΔW = argmin tr(ΔWᵀ A ΔW)  subject to  K ΔW = R,  A = λC + l2·I

is ``Z D⁻¹ R`` with ``Z = A⁻¹Kᵀ`` and ``D = K Z``. A slack s makes ``D + s·I`` of D, which is Ridge for s = 1. Keys that
are linearly dependent leave D singular: then the update that meets the targets best is taken, in least squares.
ROME as published has other keys in D than in Z.
"""

from __future__ import annotations

import jax
import numpy as np

from jaxedit.config import EqualityConstrained
from jaxedit.solvers.blas import quiet_blas
from jaxedit.solvers.factors import Factor, LayerFactor
from jaxedit.solvers.refine import refine
from jaxedit.solvers.ridge import Solution, mix_of, padded, preconditioner, relative_norm, rows_of
from jaxedit.solvers.triangle import Triangle, backward, forward, times

_SINGULAR = 1e-13  # singular values of D below this part of the largest are taken to be 0


def solve_constrained(factor: Factor, layer: int, keys, residuals, clean=None) -> Solution:
    """The update of one layer for keys ``[n, d_ff]`` and residuals ``[n, d_model]``, in float64.

    clean: the keys of the clean prompts ``[n, d_ff]``, for ``denominator="clean"``. Keys absorbed into the factor are
    part of A. The residual reported is the larger one of the constraints', ``‖(K Z + s·I) M − R‖ / ‖R‖`` with
    ``M = (K Z + s·I)⁻¹ R``, and of the stationarity, ``‖A ΔW − KᵀM‖ / ‖KᵀM‖``. Targets that contradict each other
    show in the first one.
    """
    solver, part = factor.solver, factor[layer]
    assert isinstance(solver, EqualityConstrained)
    k, r = rows_of(keys, part.triangle.size, layer), np.asarray(residuals, np.float64)
    meets = k if solver.denominator == "same" or clean is None else rows_of(clean, part.triangle.size, layer)
    with jax.enable_x64(True), quiet_blas(len(k)):
        z = _inverse_times(part, k)
        d = meets @ z + solver.slack * np.eye(len(k))
        right = _least_squares(d, r)
        mixed = right @ mix_of(r.shape[1])
        stationarity = _stationarity(part, k, z @ mixed, k.T @ mixed)
    return Solution(z, right, max(relative_norm(d @ right - r, r), stationarity))


def _inverse_times(part: LayerFactor, k: np.ndarray) -> np.ndarray:
    """``A⁻¹Kᵀ``, ``[d_ff, n]``."""
    if part.matrix is not None:
        return refine(part.matrix, preconditioner(part.triangle), k.T)
    return np.asarray(_both_ways(part.triangle, padded(k)))[:, : len(k)]


@jax.jit
def _both_ways(t: Triangle, k):
    return backward(t, forward(t, k.T))


def _least_squares(d: np.ndarray, r: np.ndarray) -> np.ndarray:
    """``d⁻¹ r``, or the least squares of smallest norm where d ``[n, n]`` is singular."""
    try:
        found = np.linalg.solve(d, r)
        if relative_norm(d @ found - r, r) <= 1e-10:
            return found
    except np.linalg.LinAlgError:
        pass
    return np.linalg.lstsq(d, r, rcond=_SINGULAR)[0]


def _stationarity(part: LayerFactor, k: np.ndarray, x: np.ndarray, b: np.ndarray) -> float:
    product = part.matrix @ x if part.matrix is not None else np.asarray(_times(part.triangle, x))
    return relative_norm(product - b, b)


_times = jax.jit(times)
