"""What an update is trimmed to before it is written: RECT, PRUNE, AdaEdit.

Updates are ``[d_ff, d_model]``, in float64. Spectral ones work on low-rank factors where the update has them.
"""

from __future__ import annotations

import math

import numpy as np

from jaxedit.config import Regulariser, RelativeSparsify, SpectralClamp, SpectralSparsify

_BASES = {"log": math.e, "log2": 2.0, "log1.5": 1.5, "log1.2": 1.2}


def regularise(how: Regulariser, original: np.ndarray, left: np.ndarray, right: np.ndarray):
    """Trim the update ``left [d_ff, r] @ right [r, d_model]`` of the matrix `original`; returns such factors again."""
    match how:
        case RelativeSparsify():
            delta = sparsify(how, original.astype(np.float64), left @ right)
            return delta, np.eye(delta.shape[1])
        case SpectralClamp():
            return clamp_spectrum(how, original.astype(np.float64), left, right)
        case SpectralSparsify():
            return sparsify_spectrum(how, left, right)


def sparsify(how: RelativeSparsify, original: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """All but the share `keep` of the largest entries set to 0 (RECT)."""
    if how.measure == "absolute":
        size = np.abs(delta)
        drop = int(size.size * (1 - how.keep))
        return _without(delta, np.argpartition(size, drop - 1, axis=None)[:drop] if drop else [])
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.nan_to_num(np.abs(delta / (original + how.epsilon)), nan=0.0, posinf=np.inf)
    order = int(size.size * (1 - how.keep))
    if not order:
        return delta
    return np.where(size >= np.partition(size, order - 1, axis=None)[order - 1], delta, 0.0)


def _without(delta: np.ndarray, index) -> np.ndarray:
    kept = delta.copy()
    kept.reshape(-1)[index] = 0.0
    return kept


def clamp_spectrum(how: SpectralClamp, original: np.ndarray, left: np.ndarray, right: np.ndarray):
    """Singular values of the update that exceed the largest one of `original` brought down (PRUNE)."""
    u, s, v = svd_of_product(left, right)
    most = float(np.linalg.norm(original, 2))
    over = s >= most
    s[over] = (s[over] + most) / 2 if how.growth == "linear" else _log_growth(s[over], most, _BASES[how.growth])
    return u * s, v


def _log_growth(s: np.ndarray, most: float, base: float) -> np.ndarray:
    return (np.log(s) - np.log(most)) / math.log(base) + most


def sparsify_spectrum(how: SpectralSparsify, left: np.ndarray, right: np.ndarray):
    """The largest singular triplets, and of their vectors the largest entries, at the norms they had (AdaEdit)."""
    u, s, v = svd_of_product(left, right)
    most = int(min(len(left), right.shape[1]) * how.rank)
    u, s, v = u[:, :most], s[:most], v[:most]
    return _largest(u, how.keep, 0) * s, _largest(v, how.keep, 1)


def _largest(vectors: np.ndarray, keep: float, axis: int) -> np.ndarray:
    """The share `keep` of the largest entries of each vector along `axis`, all scaled by one factor so that the
    Frobenius norm is what it was."""
    count = int(vectors.shape[axis] * keep)
    order = np.argsort(-np.abs(vectors), axis=axis, kind="stable")
    kept = np.zeros_like(vectors)
    best = np.take(order, range(count), axis=axis)
    np.put_along_axis(kept, best, np.take_along_axis(vectors, best, axis), axis)
    size = np.linalg.norm(kept)
    return kept * (np.linalg.norm(vectors) / size) if size else kept


def svd_of_product(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin SVD of ``left @ right`` without its zero singular values, ``[d_ff, k]``, ``[k]`` and ``[k, d_model]``."""
    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        u, s, v = np.linalg.svd(left @ right, full_matrices=False)
    else:
        q_left, r_left = np.linalg.qr(left)
        q_right, r_right = np.linalg.qr(right.T)
        u, s, v = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
        u, v = q_left @ u, v @ q_right.T
    real = s > max(left.shape[0], right.shape[1]) * np.finfo(s.dtype).eps * s.max(initial=0)
    return u[:, real], s[real], v[real]
