"""Parameters from checkpoint tensors, straight to the devices they live on, in the dtype they will have.

Beside the finished parameters the host holds one shard of one stacked parameter, and one layer's tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxedit.errors import CheckpointError
from jaxedit.models.checkpoint import Checkpoint
from jaxedit.models.config import Axes, ModelConfig, Shape
from jaxedit.models.conversion import Rule, expected_shape, permutation, to_parameters
from jaxedit.sharding import parameter_sharding

_Span = tuple[tuple[int, int], ...]  # (start, stop) along each axis


def read_parameters(
    source: Checkpoint,
    rule: Rule,
    names: Sequence[str],
    declared: Sequence[tuple[Shape, Axes]],
    config: ModelConfig,
    dtype,
    mesh: Mesh | None,
    where: str,
) -> list[jax.Array]:
    """The parameters that one rule fills, from the tensors `names` (one a layer where the rule is stacked).

    declared: shape and logical axes of each of the rule's targets. Only what the devices of this process hold is
    read, where the checkpoint can read parts of a tensor and the layout is a permutation of axes. Raises
    CheckpointError naming a tensor whose shape does not fit.
    """
    inner = [shape[1:] if rule.stacked else shape for shape, _ in declared]
    shards = [_shards(shape, axes, mesh) for shape, axes in declared]
    order = permutation(rule) if source.reads_parts else None
    if order is None:  # each tensor is read once, for all shards
        groups = [[(i, span) for i in range(len(declared)) for span in shards[i]]]
    else:
        _check_shapes(source, names, tuple(inner[0][i] for i in np.argsort(order)), where)
        groups = [[(0, span)] for span in shards[0]]
    placed: list[list[jax.Array]] = [[] for _ in declared]
    for group in groups:
        buffers = [np.empty([stop - start for start, stop in span], dtype) for _, span in group]
        for l, name in enumerate(names):
            if order is None:
                parts = _whole(source, rule, name, inner, config, where)
            for (i, span), buffer in zip(group, buffers, strict=True):
                part_span = span[1:] if rule.stacked else span
                here = tuple(slice(*s) for s in part_span)
                if order is None:
                    part = parts[i][here]
                else:
                    part = source.tensor(name, tuple(here[a] for a in np.argsort(order))).transpose(order)
                buffer[l if rule.stacked else ...] = part
        for (i, span), buffer in zip(group, buffers, strict=True):
            placed[i] += [jax.device_put(buffer, device) for device in shards[i][span]]
        jax.block_until_ready(placed)  # the buffers are free before the next ones are made
    if mesh is None:
        return [arrays[0] for arrays in placed]
    return [
        jax.make_array_from_single_device_arrays(shape, parameter_sharding(mesh, shape, axes), arrays)
        for (shape, axes), arrays in zip(declared, placed, strict=True)
    ]


def _shards(shape: Shape, axes: Axes, mesh: Mesh | None) -> dict[_Span, list]:
    """The different pieces of a parameter that this process holds, and on which devices."""
    if mesh is None:
        return {tuple((0, n) for n in shape): [None]}
    found: dict[_Span, list] = {}
    for device, index in parameter_sharding(mesh, shape, axes).addressable_devices_indices_map(shape).items():
        span = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        found.setdefault(span, []).append(device)
    return found


def _check_shapes(source: Checkpoint, names: Sequence[str], expected: Shape, where: str) -> None:
    for name in names:
        if (shape := source.shape(name)) != expected:
            raise CheckpointError(_misshapen(where, name, shape, expected))


def _whole(source: Checkpoint, rule: Rule, name: str, inner, config: ModelConfig, where: str) -> list[np.ndarray]:
    tensor = source.tensor(name)
    try:
        return to_parameters(rule, tensor, inner, config)
    except ValueError:
        raise CheckpointError(_misshapen(where, name, tensor.shape, expected_shape(rule, inner, config))) from None


def _misshapen(where: str, name: str, shape, expected) -> str:
    return f"{where}: tensor {name!r} has shape {list(shape)}, expected {list(expected)}"
