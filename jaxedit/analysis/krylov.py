"""Eigenvalues and singular values of Jacobians that are never written out, of n prompts at once.

Everything takes a `Stretch`, or a `Dense` with the same products. Vectors are kept and made orthogonal in float64 on
the host; products have the stretch's dtype.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxedit.errors import JaxEditError
from jaxedit.models.stretch import Stretch, pull, push


@dataclasses.dataclass(frozen=True)
class Dense:
    """Jacobians ``[n, d, d]`` that are written out, with a stretch's products."""

    matrices: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        n, d, _ = self.matrices.shape
        return n, d


def forward(of: Stretch | Dense, v: np.ndarray) -> np.ndarray:
    """``J v`` of each prompt, for ``v [n, …, d]``, float64."""
    return _product(of, v, transposed=False)


def backward(of: Stretch | Dense, u: np.ndarray) -> np.ndarray:
    """``Jᵀ u`` of each prompt, for ``u [n, …, d]``, float64."""
    return _product(of, u, transposed=True)


def _product(of: Stretch | Dense, v: np.ndarray, transposed: bool) -> np.ndarray:
    n, d = of.shape
    flat = v.reshape(n, -1, d)
    if isinstance(of, Dense):
        made = flat @ (of.matrices if transposed else of.matrices.swapaxes(1, 2)).astype(np.float64)
    else:
        found = (pull if transposed else push)(of, flat.swapaxes(0, 1).astype(of.stream.dtype))
        made = np.asarray(found, np.float64).swapaxes(0, 1)
    return made.reshape(v.shape)


def symmetric_product(of: Stretch | Dense, v: np.ndarray) -> np.ndarray:
    """``(J + Jᵀ)/2 v`` of each prompt."""
    return (forward(of, v) + backward(of, v)) / 2


class Extremes(NamedTuple):
    """Of the symmetric part (J + Jᵀ)/2, per prompt: its smallest and largest eigenvalue ``[n]`` and their eigenvectors
    ``[n, d]``; error ``[n, 2]``: each lies within this of an eigenvalue; steps: products it took."""

    smallest: np.ndarray
    largest: np.ndarray
    smallest_vector: np.ndarray
    largest_vector: np.ndarray
    error: np.ndarray
    steps: int


def extremes(of: Stretch | Dense, *, steps: int = 200, tolerance: float = 1e-5, seed: int = 0) -> Extremes:
    """Both ends of the spectrum of the symmetric part by Lanczos with full reorthogonalisation (Theorem 2's premise is
    that the smallest eigenvalue is positive).

    Stops when the error of both ends is below `tolerance` times the larger of them in size, for all prompts, or after
    `steps` products. An error bounds the distance to the nearest eigenvalue; that this is the outermost one is as
    certain as Lanczos is.
    """
    n, d = of.shape
    steps = min(steps, d)
    if steps < 1:
        raise JaxEditError(f"steps must be at least 1, got {steps}")
    basis = np.zeros((n, steps, d))
    diagonal, beside = np.zeros((n, steps)), np.zeros((n, steps))
    v = _unit(np.random.default_rng(seed).standard_normal((n, d)))
    for m in range(steps):
        basis[:, m] = v
        w = symmetric_product(of, v)
        diagonal[:, m] = np.einsum("nd,nd->n", w, v)
        w = _orthogonal(w, basis[:, : m + 1])
        beside[:, m] = np.linalg.norm(w, axis=1)
        if m + 1 == steps or (m + 1) % 8 == 0:
            values, vectors = np.linalg.eigh(_tridiagonal(diagonal[:, : m + 1], beside[:, :m]))
            error = beside[:, m, None] * np.abs(vectors[:, -1][:, [0, -1]])
            if (error <= tolerance * np.abs(values[:, [0, -1]]).max(1, keepdims=True)).all():
                break
        v = _unit(w)
    ends = np.einsum("nmk,nmd->nkd", vectors[:, :, [0, -1]], basis[:, : m + 1])
    return Extremes(values[:, 0], values[:, -1], ends[:, 0], ends[:, 1], error, m + 1)


class Singular(NamedTuple):
    """The largest singular values ``[n, k]``, falling, with ``J v = s u``: left and right vectors ``[n, k, d]``;
    error ``[n, k]``: ‖Jᵀu − s v‖."""

    values: np.ndarray
    left: np.ndarray
    right: np.ndarray
    error: np.ndarray


