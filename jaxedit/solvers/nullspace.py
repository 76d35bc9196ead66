"""Null-space edits: the update that other keys hardly see, because it acts on what they hardly use (AlphaEdit).

P projects onto the eigenvectors of C with small eigenvalues. Published code solves the d_ff × d_ff system

    (P (KᵀK + K_pᵀK_p) + l2·I) ΔW = P KᵀR,

with K_p the keys of earlier edits. Its solution lies in the range of P, where it is that of a symmetric system as large
as there are edits: with ``Kₐ = [K_p; K]`` and E its new rows,

    ΔW = P Kₐᵀ (Kₐ P Kₐᵀ + l2·I)⁻¹ E R.

Earlier keys are kept as rows, and the Cholesky factor of their part of the matrix grows with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import cho_solve, solve_triangular

from jaxedit.config import NullSpace
from jaxedit.data.tokens import round_up
from jaxedit.errors import StatisticsError
from jaxedit.solvers.blas import quiet_blas
from jaxedit.solvers.by_layer import ByLayer
from jaxedit.solvers.ridge import Solution, mix_of, padded, relative_norm, rows_of
from jaxedit.solvers.spectra import spectrum

_EXACT = lax.Precision.HIGHEST
_ROOM = 256


@dataclasses.dataclass(frozen=True, eq=False)
class LayerProjection:
    """P of one layer, and the keys that are protected.

    basis: ``[d_ff, r]`` orthonormal, of the range of P, or of all that is not in it where `complement`. dimension: of
    the range. past: ``[room, d_ff]`` protected keys times P, of which `rows` are used and the others 0; root: ``[room,
    room]`` lower Cholesky factor of ``K_p P K_pᵀ + l2·I``; protected: how many keys were given.
    """

    basis: jax.Array
    complement: bool
    dimension: int
    past: jax.Array
    root: jax.Array
    rows: int = 0
    protected: int = 0
    condition: float = 1.0  # of l2·I, to which edits are added


@dataclasses.dataclass(frozen=True, eq=False)
class Projections(ByLayer[LayerProjection]):
    """Projections of some layers, made by `project` for `solver`."""

    parts: Mapping[int, LayerProjection]
    solver: NullSpace


def project(solver: NullSpace, second_moments, layers: tuple[int, ...], *, cache: bool | None = None) -> Projections:
    """P of each layer, from eigenvectors in float64.

    cache: keep eigenvectors under `jaxedit.cache.cache_dir`, 8·d_ff² bytes a layer, and take them from there; by
    default from d_ff = 1024 up. Raises StatisticsError naming the layers where no eigenvalue is small enough.
    """
    parts, empty = {}, {}
    for l in layers:
        values, vectors = spectrum(second_moments[l].matrix, cache)
        small = count_small(solver, values)
        if small == 0:
            empty[l] = values
        complement = small > len(values) // 2
        with jax.enable_x64(True):
            basis = jnp.asarray(vectors[:, small:] if complement else vectors[:, :small])
            parts[l] = LayerProjection(basis, complement, small, jnp.zeros((0, len(values))), jnp.zeros((0, 0)))
    if empty:
        seen = ", ".join(f"{v[0]:.3g} to {v[-1]:.3g} in layer {l}" for l, v in empty.items())
        raise StatisticsError(
            f"no eigenvalue of the second moments is small by threshold={solver.threshold:g}, "
            f"measure={solver.measure!r}: they are {seen}. Raise the threshold, or use measure='relative' or 'energy', "
            "which do not depend on the scale of the keys"
        )
    return Projections(parts, solver)


def count_small(solver: NullSpace, values: np.ndarray) -> int:
    """How many of the rising eigenvalues are small, by the solver's measure."""
    match solver.measure:
        case "absolute":
            return int(np.sum(np.abs(values) < solver.threshold))
        case "relative":
            return int(np.sum(np.abs(values) < solver.threshold * values[-1]))
        case _:
            energy = np.cumsum(np.maximum(values, 0))
            return int(np.sum(energy <= solver.threshold * energy[-1]))


