"""Meshes, and where each parameter lives on one."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxedit.errors import JaxEditError
from jaxedit.models.config import Axes, Shape

# Logical axis of a parameter to mesh axis. Heads, MLP channels and the vocabulary are split over "model".
RULES = {"heads": "model", "ff": "model", "vocab": "model", "layer": None, None: None}


def make_mesh(data: int = 1, model: int = 1, devices=None) -> Mesh:
    """A mesh with axes ``("data", "model")``; raises JaxEditError where there are too few devices."""
    devices = list(jax.devices() if devices is None else devices)
    if data * model > len(devices):
        raise JaxEditError(f"a mesh of {data} x {model} needs {data * model} devices; {len(devices)} are here")
    grid = np.asarray(devices[: data * model]).reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def parameter_sharding(mesh: Mesh, shape: Shape, axes: Axes) -> NamedSharding:
    """Split the axes that `RULES` assigns to the mesh, where their size divides; the rest is replicated."""
    spec = []
    for size, axis in zip(shape, axes, strict=True):
        name = RULES[axis]
        fits = name in mesh.shape and size % mesh.shape[name] == 0
        spec.append(name if fits else None)
    return NamedSharding(mesh, PartitionSpec(*spec))
