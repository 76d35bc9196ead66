"""The forward pass behind key statistics: sums of ``k kᵀ`` of several layers in one go, on any mesh.

Each step adds the Gram matrices of one batch to a donated accumulator ``[data shards, layers, d_ff, d_ff]``.
A sum over n tokens is thus a sum of batch sums: its rounding error grows with the number of batches, not of
tokens. Gram matrices are symmetric, so only strips of them that cover the upper triangle are computed.
"""

from __future__ import annotations

import secrets
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxedit.data.corpus import Row
from jaxedit.errors import StatisticsError
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import (
    Context,
    Params,
    embed,
    from_key,
    layer,
    run,
    to_key,
    window_of,
)

_STRIPS = 8
_AHEAD = 2  # steps that may wait on the device while the host prepares more


def moments_of_rows(
    params: Params,
    config: ModelConfig,
    rows: Iterable[Row],
    layers: tuple[int, ...],
    *,
    batch: int,
    mesh: Mesh | None = None,
    dtype=None,
    on_tokens: Callable[[int], None] | None = None,
    partial_sums: PartialSums | None = None,
) -> tuple[dict[int, np.ndarray], int]:
    """Mean of ``k kᵀ`` over all tokens of `rows` that are not padding, and their number.

    rows: ``(tokens, positions, segments)``, int32 of one length; see `jaxedit.data.corpus.pack_documents`.
    layers: ascending. batch: rows a step, rounded up to a multiple of the mesh's "data" axis.
    mesh: each device of its "data" axis takes its share of the rows and keeps its own sum until the end.
    dtype: of the sums, by default float32 (float64 for a float64 model).
    on_tokens: called with the number of tokens done, after each step.
    partial_sums: where to checkpoint, and to resume from.
    Returns ``({layer: [d_ff, d_ff]}, count)``. Raises StatisticsError where there are no tokens.
    """
    mesh = mesh if mesh is not None else mesh_of(params)
    shards = 1 if mesh is None else mesh.shape["data"]
    params = _on_mesh(params, mesh)
    total = _zeros((shards, len(layers), config.d_ff, config.d_ff), dtype or wide(_key_dtype(params)), mesh)
    total, skip = (total, 0) if partial_sums is None else partial_sums.restore(total)
    waiting: deque[tuple[jax.Array, int]] = deque()

    def wait(most: int):
        while len(waiting) > most:
            done, count = waiting.popleft()
            done.block_until_ready()
            if on_tokens is not None:
                on_tokens(count)

    count = saved = 0
    for number, arrays in enumerate(_batches(rows, -(-batch // shards) * shards), 1):
        count += int(np.count_nonzero(arrays[2]))
        if number <= skip:
            saved = count
            continue
        total, done = _step(params, total, *_split(arrays, mesh), config=config, layers=layers, mesh=mesh)
        waiting.append((done, count))
        if partial_sums is not None and count - saved >= partial_sums.every:
            partial_sums.save(total, number)
            saved = count
        wait(_AHEAD)
    wait(0)
    if count == 0:
        raise StatisticsError("the corpus holds no tokens, so there is nothing to take moments of")
    return {l: _mean(total[:, i], count) for i, l in enumerate(layers)}, count


@partial(jax.jit, static_argnames=("config", "layers", "mesh"), donate_argnames="total")
def _step(params, total, tokens, positions, segments, *, config: ModelConfig, layers, mesh: Mesh | None):
    """Add one batch to the sums. The second result is ready when the step is done."""

    def share(params, total, tokens, positions, segments):
        strips = 1 if mesh is not None and mesh.shape["model"] > 1 else _STRIPS
        context = Context(positions, segments)
        total = _add_grams(params, config, layers, total[0], tokens, context, strips)[None]
        return total, total[:, 0, 0, 0]

    if mesh is None:
        return share(params, total, tokens, positions, segments)
    data = P("data")
    # Only "data" is split by hand; what is split over "model" stays with the compiler
    split = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=(P(), data, data, data, data),
        out_specs=(data, data),
        axis_names={"data"},
        check_vma=False,
    )
    return split(params, total, tokens, positions, segments)


def _add_grams(params, config: ModelConfig, layers, total, tokens, context: Context, strips: int):
    """Run up to the keys of the last layer, adding each layer's Gram matrix to ``total[slot]``."""
    real = (context.segments > 0)[..., None]

    def add(total, slot, key):
        key = jnp.where(real, key, 0).reshape(-1, config.d_ff)
        return _add_gram(total, slot, key, strips)

    def block(carry, at):
        (h, total), (index, slot) = carry, at
        p = layer(params, index)
        stream, key, _, _ = to_key(p, config, h, context, window_of(config, index))
        return (from_key(p, config, stream, key), add(total, slot, key)), None

    h, at, slot = embed(params, config, tokens, context), 0, 0
    for start, stop in _stretches(layers[:-1]):
        h = run(params, config, h, context, at, start)
        slots = jnp.arange(slot, slot + stop - start)
        (h, total), _ = lax.scan(block, (h, total), (jnp.arange(start, stop), slots))
        at, slot = stop, slot + stop - start
    last = layers[-1]
    h = run(params, config, h, context, at, last)
    key = to_key(layer(params, last), config, h, context, window_of(config, last))[1]
    return add(total, slot, key)


def _add_gram(total, slot, key, strips: int):
    """Add ``keyᵀ key`` to ``total[slot]``, on and right of the diagonal at least; in place."""
    d = key.shape[1]
    # Products of 16-bit keys are exact in float32; of float32 keys they need all passes of the hardware
    precision = lax.Precision.DEFAULT if key.dtype.itemsize == 2 else lax.Precision.HIGHEST
    width = max(-(-d // strips // 128) * 128, 128) if strips > 1 else d
    for a in range(0, d, width):
        gram = jnp.einsum(
            "td,te->de",
            key[:, a : a + width],
            key[:, a:],
            precision=precision,
            preferred_element_type=wide(key.dtype),
        )
        here = (slot, a, a)
        before = lax.dynamic_slice(total, here, (1, *gram.shape))
        total = lax.dynamic_update_slice(total, before + gram[None].astype(total.dtype), here)
    return total


def _mean(total, count: int) -> np.ndarray:
    """The mean, exactly symmetric, from the upper triangle of each device's sum."""
    upper = np.triu(np.asarray(jnp.sum(total, 0)) / count)
    return upper + np.triu(upper, 1).T


def _stretches(layers: tuple[int, ...]) -> list[tuple[int, int]]:
    """Runs of consecutive layers, as (start, stop)."""
    found: list[tuple[int, int]] = []
    for l in layers:
        if found and found[-1][1] == l:
            found[-1] = (found[-1][0], l + 1)
        else:
            found.append((l, l + 1))
    return found


def _batches(rows: Iterable[Row], size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Rows stacked to ``[size, length]`` each; the last batch is filled up with padding, for one shape."""
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if len(held) == size:
            yield tuple(np.stack(column) for column in zip(*held, strict=True))
            held = []
    if held:
        held += [tuple(np.zeros_like(x) for x in held[0])] * (size - len(held))  # type: ignore[list-item]
        yield tuple(np.stack(column) for column in zip(*held, strict=True))


def _key_dtype(params: Params):
    return params["embed"]["tokens"].dtype


def mesh_of(params: Params) -> Mesh | None:
    """The mesh that the weights were loaded on, if any."""
    sharding = params["embed"]["tokens"].sharding
    if isinstance(sharding, NamedSharding) and set(sharding.mesh.axis_names) == {"data", "model"}:
        return sharding.mesh  # type: ignore[return-value]
    return None


def _on_mesh(params: Params, mesh: Mesh | None) -> Params:
    """Weights that are not on the mesh yet are replicated over it."""
    if mesh is None:
        return params
    everywhere = NamedSharding(mesh, P())

    def place(x):
        here = isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh
        return x if here else jax.device_put(x, everywhere)

    return jax.tree.map(place, params)


def _zeros(shape, dtype, mesh: Mesh | None):
    if mesh is None:
        return jnp.zeros(shape, dtype)
    rows = "model" if shape[2] % mesh.shape["model"] == 0 else None
    return jnp.zeros(shape, dtype, device=NamedSharding(mesh, P("data", None, rows)))


def _split(arrays, mesh: Mesh | None):
    return arrays if mesh is None else jax.device_put(arrays, NamedSharding(mesh, P("data")))


class PartialSums:
    """Checkpoints of the sums, written by Orbax: one folder each, named after the batches it has seen.

    folder: holds nothing else. every: tokens between checkpoints.
    A checkpoint appears whole or not at all. Several processes may work on the same sums: each removes only
    its own checkpoints; the first to finish removes the folder.
    """

    def __init__(self, folder: Path, every: int):
        self.folder, self.every = Path(folder).absolute(), every
        self._mine: Path | None = None

    def restore(self, like: jax.Array) -> tuple[jax.Array, int]:
        """The furthest sums, placed as `like` is, and how many batches are in them; or `like` and 0."""
        import orbax.checkpoint as ocp

        target = {"total": jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)}
        found = [p for p in self.folder.glob("after-*-batches-*") if p.name.split("-")[1].isdigit()]
        for path in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
            try:
                with ocp.StandardCheckpointer() as checkpointer:
                    total = checkpointer.restore(path, target)["total"]
                return total, int(path.name.split("-")[1])
            except Exception as error:  # Orbax raises many types on damaged files
                warnings.warn(f"checkpoint {path} is not usable and is ignored: {error}", stacklevel=2)
        return like, 0

    def save(self, total: jax.Array, batches: int) -> None:
        import orbax.checkpoint as ocp

        path = self.folder / f"after-{batches}-batches-{secrets.token_hex(4)}"
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, {"total": total})
        except Exception as error:  # the sums themselves are fine: go on without
            warnings.warn(f"checkpoint {path} could not be written: {error}", stacklevel=2)
            return
        if self._mine is not None:
            shutil.rmtree(self._mine, ignore_errors=True)
        self._mine = path
