"""Eigenvectors of second moments, in float64, kept on disk where making them takes longer than reading them."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.cache import write_atomically
from jaxedit.solvers.factor_files import file_of

FORMAT = "jaxedit-spectrum-1"
_WORTH_READING = 1024


def spectrum(matrix: np.ndarray, cache: bool | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rising eigenvalues ``[d]`` and eigenvectors ``[d, d]`` (columns) of a symmetric matrix, in float64.

    On a GPU they are computed there, elsewhere by LAPACK on the host. cache: see `jaxedit.solvers.nullspace.project`.
    """
    keep = len(matrix) >= _WORTH_READING if cache is None else cache
    file = file_of("spectra", (FORMAT, matrix.shape, str(matrix.dtype)), matrix) if keep else None
    found = None if file is None else _read(file, len(matrix))
    if found is not None:
        return found
    symmetric = np.add(matrix, matrix.T, dtype=np.float64) / 2
    if jax.default_backend() == "gpu":
        with jax.enable_x64(True):
            values, vectors = (np.asarray(x) for x in jnp.linalg.eigh(symmetric))
    else:
        values, vectors = np.linalg.eigh(symmetric)
    if file is not None:
        _keep(file, values, vectors)
    return values, vectors


def _keep(file: Path, values: np.ndarray, vectors: np.ndarray) -> None:
    from safetensors.numpy import save_file

    arrays = {"values": values, "vectors": np.ascontiguousarray(vectors)}
    about = {"format": FORMAT, "key": file.stem, "checksum": _checksum(arrays)}
    try:
        write_atomically(file, lambda path: save_file(arrays, path, metadata={"jaxedit": json.dumps(about)}))
    except OSError as error:
        warnings.warn(f"eigenvectors could not be cached: {error}", stacklevel=3)


def _read(file: Path, d: int) -> tuple[np.ndarray, np.ndarray] | None:
    """What `_keep` wrote, or None. A damaged or foreign file is reported, to be replaced."""
    import safetensors

    if not file.exists():
        return None
    try:
        with safetensors.safe_open(file, framework="numpy") as handle:
            about = json.loads((handle.metadata() or {})["jaxedit"])
            arrays = {name: handle.get_tensor(name) for name in ("values", "vectors")}
        if (about["format"], about["key"]) != (FORMAT, file.stem) or arrays["vectors"].shape != (d, d):
            raise ValueError("it is the spectrum of something else")
        if about["checksum"] != _checksum(arrays):
            raise ValueError("it is damaged")
        return arrays["values"], arrays["vectors"]
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        warnings.warn(f"cached eigenvectors are not usable and are computed again: {file}: {error}", stacklevel=3)
        return None


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(arrays[name].data)
    return digest.hexdigest()