def leading_singular(of: Stretch | Dense, count: int, *, extra: int = 10, passes: int = 4, seed: int = 0) -> Singular:
    """The `count` largest singular values by randomised SVD (Halko et al. 2011, algorithms 4.4 and 5.1): a basis of
    `count + extra` random vectors, multiplied by J and Jᵀ in turn `passes` times."""
    n, d = of.shape
    width = min(count + extra, d)
    if not 0 < count <= d:
        raise JaxEditError(f"there are {d} singular values; {count} were asked for")
    basis = forward(of, np.random.default_rng(seed).standard_normal((n, width, d)))
    for _ in range(passes):
        basis = forward(of, _rows(backward(of, _rows(basis))))
    basis = _rows(basis)
    small = backward(of, basis)  # Qᵀ J: rows of J in the basis
    u, s, v = np.linalg.svd(small, full_matrices=False)
    left = np.einsum("nwk,nwd->nkd", u[:, :, :count], basis)
    s, right = s[:, :count], v[:, :count]
    error = np.linalg.norm(forward(of, right) - s[..., None] * left, axis=-1)
    return Singular(s, left, right, error)


class Nearby(NamedTuple):
    """Ritz pairs of J from the Krylov space of a direction, the closest to it first: eigenvalues ``[n, k]`` (complex),
    cosine ``[n, k]`` between the direction and the eigenvector (the plane of a complex pair), and error ``[n, k]``:
    ‖J x − θ x‖ for the unit eigenvector x."""

    values: np.ndarray
    cosine: np.ndarray
    error: np.ndarray


def eigenvalues_near(of: Stretch | Dense, direction: np.ndarray, *, steps: int = 30) -> Nearby:
    """Eigenvalues whose eigenvectors make up `direction` ``[n, d]``, by Arnoldi started there: where it is an
    eigenvector, as Theorem 1 asks, the first pair is that, with cosine 1 and no error."""
    n, d = of.shape
    steps = min(steps, d)
    basis, hessenberg = np.zeros((n, steps + 1, d)), np.zeros((n, steps + 1, steps))
    start = _unit(np.asarray(direction, np.float64))
    basis[:, 0] = start
    for m in range(steps):
        w = forward(of, basis[:, m])
        for _ in range(2):
            along = np.einsum("nkd,nd->nk", basis[:, : m + 1], w)
            w = w - np.einsum("nkd,nk->nd", basis[:, : m + 1], along)
            hessenberg[:, : m + 1, m] += along
        hessenberg[:, m + 1, m] = np.linalg.norm(w, axis=1)
        basis[:, m + 1] = _unit(w)
    values, cosine, error = (np.zeros((n, steps), t) for t in (complex, float, float))
    for i in range(n):
        m = _until_closed(hessenberg[i])
        theta, y = np.linalg.eig(hessenberg[i, :m, :m])
        # the plane of a complex pair is that of its real and imaginary part; the direction is the first basis vector
        for k in range(m):
            parts = np.stack([np.real(y[:, k]), np.imag(y[:, k])], 1)
            plane = np.linalg.qr(parts)[0] if theta[k].imag else parts[:, :1]
            cosine[i, k] = np.linalg.norm(plane[0])
        error[i, :m] = abs(hessenberg[i, m, m - 1]) * np.abs(y[-1])
        order = np.argsort(-cosine[i, :m], kind="stable")
        values[i, :m], cosine[i, :m], error[i, :m] = theta[order], cosine[i, order], error[i, order]
        values[i, m:], cosine[i, m:], error[i, m:] = np.nan, 0.0, np.nan
    return Nearby(values, cosine, error)


def _until_closed(hessenberg: np.ndarray) -> int:
    """Steps until the Krylov space stops growing."""
    below = np.abs(np.diagonal(hessenberg, -1))
    closed = np.flatnonzero(below <= 1e-10 * np.abs(hessenberg).max())
    return int(closed[0]) + 1 if len(closed) else len(below)


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-300)


def _orthogonal(w: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Vectors ``[n, d]`` made orthogonal to orthonormal rows ``[n, m, d]``, twice, which is enough."""
    for _ in range(2):
        w = w - np.einsum("nmd,nm->nd", basis, np.einsum("nmd,nd->nm", basis, w))
    return w


def _rows(v: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the rows ``[n, k, d]``."""
    return np.linalg.qr(v.swapaxes(1, 2))[0].swapaxes(1, 2)


def _tridiagonal(diagonal: np.ndarray, beside: np.ndarray) -> np.ndarray:
    m = diagonal.shape[1]
    made = np.zeros((len(diagonal), m, m))
    i = np.arange(m)
    made[:, i, i] = diagonal
    made[:, i[1:], i[:-1]] = made[:, i[:-1], i[1:]] = beside
    return made
