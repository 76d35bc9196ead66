"""The forward pass behind key statistics: sums of ``k kᵀ`` of several layers in one go, on any mesh.

Each step adds the Gram matrices of one batch to a donated accumulator ``[data shards, layers, d_ff, d_ff]``.
A sum over n tokens is thus a sum of batch sums: its rounding error grows with the number of batches, not of
tokens. Gram matrices are symmetric, so only what covers the upper triangle is computed; see the kernel's folder.
"""

from __future__ import annotations

import re
import secrets
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxedit_kernels.second_moment import second_moment, xla

from jaxedit.data.corpus import Row
from jaxedit.distributed import agree, gather_bytes, is_first, sum_shards
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
from jaxedit.sharding import data_shards, make_mesh, mesh_of, over_data, place_rows

_NAME = r"after-\d+-rows-\w+"
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
    implementation: str = "xla",
) -> tuple[dict[int, np.ndarray], int]:
    """Mean of ``k kᵀ`` over all tokens of `rows` that are not padding, and their number.

    rows: ``(tokens, positions, segments)``, int32 of one length; see `jaxedit.data.corpus.pack_documents`.
        Several processes are given the same rows; of each batch every one runs its share.
    layers: ascending. batch: rows a step of all devices together, rounded up to a multiple of their number.
    mesh: each device of its "data" axis takes its share of the rows and keeps its own sum until the end.
    dtype: of the sums, by default float32 (float64 for a float64 model).
    on_tokens: called with the number of tokens done, after each step.
    partial_sums: where to checkpoint, and to resume from.
    implementation: of the Gram products; see `jaxedit_kernels.second_moment`.
    Returns ``({layer: [d_ff, d_ff]}, count)``, the same in all processes. Raises StatisticsError where there are no
    tokens.
    """
    mesh = mesh if mesh is not None else mesh_of(params)
    if mesh is None and jax.process_count() > 1:
        mesh = make_mesh(devices=list(params["embed"]["tokens"].devices()))
    params = _on_mesh(params, mesh)
    shape = (len(layers), config.d_ff, config.d_ff)
    total = _zeros((data_shards(mesh), *shape), dtype or wide(_key_dtype(params)), mesh)
    total, seen = (total, 0) if partial_sums is None else partial_sums.restore(total, mesh)
    waiting: deque[tuple[jax.Array, int]] = deque()

    def wait(most: int):
        while len(waiting) > most:
            done, count = waiting.popleft()
            done.block_until_ready()
            if on_tokens is not None:
                on_tokens(count)

    step = partial(_step, config=config, layers=layers, mesh=mesh, implementation=implementation)
    rows = iter(rows)
    count = saved = sum(int(np.count_nonzero(segments)) for *_, segments in islice(rows, seen))
    workers = data_shards(mesh) * jax.process_count()
    for held, arrays in _batches(rows, -(-batch // workers) * workers):
        seen, count = seen + held, count + int(np.count_nonzero(arrays[2]))
        mine = np.split(np.stack(arrays), jax.process_count(), 1)[jax.process_index()]
        total, done = step(params, total, *place_rows(tuple(mine), mesh))
        waiting.append((done, count))
        if partial_sums is not None and count - saved >= partial_sums.every:
            total = partial_sums.save(total, seen, mesh)
            saved = count
        wait(_AHEAD)
    wait(0)
    if count == 0:
        raise StatisticsError("the corpus holds no tokens, so there is nothing to take moments of")
    means = {}
    for i, l in enumerate(layers):
        means[l] = _mean(sum_shards(_placed(total[:, i : i + 1], mesh), mesh)[0], count)
    return means, count


@partial(jax.jit, static_argnames=("config", "layers", "mesh", "implementation"), donate_argnames="total")
def _step(
    params, total, tokens, positions, segments, *, config: ModelConfig, layers, mesh: Mesh | None, implementation: str
):
    """Add one batch to the sums. The second result is ready when the step is done."""

    def share(params, total, tokens, positions, segments):
        # Keys split over "model" by columns are multiplied by the compiler, in one piece
        whole = mesh is None or mesh.shape["model"] == 1
        gram = partial(second_moment, implementation=implementation) if whole else partial(xla.second_moment, strips=1)
        context = Context(positions, segments)
        total = _add_grams(params, config, layers, total[0], tokens, context, gram)[None]
        return total, total[:, 0, 0, 0]

    return over_data(share, mesh)(params, total, tokens, positions, segments)


def _add_grams(params, config: ModelConfig, layers, total, tokens, context: Context, gram):
    """Run up to the keys of the last layer, adding each layer's Gram matrix to ``total[slot]``."""
    real = (context.segments > 0)[..., None]

    def add(total, slot, key):
        key = jnp.where(real, key, 0).reshape(-1, config.d_ff)
        return gram(key, total, slot=slot)

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


def _mean(total, count: int) -> np.ndarray:
    """The mean ``[d_ff, d_ff]``, exactly symmetric, from the upper triangle of the sum ``[1, d_ff, d_ff]``."""
    upper = np.triu(np.asarray(total[0]) / count)
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


def _batches(rows: Iterator[Row], size: int) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """How many rows, and the rows stacked to ``[size, length]``, filled up with padding so that there is one shape."""
    while held := list(islice(rows, size)):
        spare = [tuple(np.zeros_like(x) for x in held[0])] * (size - len(held))
        yield len(held), tuple(np.stack(column) for column in zip(*held, *spare, strict=True))


def _key_dtype(params: Params):
    return params["embed"]["tokens"].dtype


def _on_mesh(params: Params, mesh: Mesh | None) -> Params:
    """Weights that are not on the mesh yet are replicated over it."""
    if mesh is None:
        return params
    everywhere = NamedSharding(mesh, P())

    def place(x):
        here = isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh
        return x if here else jax.device_put(x, everywhere)

    return jax.tree.map(place, params)


def _sharding(d_ff: int, mesh: Mesh) -> NamedSharding:
    rows = "model" if d_ff % mesh.shape["model"] == 0 else None
    return NamedSharding(mesh, P("data", None, rows))


def _zeros(shape, dtype, mesh: Mesh | None):
    return jnp.zeros(shape, dtype, device=None if mesh is None else _sharding(shape[2], mesh))


def _placed(total, mesh: Mesh | None):
    return total if mesh is None else jax.device_put(total, _sharding(total.shape[2], mesh))


class PartialSums:
    """Checkpoints of the sums over all shards, written by Orbax: one folder each, named after the rows it has seen.

    folder: holds nothing else. every: tokens between checkpoints.
    A checkpoint fits any mesh, batch size and number of processes. It appears whole or not at all. Independent runs
    may work on the same sums: each removes only its own checkpoints; the first to finish removes the folder.
    """

    def __init__(self, folder: Path, every: int):
        self.folder, self.every = Path(folder).absolute(), every
        self._mine: Path | None = None

    def restore(self, total: jax.Array, mesh: Mesh | None) -> tuple[jax.Array, int]:
        """The furthest sums that all processes can read and how many rows are in them; or `total` and 0."""
        found = [p.name for p in self.folder.glob("after-*") if re.fullmatch(_NAME, p.name)]  # whole ones
        names = gather_bytes(" ".join(sorted(found, key=_rows_of, reverse=True)).encode())[0].decode()
        for name in names.split():
            try:
                with _checkpointer() as checkpointer:
                    like = np.empty((1, *total.shape[1:]), total.dtype)
                    sums = checkpointer.restore(self.folder / name, {"total": like})["total"]
            except Exception as error:  # Orbax raises many types on damaged files
                warnings.warn(f"checkpoint {self.folder / name} is not usable and is ignored: {error}", stacklevel=2)
                sums = None
            if agree(sums is not None) and sums is not None:
                return _spread(sums, total.shape[0], mesh), _rows_of(name)
        return total, 0

    def save(self, total: jax.Array, rows: int, mesh: Mesh | None) -> jax.Array:
        """Write the sums; returns them as a run that resumes from here would have them, so that both end alike."""
        sums = sum_shards(_placed(total, mesh), mesh)
        if is_first():
            path = self.folder / f"after-{rows}-rows-{secrets.token_hex(4)}"
            try:
                with _checkpointer() as checkpointer:
                    checkpointer.save(path, {"total": np.asarray(sums)})
                if self._mine is not None:
                    shutil.rmtree(self._mine, ignore_errors=True)
                self._mine = path
            except Exception as error:  # the sums themselves are fine: go on without
                warnings.warn(f"checkpoint {path} could not be written: {error}", stacklevel=2)
        return _spread(sums, total.shape[0], mesh)


def _rows_of(name: str) -> int:
    return int(name.split("-")[1])


def _checkpointer():
    """Of this process alone: the sums are whole in each, and no process should wait while another writes."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"p{me}")
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def _spread(sums, shards: int, mesh: Mesh | None) -> jax.Array:
    """Sums ``[1, …]`` as an accumulator: all of it in the first shard of the first process."""
    if mesh is None:
        return jnp.asarray(sums)
    split = _sharding(sums.shape[2], mesh)
    mine = jax.device_put(
        sums if is_first() else np.zeros(sums.shape, sums.dtype), NamedSharding(mesh, P(None, *split.spec[1:]))
    )
    return _widened(mine, shards, split)


@partial(jax.jit, static_argnames=("shards", "to"))
def _widened(sums, shards: int, to: NamedSharding):
    rest = jnp.zeros((shards - 1, *sums.shape[1:]), sums.dtype)
    return lax.with_sharding_constraint(jnp.concatenate([sums, rest]), to)
