"""Several processes, on one host or many, working on the same edit.

Each process runs the same program. It holds the weights on its own devices (see `jaxedit.sharding.make_mesh`), takes
its share of the rows or edits, and meets the others only to add up sums or to exchange anchors; the layer loop and
the solve are small and every process does them for itself. Files are written by process 0. With several hosts the
cache (JAXEDIT_CACHE) should be on a file system that all of them see: what only some processes find is not used.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxedit.errors import JaxEditError

_PATIENCE = 7 * 24 * 3600 * 1000  # milliseconds that a process waits for the others' share of the work


def connect(coordinator: str, processes: int, process_id: int) -> None:
    """Join the other processes; must come before anything is computed or a model is loaded.

    coordinator: "host:port" of process 0, the same for all; processes: how many there are; process_id: which of
        them this is, from 0. A process that dies takes the others down within about two minutes, so that all can be
        started again.
    Raises JaxEditError where an argument is wrong, JAX has been used already, or not all processes came.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise JaxEditError(f"coordinator {coordinator!r} is not of the form host:port, such as 10.0.0.1:1234")
    if processes < 1 or not 0 <= process_id < processes:
        raise JaxEditError(
            f"process {process_id} of {processes} cannot be; processes are numbered from 0 to processes - 1"
        )
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except RuntimeError as error:
        raise JaxEditError(
            f"process {process_id} could not join {processes} processes at {coordinator}: {error}"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def meet(what: str) -> None:
    """Wait for all processes. Collectives give up on late comers after seconds, so this comes before each of them."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=f"jaxedit {what}", timeout_ms=_PATIENCE)


def gather(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, which have one shape and dtype, on a new leading axis; to the last bit."""
    array = np.ascontiguousarray(array)
    count = jax.process_count()
    if count == 1 or array.size == 0:
        return np.stack([array] * count)
    from jax.experimental import multihost_utils

    meet("gather")
    raw = multihost_utils.process_allgather(array.reshape(-1).view(np.uint8))  # bytes, or float64 might be rounded
    return np.asarray(raw).reshape(count, -1).view(array.dtype).reshape(count, *array.shape)


def agree(mine: bool) -> bool:
    """Whether `mine` holds in every process."""
    return bool(gather(np.asarray([mine])).all())


def gather_bytes(data: bytes) -> list[bytes]:
    """What each process brings, which may differ in size."""
    sizes = gather(np.asarray([len(data)]))[:, 0]
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return [row[:size].tobytes() for row, size in zip(gather(padded), sizes, strict=True)]


def check_same(what: str, content: Any) -> None:
    """Raise JaxEditError unless all processes bring the same content (compared by its repr)."""
    if jax.process_count() > 1:
        digest = hashlib.blake2b(repr(content).encode(), digest_size=16).digest()
        if len(set(gather_bytes(digest))) > 1:
            raise JaxEditError(f"the processes have different {what}; give all of them the same arguments")


def sum_shards(total: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The sum ``[1, …]`` over the leading axis of `total`, and over all processes; every process has all of it.

    total: ``[shards, …]`` with its leading axis split over "data". In one process with one shard, `total` itself.
    """
    if len(total) == 1 and jax.process_count() == 1:
        return total
    assert mesh is not None
    rest = tuple(total.sharding.spec)[1:]  # type: ignore[attr-defined]
    meet("sum")
    whole = _over_processes(mesh)
    shape = (len(total) * jax.process_count(), *total.shape[1:])
    lifted = _view(total, shape, NamedSharding(whole, PartitionSpec("data", *rest)))
    summed = _sum(lifted, NamedSharding(whole, PartitionSpec(None, *rest)))
    return _view(summed, summed.shape, NamedSharding(mesh, PartitionSpec(None, *rest)))


@partial(jax.jit, static_argnames="to")
def _sum(x, to: NamedSharding):
    return lax.with_sharding_constraint(jnp.sum(x, 0, keepdims=True), to)


def _view(x: jax.Array, shape, sharding: NamedSharding) -> jax.Array:
    """The same buffers seen as an array of all processes, or of this one."""
    return jax.make_array_from_single_device_arrays(shape, sharding, [s.data for s in x.addressable_shards])


def _over_processes(mesh: Mesh) -> Mesh:
    """The mesh of all processes of which `mesh` is this one's part: their parts one below the other."""
    places = [jax.local_devices().index(d) for d in mesh.devices.flat]
    parts = []
    for process in range(jax.process_count()):
        devices = jax.local_devices(process)
        parts.append(np.asarray([devices[i] for i in places]).reshape(mesh.devices.shape))
    return Mesh(np.concatenate(parts), mesh.axis_names, axis_types=mesh.axis_types)
