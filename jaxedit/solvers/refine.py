"""Float64 solutions from a float32 factor, for devices without float64.

The factor is only the preconditioner of conjugate gradients (Hestenes and Stiefel 1952); products with the matrix,
and all sums, are made in float64 on the host. With an exact factor the first step is the solution; with a float32
one each step gains about seven digits less those that the condition number takes, which is iterative refinement,
but unlike that it goes on to converge where it takes nearly all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxedit.errors import StatisticsError

_TOLERANCE = 1e-11
_STEPS = 60


def refine(matrix: np.ndarray, precondition: Callable[[np.ndarray], np.ndarray], b: np.ndarray) -> np.ndarray:
    """``matrix⁻¹ b``, float64 ``[d, n]``, each column to a relative residual of 5e-11.

    precondition: an approximate ``matrix⁻¹``, symmetric and positive definite. Raises StatisticsError where that is
    too far off to converge.
    """
    size = np.linalg.norm(b, axis=0)
    size[size == 0] = 1
    r = b / size  # columns of one size stay within float32's range
    z, p, before = np.zeros_like(b), np.zeros_like(b), np.ones(b.shape[1])
    for _ in range(_STEPS):
        y = precondition(r)
        now = np.einsum("dn,dn->n", r, y)
        p = y + p * _ratio(now, before)
        q = matrix @ p
        step = _ratio(now, np.einsum("dn,dn->n", p, q))
        z, r, before = z + step * p, r - step * q, now
        if not np.isfinite(step).all():
            break
        if np.linalg.norm(r, axis=0).max(initial=0) <= _TOLERANCE:
            r = b / size - matrix @ z  # what the recurrence lost to rounding
            if np.linalg.norm(r, axis=0).max(initial=0) <= 5 * _TOLERANCE:
                return z * size
            p = np.zeros_like(b)
    raise StatisticsError(
        f"the solve did not converge to a relative residual of {_TOLERANCE} in {_STEPS} steps from a float32 factor: "
        "the second moments are too ill-conditioned. Use precision='float64' (on the CPU where the device has no "
        "float64), count more tokens, or set Ridge(l2=...) to a small positive number"
    )


def _ratio(a, b):
    """a / b, and 0 for columns that are solved already."""
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)
