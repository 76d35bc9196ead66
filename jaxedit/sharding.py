"""Meshes, and where parameters and rows live on one.

A mesh has the axes "data", over which rows are split, and "model", over which parameters are. With several
processes each holds the weights on its own part of the mesh, and computes there; see `jaxedit.distributed`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxedit.errors import JaxEditError
from jaxedit.models.config import Axes, Shape

AXES = ("data", "model")
# Logical axis of a parameter to mesh axis. Heads, MLP channels and the vocabulary are split over "model".
RULES = {"heads": "model", "ff": "model", "vocab": "model", "layer": None, None: None}


def make_mesh(data: int = 1, model: int = 1, devices=None) -> Mesh:
    """This process's part of a mesh with axes ``("data", "model")`` of the given sizes.

    One process: the first ``data · model`` of `devices`, by default of all. With several processes `data` counts
    the shards of all of them, so each must get the same number, and "model" lies within a process.
    Raises JaxEditError where sizes are not positive, do not divide, or there are too few devices.
    """
    processes = jax.process_count() if devices is None else 1
    devices = list(jax.local_devices() if devices is None else devices)
    if data < 1 or model < 1:
        raise JaxEditError(f"the axes of a mesh must be at least 1, got data={data}, model={model}")
    if data % processes:
        raise JaxEditError(f"data={data} cannot be split evenly over {processes} processes; use a multiple of those")
    mine = data // processes
    if mine * model > len(devices):
        each = "" if processes == 1 else f" in each of {processes} processes"
        raise JaxEditError(f"a mesh of {data} x {model} needs {mine * model} devices{each}; {len(devices)} are here")
    grid = np.asarray(devices[: mine * model]).reshape(mine, model)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=4,model=2" as sizes by axis; an axis that is not named has size 1. JaxEditError on anything else."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (x.strip() for x in part.partition("="))
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise JaxEditError(f"{text!r} is not a mesh; write the number of devices on each axis as data=4,model=2")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def parameter_sharding(mesh: Mesh, shape: Shape, axes: Axes) -> NamedSharding:
    """Split the axes that `RULES` assigns to the mesh, where their size divides; the rest is replicated."""
    spec = []
    for size, axis in zip(shape, axes, strict=True):
        name = RULES[axis]
        fits = name in mesh.shape and size % mesh.shape[name] == 0
        spec.append(name if fits else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def mesh_of(params: dict[str, Any]) -> Mesh | None:
    """The mesh that the weights were loaded on, if any."""
    sharding = getattr(params["embed"]["tokens"], "sharding", None)  # NumPy arrays have none
    if isinstance(sharding, NamedSharding) and set(sharding.mesh.axis_names) == set(AXES):
        return sharding.mesh  # type: ignore[return-value]
    return None


def data_shards(mesh: Mesh | None) -> int:
    """Into how many shares this process's rows are split."""
    return 1 if mesh is None else mesh.shape["data"]


def over_data(function: Callable, mesh: Mesh | None, shared: int = 1) -> Callable:
    """`function` run by every device of the "data" axis on its own share of the rows.

    The first `shared` arguments are whole everywhere; every array in the others and in the result has rows as its
    leading axis, a multiple of the "data" axis. What is split over "model" stays with the compiler. Without a
    mesh, `function` itself.
    """
    if mesh is None:
        return function

    def split(*arguments):
        whole, rows = PartitionSpec(), PartitionSpec("data")
        specs = (whole,) * shared + (rows,) * (len(arguments) - shared)
        share = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, axis_names={"data"}, check_vma=False)
        return share(*arguments)

    return split


def place_rows(rows, mesh: Mesh | None):
    """Arrays with their leading axis split over the "data" axis; as they are without a mesh."""
    return rows if mesh is None else jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data")))
