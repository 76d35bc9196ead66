"""Content fingerprints of weights, cheap enough to check on every call.

Each array is reduced on its device to two integer sums over its scrambled bits, one of them weighted by position;
integer sums do not depend on order or device, so a sharded copy has the same fingerprint. The sums, names, shapes and
dtypes are then hashed. This detects another model; it is no defence against someone who wants two models to collide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxedit.models.config import ModelConfig
from jaxedit.models.conversion import flatten
from jaxedit.models.transformer import Params


@jax.jit
def _sums(x):
    bits = lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize])
    bits = bits.astype(jnp.uint32).ravel()
    # A sum of the bits as they are would not see a matrix that is doubled, or two signs that change
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    bits = bits ^ (bits >> 16)
    place = lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) + jnp.uint32(1)
    return jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * (place | 1), dtype=jnp.uint32)


@partial(jax.jit, static_argnames="stop")
def _first(x, stop: int):
    return x[:stop]


def fingerprint(params: Params, config: ModelConfig, stop: int, edited: bool) -> str:
    """Fingerprint of the embedding and of blocks ``0 … stop - 1``.

    edited: whether the matrices that editing changes count. Without them a model and its edited versions agree,
    which is what second moments are checked by; with them they differ, which is what caches are keyed by.
    """
    parts = (
        (path, _first(x, stop) if path.startswith("blocks.") else x)
        for path, x in sorted(flatten({"embed": params["embed"], "blocks": params["blocks"]}).items())
        if edited or path != "blocks.down.w"
    )
    return _digest((config, stop, edited), parts)


def whole_fingerprint(params: Params, config: ModelConfig) -> str:
    """Fingerprint of every weight, for what depends on the model's output."""
    return _digest(config, sorted(flatten(params).items()))


def _digest(about, arrays: Iterable[tuple[str, jax.Array]]) -> str:
    digest = hashlib.blake2b(repr(about).encode(), digest_size=16)
    for path, x in arrays:
        digest.update(f"{path} {x.shape} {x.dtype}".encode())
        for total in _sums(x):
            digest.update(np.asarray(total).tobytes())
    return digest.hexdigest()


def matrix_hash(matrix: np.ndarray) -> str:
    """Hash of a matrix's values: 16-bit ones as float32, so that a checkpoint loaded wider has the same hash."""
    values = np.ascontiguousarray(matrix, np.promote_types(matrix.dtype, np.float32))
    return hashlib.blake2b(values.tobytes() + repr(values.shape).encode(), digest_size=16).hexdigest()
