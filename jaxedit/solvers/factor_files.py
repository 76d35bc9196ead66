"""Factors on disk, one layer's a file: safetensors, 4·d_ff² bytes in float64 (67 MB at d_ff 4096, 0.8 GB at 14336)."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np

from jaxedit.cache import cache_dir, write_atomically
from jaxedit.config import EqualityConstrained, Ridge
from jaxedit.solvers.triangle import BLOCK, Triangle, panel_shapes

FORMAT = "jaxedit-factor-1"
_NAMES = {"float64": "F64", "float32": "F32"}
# A core does about 5e10 operations a second and hashes or reads about 1e9 bytes: factoring, d³/3 operations, takes as
# long as hashing the moments and reading and hashing the factor, 12·d² bytes, at d = 1800. At 4096 reading wins.
_WORTH_READING = 4096


def pays_to_keep(d_ff: int, device) -> bool:
    """Whether reading a factor takes less time than making it, which on an accelerator it hardly ever does."""
    return device.platform == "cpu" and d_ff >= _WORTH_READING


def factor_file(matrix: np.ndarray, solver: Ridge | EqualityConstrained, precision: str) -> Path:
    """Where the factor of ``λC + l2·I`` is kept: named after a hash of all that it depends on."""
    about = (FORMAT, matrix.shape, str(matrix.dtype), solver.cov_weight, solver.l2, precision, BLOCK)
    return file_of("factors", about, matrix)


def file_of(folder: str, about: tuple, matrix: np.ndarray) -> Path:
    """Where something made of `matrix` is kept: named after a hash of it and of all else that it depends on."""
    digest = hashlib.blake2b(repr(about).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(matrix).data)
    return cache_dir() / folder / f"{digest.hexdigest()}.safetensors"


def keep_factor(file: Path, triangle: Triangle, condition: float) -> None:
    """Write a factor, whole or not at all; a full or read-only disk gives a warning."""
    arrays = [np.ascontiguousarray(x) for x in _flat(triangle)]
    digest, header, at = hashlib.blake2b(digest_size=16), {}, 0
    for name, x in zip(panel_shapes(triangle.size), arrays, strict=True):
        digest.update(x.data)
        header[name] = {"dtype": _NAMES[x.dtype.name], "shape": x.shape, "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    about = {"format": FORMAT, "key": file.stem, "checksum": digest.hexdigest(), "condition": condition}
    text = json.dumps({"__metadata__": {"jaxedit": json.dumps(about)}, **header}).encode()
    text += b" " * (-len(text) % 8)

    def write(path: Path):
        with open(path, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for x in arrays:
                out.write(x.data)

    try:
        write_atomically(file, write)
    except OSError as error:
        warnings.warn(f"the factor could not be cached: {error}", stacklevel=3)


def read_factor(file: Path, d_ff: int) -> tuple[Triangle, float] | None:
    """What `keep_factor` wrote, memory-mapped, or None. A damaged or foreign file is reported, to be replaced."""
    if not file.exists():
        return None
    try:
        return _read(file, d_ff)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"a cached factor is not usable and is computed again: {file}: {error}", stacklevel=3)
        return None


def _read(file: Path, d_ff: int) -> tuple[Triangle, float]:
    whole = np.memmap(file, np.uint8, "r")
    start = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    header = json.loads(whole[8:start].tobytes())
    about = json.loads(header["__metadata__"]["jaxedit"])
    if (about["format"], about["key"]) != (FORMAT, file.stem):
        raise ValueError("it is the factor of something else")
    data = whole[start:]
    if hashlib.blake2b(data.data, digest_size=16).hexdigest() != about["checksum"]:
        raise ValueError("it is damaged or incomplete")
    dtypes = {name: dtype for dtype, name in _NAMES.items()}
    arrays = []
    for name, shape in panel_shapes(d_ff).items():
        first, last = header[name]["data_offsets"]
        arrays.append(data[first:last].view(dtypes[header[name]["dtype"]]).reshape(shape))
    triangle = Triangle(*(tuple(arrays[i::3]) for i in range(3)))
    return triangle, float(about["condition"])


def _flat(triangle: Triangle) -> list:
    """The arrays in the order of `panel_shapes`."""
    return [x for block in zip(*triangle, strict=True) for x in block]
