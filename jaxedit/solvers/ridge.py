"""Ridge: the update that moves keys to their targets while keeping the second moment of all other keys.

    ΔW = argmin ‖K ΔW − R‖² + λ tr(ΔWᵀ C ΔW) + l2 ‖ΔW‖² = (λC + l2·I + KᵀK)⁻¹ KᵀR

Everything here is float64. ``A = λC + l2·I`` does not depend on the edits: it is factored once, all layers in one
vmapped Cholesky, and with ``Z = A⁻¹Kᵀ`` a batch of n < d_ff edits is ``ΔW = Z (I + KZ)⁻¹ R``: no d_ff × d_ff matrix
is inverted and the update comes out as low-rank factors. Keys of earlier edits that must stay where they are are
further rows of K whose residual is zero.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular

from jaxedit.config import Ridge
from jaxedit.errors import StatisticsError

_POWER_STEPS = 30


class Factor(NamedTuple):
    """`chol`: lower Cholesky factors of λC + l2·I, float64 ``[layers, d_ff, d_ff]``; `layers`: whose they are;
    `condition`: estimated 2-norm condition number of each matrix; `solver`: what they were made for."""

    chol: jax.Array
    layers: tuple[int, ...]
    condition: np.ndarray
    solver: Ridge


class Solution(NamedTuple):
    """``ΔW = left @ right``, float64 ``[d_ff, r]`` and ``[r, d_model]``, and the relative residual of the normal
    equations, ``‖(A + KᵀK) ΔW − KᵀR‖ / ‖KᵀR‖``."""

    left: np.ndarray
    right: np.ndarray
    residual: float


def factorise(solver: Ridge, second_moments, layers: tuple[int, ...]) -> Factor:
    """Factor λC + l2·I of each layer in one batched Cholesky.

    second_moments: see `jaxedit.statistics.SecondMoments`. Raises StatisticsError naming the layers whose matrix is
    not positive definite, which happens when the corpus had fewer tokens than d_ff.
    """
    with jax.enable_x64(True):
        stack = jnp.stack([jnp.asarray(second_moments[l].matrix, jnp.float64) for l in layers])
        chol, condition = _factorise(stack, solver.cov_weight, solver.l2)
        condition = np.asarray(condition)
    bad = [l for l, c in zip(layers, condition, strict=True) if not np.isfinite(c)]
    if bad:
        counts = {l: second_moments[l].count for l in bad}
        raise StatisticsError(
            f"cov_weight·C + l2·I is not positive definite at layers {bad} (tokens counted: {counts}, "
            f"d_ff {stack.shape[-1]}). Count more tokens than d_ff, several times as many if possible, or set "
            "Ridge(l2=...) to a small positive number"
        )
    return Factor(chol, layers, condition, solver)


@jax.jit
def _factorise(stack, weight, l2):
    a = weight * (stack + jnp.swapaxes(stack, -1, -2)) / 2 + l2 * jnp.eye(stack.shape[-1])
    chol = jnp.linalg.cholesky(a)
    return chol, jax.vmap(_condition)(a, chol)


def _condition(a, chol):
    """2-norm condition number by power and inverse power iteration: two products and one solve a step."""
    start = jnp.cos(jnp.arange(a.shape[0], dtype=a.dtype))[:, None]

    def grow(apply):
        def step(carry, _):
            v = carry[0] / jnp.linalg.norm(carry[0])
            w = apply(v)
            return (w, jnp.linalg.norm(w)), None

        return jax.lax.scan(step, (start, jnp.asarray(1.0, a.dtype)), length=_POWER_STEPS)[0][1]

    return grow(lambda v: a @ v) * grow(lambda v: cho_solve((chol, True), v))


def solve(factor: Factor, layer: int, keys, residuals, past_keys=None) -> Solution:
    """The update of one layer for keys ``[n, d_ff]`` and residuals ``[n, d_model]``.

    past_keys: ``[m, d_ff]`` keys whose outputs must stay as they are.
    """
    at = factor.layers.index(layer)
    with jax.enable_x64(True):
        k = jnp.asarray(np.asarray(keys), jnp.float64)
        r = jnp.asarray(np.asarray(residuals), jnp.float64)
        past = jnp.zeros((0, k.shape[1])) if past_keys is None else jnp.asarray(np.asarray(past_keys), jnp.float64)
        wide = k.shape[0] + past.shape[0] >= k.shape[1]
        left, right, residual = (_solve_gram if wide else _solve_woodbury)(factor.chol[at], k, r, past)
        return Solution(np.asarray(left), np.asarray(right), float(residual))


def solve_all(factor: Factor, keys) -> tuple[np.ndarray, np.ndarray]:
    """The operators ``X = (A + KᵀK)⁻¹Kᵀ`` of all layers at once, for keys ``[layers, n, d_ff]``.

    Returns X ``[layers, d_ff, n]`` (so that ΔW = X R) and its relative residual ``[layers]``.
    """
    with jax.enable_x64(True):
        x, residual = jax.jit(jax.vmap(_operator))(factor.chol, jnp.asarray(np.asarray(keys), jnp.float64))
        return np.asarray(x), np.asarray(residual)


def _operator(chol, k):
    z = cho_solve((chol, True), k.T)
    small = jnp.eye(k.shape[0], dtype=k.dtype) + k @ z
    x = cho_solve((jnp.linalg.cholesky(small), True), z.T).T
    return x, _relative(_apply(chol, k, x) - k.T, k.T)


def _apply(chol, k, x):
    """``(A + KᵀK) x`` from the factor of A."""
    return chol @ (chol.T @ x) + k.T @ (k @ x)


def _relative(error, of):
    size = jnp.linalg.norm(of)
    return jnp.where(size == 0, 0.0, jnp.linalg.norm(error) / jnp.where(size == 0, 1.0, size))


@jax.jit
def _solve_woodbury(chol, k, r, past):
    every = jnp.concatenate([past, k])
    z = cho_solve((chol, True), every.T)
    small = jnp.eye(every.shape[0], dtype=k.dtype) + every @ z
    root = jnp.linalg.cholesky((small + small.T) / 2)
    n = k.shape[0]
    wanted = jnp.eye(every.shape[0], dtype=k.dtype)[:, -n:]
    left = z @ cho_solve((root, True), wanted)
    return left, r, _relative(_apply(chol, every, left @ r) - k.T @ r, k.T @ r)


@partial(jax.jit)
def _solve_gram(chol, k, r, past):
    every = jnp.concatenate([past, k])
    total = chol @ chol.T + every.T @ every
    root = jnp.linalg.cholesky(total)
    right = k.T @ r
    delta = solve_triangular(root.T, solve_triangular(root, right, lower=True), lower=False)
    return delta, jnp.eye(r.shape[1], dtype=r.dtype), _relative(_apply(chol, every, delta) - right, right)
