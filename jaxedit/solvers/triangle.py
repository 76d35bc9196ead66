"""A Cholesky factor kept as column panels, and the products a ridge solve is made of.

Solving with a triangular matrix, panel by panel with the inverses of its diagonal blocks at hand, is all matrix
products. A library's triangular solve needs the whole factor in one piece and, on a CPU, transposed first, which
takes as long as solving for a hundred columns; the half of the matrix that is zero is not stored here either.

Only diagonal blocks are inverted: their condition number is at most the square root of the matrix's, so that solving
through the inverses loses no digit that matters (Higham, "Accuracy and Stability of Numerical Algorithms", §14.2).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

BLOCK = 512
_EXACT = jax.lax.Precision.HIGHEST  # float32 products in float32, not in the device's shorter formats


class Triangle(NamedTuple):
    """Lower triangular L ``[d, d]``. Block j is columns ``j·BLOCK`` to ``(j+1)·BLOCK``, the last one narrower.

    diagonal: the blocks ``[b, b]`` on the diagonal; inverse: theirs; below: the rest of each column ``[rows, b]``.
    """

    diagonal: tuple
    inverse: tuple
    below: tuple

    @property
    def size(self) -> int:
        return sum(x.shape[-1] for x in self.diagonal)


def panel_shapes(d: int) -> dict[str, tuple[int, int]]:
    """Name and shape of each array of a triangle ``[d, d]``, block by block."""
    shapes = {}
    for i, start in enumerate(range(0, d, BLOCK)):
        b = min(BLOCK, d - start)
        shapes |= {f"diagonal.{i}": (b, b), f"inverse.{i}": (b, b), f"below.{i}": (d - start - b, b)}
    return shapes


def cut(lower: jax.Array, block: int = BLOCK) -> Triangle:
    """The panels of a lower triangular matrix ``[d, d]``."""
    starts = range(0, lower.shape[0], block)
    diagonal = tuple(lower[j : j + block, j : j + block] for j in starts)
    below = tuple(lower[j + block :, j : j + block] for j in starts)
    return Triangle(diagonal, tuple(_inverse(x) for x in diagonal), below)


def _inverse(x):
    return solve_triangular(x, jnp.eye(x.shape[0], dtype=x.dtype), lower=True)


def dense(t: Triangle) -> jax.Array:
    """L as one matrix ``[d, d]``."""
    columns = [jnp.concatenate([x, rest]) for x, rest in zip(t.diagonal, t.below, strict=True)]
    return jnp.concatenate([jnp.pad(c, ((t.size - len(c), 0), (0, 0))) for c in columns], 1)


def forward(t: Triangle, b: jax.Array) -> jax.Array:
    """``L⁻¹ b`` for ``[d, n]``."""
    found = []
    for inverse, below in zip(t.inverse, t.below, strict=True):
        found.append(_dot(inverse, b[: len(inverse)]))
        b = b[len(inverse) :] - _dot(below, found[-1])
    return jnp.concatenate(found)


def backward(t: Triangle, y: jax.Array) -> jax.Array:
    """``L⁻ᵀ y`` for ``[d, n]``."""
    y = turned(y)
    x, stop = y[:, :0], y.shape[1]
    for inverse, below in zip(t.inverse[::-1], t.below[::-1], strict=True):
        start = stop - len(inverse)
        x = jnp.concatenate([_dot(y[:, start:stop] - _dot(x, below), inverse), x], 1)
        stop = start
    return x.T


def times(t: Triangle, v: jax.Array) -> jax.Array:
    """``L Lᵀ v`` for ``[d, n]``, reading L once."""
    out, rest, v = [], jnp.zeros_like(v), turned(v)
    for diagonal, below in zip(t.diagonal, t.below, strict=True):
        b = len(diagonal)
        u = turned(_dot(v[:, :b], diagonal) + _dot(v[:, b:], below))
        out.append(rest[:b] + _dot(diagonal, u))
        rest, v = rest[b:] + _dot(below, u), v[:, b:]
    return jnp.concatenate(out)


def update(t: Triangle, v: jax.Array) -> Triangle:
    """The factor of ``L Lᵀ + v vᵀ``, v ``[d, n]``, in O(d² (b + n)² / b).

    Block by block, an orthogonal Q takes ``[L_jj v_j]`` to ``[L'_jj 0]``; the columns below turn with it. Q comes
    from a QR factorisation, which is stable whatever the condition number.
    """
    diagonal, below = [], []
    for old, rest in zip(t.diagonal, t.below, strict=True):
        b = len(old)
        q, r = jnp.linalg.qr(jnp.concatenate([old, v[:b]], 1).T, mode="complete")
        sign = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(r.dtype)
        diagonal.append(jnp.tril((sign[:, None] * r[:b]).T))
        turned = _dot(jnp.concatenate([rest, v[b:]], 1), q)
        below.append(turned[:, :b] * sign)
        v = turned[:, b:]
    return Triangle(tuple(diagonal), tuple(_inverse(x) for x in diagonal), tuple(below))


def turned(x):
    """``xᵀ``, laid out as such: products with a factor's panels turned instead are slower, on a CPU."""
    return jax.lax.optimization_barrier(x.T)


def _dot(a, b):
    return jnp.matmul(a, b, precision=_EXACT)