def solve_projected(projections: Projections, layer: int, keys, residuals) -> Solution:
    """The update of one layer for keys ``[n, d_ff]`` and residuals ``[n, d_model]``, in float64.

    The residual is that of the d_ff × d_ff system, relative to ``P KᵀR``, seen through 16 random combinations of
    columns.
    """
    part = projections[layer]
    k, r = rows_of(keys, part.basis.shape[0], layer), np.asarray(residuals, np.float64)
    with jax.enable_x64(True), quiet_blas(len(k)):
        made = _solve(part.basis, part.complement, part.past, part.root, padded(k), _fill(r, k), projections.solver.l2)
        left, right = (np.asarray(x) for x in made)
        left, right = left[:, : len(k)], right[: len(k)]
        q, past = np.asarray(_project(part.basis, part.complement, k)), np.asarray(part.past)
    probe = mix_of(r.shape[1])
    delta = left @ (right @ probe)
    error = q.T @ (k @ delta - r @ probe) + past.T @ (past @ delta) + projections.solver.l2 * delta
    return Solution(left, right, relative_norm(error, q.T @ (r @ probe)))


def protect_projected(projections: Projections, keys: Mapping[int, np.ndarray]) -> Projections:
    """With all of `keys`, ``{layer: [m, d_ff]}``, protected. Its layers' `protected` first rows are taken to be so."""
    parts = dict(projections.parts)
    for l, part in parts.items():
        d_ff = part.basis.shape[0]
        new = rows_of(keys.get(l, np.zeros((0, d_ff))), d_ff, l)[part.protected :]
        if len(new):
            with jax.enable_x64(True), quiet_blas(len(new)):
                parts[l] = _protect(part, new, projections.solver.l2)
    return dataclasses.replace(projections, parts=parts)


def _protect(part: LayerProjection, new: np.ndarray, l2: float) -> LayerProjection:
    more = padded(new)
    if part.rows + len(more) > len(part.past):
        part = _with_room(part, len(more), l2)
    past, root = _grow(part.basis, part.complement, part.past, part.root, more, part.rows, l2)
    grown = {"rows": part.rows + len(new), "protected": part.protected + len(new)}
    return dataclasses.replace(part, past=past, root=root, **grown)


def _with_room(part: LayerProjection, more: int, l2: float) -> LayerProjection:
    """Room grows in steps, so that few shapes are compiled for a stream of edits, and not far beyond what the keys
    span: then d_ff rows with the same second moment take their place."""
    past = part.past[: part.rows]
    if part.rows > 2 * past.shape[1]:
        past = jnp.linalg.qr(past, mode="r")
    rows = len(past)
    room = round_up(max(_ROOM, 3 * (rows + more) // 2), _ROOM)
    past = jnp.pad(past, ((0, room - rows), (0, 0)))
    root = jnp.linalg.cholesky(_dot(past, past.T) + l2 * jnp.eye(room))
    return dataclasses.replace(part, past=past, root=root, rows=rows)


def _fill(r: np.ndarray, k: np.ndarray) -> np.ndarray:
    return np.pad(r, ((0, len(padded(k)) - len(k)), (0, 0)))


def _dot(a, b):
    return jnp.matmul(a, b, precision=_EXACT)


@partial(jax.jit, static_argnames="complement")
def _project(basis, complement: bool, k):
    inside = _dot(_dot(k, basis), basis.T)
    return k - inside if complement else inside


def _beyond(basis, complement: bool, past, root, k, l2):
    """Keys times P; what of them the protected keys explain, ``root⁻¹ K_p P Kᵀ``; and the factor of what is left."""
    q = _project(basis, complement, k)
    x = solve_triangular(root, _dot(past, k.T), lower=True)
    left_over = _dot(q, k.T) - _dot(x.T, x) + l2 * jnp.eye(len(k))
    return q, x, jnp.linalg.cholesky(left_over)


@partial(jax.jit, static_argnames="complement")
def _solve(basis, complement: bool, past, root, k, r, l2):
    q, x, own = _beyond(basis, complement, past, root, k, l2)
    left = q.T - _dot(past.T, solve_triangular(root, x, lower=True, trans=1))
    return left, cho_solve((own, True), r)


@partial(jax.jit, static_argnames="complement")
def _grow(basis, complement: bool, past, root, k, start, l2):
    """Protect keys ``[n, d_ff]`` in the rows from `start` on, which were not used."""
    q, x, own = _beyond(basis, complement, past, root, k, l2)
    below = lax.dynamic_update_slice(x.T, own, (0, start))  # rows not used have nothing in common with the keys
    return lax.dynamic_update_slice(past, q, (start, 0)), lax.dynamic_update_slice(root, below, (start, 0))
