"""Ridge: the update that moves keys to their targets while keeping the second moment of all other keys.

    ΔW = argmin ‖K ΔW − R‖² + λ tr(ΔWᵀ C ΔW) + l2 ‖ΔW‖² = (λC + l2·I + KᵀK)⁻¹ KᵀR

``A = λC + l2·I`` does not depend on the edits: it is factored once, and with ``Z = A⁻¹Kᵀ`` a batch of n < d_ff edits
is ``ΔW = Z (I + KZ)⁻¹ R``: 2 d_ff² n operations, no d_ff × d_ff matrix is inverted, and the update comes out as
low-rank factors. Keys of earlier edits whose outputs must stay as they are belong to A: `absorb` updates the factor to
that of A + KᵀK, so that a further batch costs what it would alone.

Solutions are float64, with a relative residual of the normal equations of at most 1e-10 where the condition number
lets float64 reach it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.errors import JaxEditError
from jaxedit.solvers.blas import quiet_blas
from jaxedit.solvers.factors import Factor, LayerFactor, factorise, plan_factors
from jaxedit.solvers.refine import refine
from jaxedit.solvers.triangle import BLOCK, Triangle, backward, cut, dense, forward, times, turned, update

__all__ = ["Factor", "LayerFactor", "Solution", "absorb", "factorise", "plan_factors", "protect", "solve", "solve_all"]

_PROBES = 16


class Solution(NamedTuple):
    """``ΔW = left @ right``, float64 ``[d_ff, r]`` and ``[r, d_model]``, and the relative residual of the normal
    equations, ``‖(A + KᵀK) ΔW − KᵀR‖ / ‖KᵀR‖``, estimated from 16 random combinations of the columns of ΔW (which
    for the Frobenius norm are right to about 20 %)."""

    left: np.ndarray
    right: np.ndarray
    residual: float


def solve(factor: Factor, layer: int, keys, residuals) -> Solution:
    """The update of one layer for keys ``[n, d_ff]`` and residuals ``[n, d_model]``.

    Keys absorbed into the factor keep their outputs. Raises StatisticsError where a float32 factor is too far off
    to be refined.
    """
    part = factor[layer]
    k, r = rows_of(keys, part.triangle.size, layer), np.asarray(residuals, np.float64)
    mix = mix_of(r.shape[1])
    if len(k) < part.triangle.size:
        if part.matrix is None:
            with jax.enable_x64(True), quiet_blas(len(k)):
                whole = len(k) > r.shape[1]
                found = jax.device_get(_woodbury_on(part.triangle, padded(k), padded(r), mix, whole))
            (left, right, residual), rank = found, min(r.shape)  # keys that are padding have no part in it
            return Solution(left[:, :rank], right[:rank], float(residual))
        x, residual = _operator(part, k, r @ mix)
        return Solution(np.asarray(x), r, float(residual))
    delta, residual = (_wide if part.matrix is None else _wide_refined)(part, k, k.T @ r, mix)
    return Solution(np.asarray(delta), np.eye(r.shape[1]), float(residual))


def solve_all(factor: Factor, keys, layers: tuple[int, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The operators ``X = (A + KᵀK)⁻¹Kᵀ`` of several layers, by default all, for keys ``[layers, n, d_ff]``.

    Returns X ``[layers, d_ff, n]`` (so that ΔW = X R) and its relative residual ``[layers]``, that of R = I. Layers
    on different devices are solved at the same time.
    """
    layers = factor.layers if layers is None else tuple(layers)
    keys = [rows_of(k, factor[l].triangle.size, l) for l, k in zip(layers, keys, strict=True)]
    with quiet_blas(max(map(len, keys))):
        found = [_operator(factor[l], k, mix_of(len(k))) for l, k in zip(layers, keys, strict=True)]
        x = [np.asarray(x)[:, : len(k)] for (x, _), k in zip(found, keys, strict=True)]
    return np.stack(x), np.asarray([float(residual) for _, residual in found])


def absorb(factor: Factor, layer: int, keys) -> Factor:
    """The factor that also protects keys ``[n, d_ff]`` of one layer, of A + KᵀK, in O(d_ff² n). `factor` stays as it
    is."""
    part = factor[layer]
    k = rows_of(keys, part.triangle.size, layer)
    if not len(k):
        return factor
    triangle, dtype = part.triangle, part.triangle.diagonal[0].dtype
    with jax.enable_x64(True), quiet_blas(triangle.size if len(k) >= triangle.size else BLOCK):
        if len(k) >= triangle.size:
            triangle = _rebuild(triangle, padded(k).astype(dtype))
        else:
            for start in range(0, len(k), BLOCK):
                triangle = _update(triangle, padded(k[start : start + BLOCK]).astype(dtype))
        jax.block_until_ready(triangle)
    if isinstance(part.triangle.diagonal[0], np.ndarray):
        triangle = jax.device_get(triangle)
    matrix = None if part.matrix is None else part.matrix + k.T @ k
    grown = dataclasses.replace(part, triangle=triangle, protected=part.protected + len(k), matrix=matrix)
    return dataclasses.replace(factor, parts={**factor.parts, layer: grown})


def protect(factor: Factor, keys: Mapping[int, np.ndarray]) -> Factor:
    """The factor with all of `keys`, ``{layer: [m, d_ff]}``, absorbed at its layers. Its layers' `protected` first
    rows are taken to be absorbed already."""
    for l in factor.layers:
        if l in keys:
            factor = absorb(factor, l, keys[l][factor[l].protected :])
    return factor


def rows_of(keys, d_ff: int, layer: int) -> np.ndarray:
    """Keys ``[n, d_ff]`` in float64. Raises JaxEditError where they have another shape."""
    k = np.asarray(keys, np.float64)
    if k.ndim != 2 or k.shape[1] != d_ff:
        raise JaxEditError(f"keys of layer {layer} have shape {k.shape}, expected (n, {d_ff})")
    return k


def padded(rows: np.ndarray) -> np.ndarray:
    """Rows of zeros added, at most an eighth, so that few sizes are compiled. A key of zeros changes nothing."""
    n = len(rows)
    step = max(8, 2 ** (n.bit_length() - 1) // 8)
    return np.pad(rows, ((0, -n % step), (0, 0)))


def mix_of(columns: int) -> np.ndarray:
    """What to multiply an error from the right with: few columns, and the Frobenius norm stays the same in the mean."""
    if columns <= _PROBES:
        return np.eye(columns)
    return np.random.default_rng(0).normal(size=(columns, _PROBES))


def _operator(part: LayerFactor, k: np.ndarray, right: np.ndarray):
    """``X = (A + KᵀK)⁻¹Kᵀ``, perhaps with further columns of zeros, and its residual as seen through ``X @ right``."""
    if part.matrix is None:
        with jax.enable_x64(True):
            return _woodbury(part.triangle, padded(k), padded(right))
    z = refine(part.matrix, preconditioner(part.triangle), k.T)
    x = np.linalg.solve(np.eye(len(k)) + k @ z, z.T).T
    return x, _residual_on_host(part.matrix, k, x @ right, k.T @ right)


@jax.jit
def _woodbury(t: Triangle, k, right):
    y = forward(t, k.T)
    root = _inner(y)
    x = backward(t, backward(root, forward(root, y.T)).T)
    return x, _residual(t, k, x @ right, k.T @ right)


@partial(jax.jit, static_argnums=4)
def _woodbury_on(t: Triangle, k, r, mix, whole: bool):
    """``Z`` and ``(I + KZ)⁻¹ R``, whose product is ΔW: the inner inverse meets fewer columns than in X.

    whole: ΔW itself and an identity, which is less work where there are more edits than columns.
    """
    y = forward(t, k.T)
    root = _inner(y)
    right = backward(root, forward(root, r))
    if whole:
        y, right = y @ right, jnp.eye(right.shape[1])
    left = backward(t, y)
    return left, right, _residual(t, k, left @ (right @ mix), k.T @ (r @ mix))


def _inner(y) -> Triangle:
    """The factor of ``I + KZ = I + YᵀY``."""
    return cut(jax.lax.linalg.cholesky(turned(y) @ y + jnp.eye(y.shape[1]), symmetrize_input=False))


def _wide(part: LayerFactor, k: np.ndarray, right: np.ndarray, mix: np.ndarray):
    with jax.enable_x64(True):
        return _gram(part.triangle, padded(k), right, mix)


@jax.jit
def _gram(t: Triangle, k, right, mix):
    total = _rebuild(t, k)
    delta = backward(total, forward(total, right))
    return delta, _residual(t, k, delta @ mix, right @ mix)


@jax.jit
def _rebuild(t: Triangle, k) -> Triangle:
    """The factor of A + KᵀK by factoring anew, which is the cheaper way for n of d_ff and more."""
    lower = dense(t)
    exact = jax.lax.Precision.HIGHEST
    gram = jnp.matmul(lower, lower.T, precision=exact) + jnp.matmul(k.T, k, precision=exact)
    return cut(jnp.linalg.cholesky(gram))


@jax.jit
def _update(t: Triangle, k) -> Triangle:
    return update(t, k.T)


def _residual(t: Triangle, k, x, b):
    """``‖(A + KᵀK) x − b‖ / ‖b‖``, with A from its factor."""
    return _relative(times(t, x) + k.T @ (k @ x) - b, b)


def _relative(error, of):
    size = jnp.linalg.norm(of)
    return jnp.where(size == 0, 0.0, jnp.linalg.norm(error) / jnp.where(size == 0, 1.0, size))


def _wide_refined(part: LayerFactor, k: np.ndarray, right: np.ndarray, mix: np.ndarray):
    assert part.matrix is not None
    with jax.enable_x64(True):
        total = _rebuild(part.triangle, padded(k).astype(np.float32))
    delta = refine(part.matrix + k.T @ k, preconditioner(total), right)
    return delta, _residual_on_host(part.matrix, k, delta @ mix, right @ mix)


def preconditioner(t: Triangle):
    """``A⁻¹ r`` on the device, for float64 ``[d_ff, n]`` on the host and back."""

    def apply(r: np.ndarray) -> np.ndarray:
        rows = padded(r.T).astype(np.float32)
        return np.asarray(_precondition(t, rows))[:, : r.shape[1]].astype(np.float64)

    return apply


@jax.jit
def _precondition(t: Triangle, rows):
    return backward(t, forward(t, rows.T))


def _residual_on_host(matrix: np.ndarray, k: np.ndarray, x: np.ndarray, b: np.ndarray) -> float:
    return relative_norm(matrix @ x + k.T @ (k @ x) - b, b)


def relative_norm(error: np.ndarray, of: np.ndarray) -> float:
    """``‖error‖ / ‖of‖`` (Frobenius), 0 where `of` is 0."""
    size = np.linalg.norm(of)
    return float(np.linalg.norm(error) / size) if size else 0.0
