"""Factors of the edited layers' ridge matrices: made together, spread over devices, kept where they fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxedit.config import EqualityConstrained, Ridge
from jaxedit.errors import JaxEditError, StatisticsError
from jaxedit.memory import USABLE, free_bytes
from jaxedit.solvers.by_layer import ByLayer
from jaxedit.solvers.factor_files import factor_file, keep_factor, pays_to_keep, read_factor
from jaxedit.solvers.triangle import Triangle, backward, cut, forward, panel_shapes, times

_POWER_STEPS = 12


@dataclasses.dataclass(frozen=True, eq=False)
class LayerFactor:
    """The factor of one layer's A, and of the `protected` keys absorbed into it.

    triangle: of A + KᵀK; on a device, or NumPy arrays where factors are streamed. condition: estimated 2-norm
    condition number of A without keys. matrix: A + KᵀK in float64 ``[d_ff, d_ff]`` on the host, where the triangle
    is float32.
    """

    triangle: Triangle
    condition: float
    protected: int = 0
    matrix: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Factor(ByLayer[LayerFactor]):
    """Factors of some layers, made by `factorise` for `solver`; each is solved with on the device where it lies."""

    parts: Mapping[int, LayerFactor]
    solver: Ridge | EqualityConstrained

    @property
    def condition(self) -> np.ndarray:
        return np.asarray([part.condition for part in self.parts.values()])


def factorise(
    solver: Ridge | EqualityConstrained,
    second_moments,
    layers: tuple[int, ...],
    *,
    mesh: Mesh | None = None,
    precision: Literal["float64", "float32"] | None = None,
    placement: Literal["resident", "streamed"] | None = None,
    cache: bool | None = None,
) -> Factor:
    """Factor λC + l2·I of each layer, all layers in one batched Cholesky.

    second_moments: see `jaxedit.statistics.SecondMoments`.
    mesh: spread whole layers over its devices (of those that belong to this process); by default the first device
        has them all.
    precision: of the factor; "float32" (the default on a TPU) is refined to the same residual as "float64".
    placement: "resident" on the device, or "streamed": factored one by one and kept in host memory. By default
        what `jaxedit.solvers.factors.plan_factors` finds for the memory that is free now.
    cache: keep factors under `jaxedit.cache.cache_dir`, 4·d_ff² bytes a layer, and take them from there. By default
        on a CPU from d_ff = 4096 up, where reading one is several times faster than making it.

    Raises StatisticsError naming the layers whose matrix is not positive definite, which happens when the corpus had
    fewer tokens than d_ff.
    """
    layers = tuple(layers)
    matrices = {l: second_moments[l].matrix for l in layers}
    d_ff = len(matrices[layers[0]])
    devices = _devices(mesh)
    each = math.ceil(len(layers) / len(devices))
    home = {l: devices[i // each] for i, l in enumerate(layers)}
    precision = precision or ("float32" if devices[0].platform == "tpu" else "float64")
    if placement is None:
        free = free_memory(devices)
        placement = "resident"
        if free is not None:
            placement = plan_factors(d_ff, len(layers), free, 0, precision=precision, devices=len(devices))
    streamed = placement == "streamed"
    cache = pays_to_keep(d_ff, devices[0]) if cache is None else cache
    files = {l: factor_file(m, solver, precision) for l, m in matrices.items()} if cache else {}
    found = {l: kept for l, file in files.items() if (kept := read_factor(file, d_ff)) is not None}
    missing = [l for l in layers if l not in found]
    with jax.enable_x64(True):
        for group in [[l] for l in missing] if streamed else [missing] if missing else []:
            made = _factor_group([matrices[l] for l in group], solver, devices, precision)
            found |= dict(zip(group, jax.device_get(made) if streamed else made, strict=True))
        _refuse_indefinite(found, second_moments, d_ff, precision)
        for l in missing if cache else []:
            keep_factor(files[l], jax.device_get(found[l][0]), float(found[l][1]))
        if not streamed:
            found = {l: jax.device_put(made, home[l]) for l, made in found.items()}
    exact = {l: _matrix(m, solver) if precision == "float32" else None for l, m in matrices.items()}
    return Factor({l: LayerFactor(found[l][0], float(found[l][1]), 0, exact[l]) for l in layers}, solver)


def _devices(mesh: Mesh | None) -> list:
    if mesh is None:
        return jax.local_devices()[:1]
    return [d for d in mesh.devices.flat if d.process_index == jax.process_index()]


def _refuse_indefinite(found, second_moments, d_ff: int, precision: str) -> None:
    bad = [l for l in sorted(found) if not np.isfinite(found[l][1])]
    if not bad:
        return
    counts = {l: second_moments[l].count for l in bad}
    also = "" if precision == "float64" else "precision='float64', which takes condition numbers above 1e7, or "
    raise StatisticsError(
        f"cov_weight·C + l2·I is not positive definite at layers {bad} (tokens counted: {counts}, "
        f"d_ff {d_ff}). Count more tokens than d_ff, several times as many if possible, or set "
        f"{also}Ridge(l2=...) to a small positive number"
    )


def _matrix(c: np.ndarray, solver: Ridge | EqualityConstrained) -> np.ndarray:
    a = np.add(c, c.T, dtype=np.float64)
    a *= solver.cov_weight / 2
    a.flat[:: len(a) + 1] += solver.l2
    return a


def _factor_group(matrices: list, solver: Ridge | EqualityConstrained, devices: list, precision: str) -> list:
    """``(triangle, condition)`` of each matrix. Every device factors as many whole matrices as any other; what is
    missing for that is filled up with the identity."""
    each = math.ceil(len(matrices) / len(devices))
    devices = devices[: math.ceil(len(matrices) / each)]
    mesh = Mesh(np.asarray(devices), ("layer",), axis_types=(AxisType.Auto,))
    d = len(matrices[0])
    dtype = np.float32 if precision == "float32" else matrices[0].dtype

    def rows(index):
        start, stop, _ = index[0].indices(each * len(devices))
        filled = matrices[start:stop] + [np.eye(d)] * (stop - max(start, len(matrices)))
        return np.stack([np.asarray(m, dtype) for m in filled])

    shape = (each * len(devices), d, d)
    stack = jax.make_array_from_callback(shape, NamedSharding(mesh, P("layer")), rows)
    chol = _cholesky(stack, solver.cov_weight, solver.l2, mesh=mesh, dtype=precision)
    on = {shard.device: shard.data for shard in chol.addressable_shards}
    return [_panels(on[devices[i // each]], i % each) for i in range(len(matrices))]


@partial(jax.jit, static_argnames=("mesh", "dtype"))
def _cholesky(stack, weight, l2, *, mesh, dtype):
    """The factors of all layers, batched, on each device those that lie there.

    On a CPU one layer after the other: JAX's batched LAPACK calls wait, within the pool's threads, for tasks that
    they give to the same pool, so that two devices that share it can block each other for ever.
    """
    one_by_one = mesh.devices.flat[0].platform == "cpu"
    half, ridge = jnp.asarray(weight / 2, dtype), jnp.asarray(l2, dtype)

    def here(stack):
        stack = stack.astype(dtype)
        a = half * (stack + jnp.swapaxes(stack, 1, 2)) + ridge * jnp.eye(stack.shape[1], dtype=dtype)
        factor = partial(jnp.linalg.cholesky, symmetrize_input=False)
        return jax.lax.map(factor, a) if one_by_one else factor(a)

    return jax.shard_map(here, mesh=mesh, in_specs=P("layer"), out_specs=P("layer"))(stack)


@jax.jit  # one layer at a time, for the same reason as in `_cholesky`
def _panels(chol, i):
    triangle = cut(chol[i])
    return triangle, _condition(triangle)


def _condition(t: Triangle):
    """2-norm condition number by power and inverse power iteration."""
    start = jnp.cos(jnp.arange(t.size, dtype=t.diagonal[0].dtype))[:, None]

    def grow(apply):
        def step(v, _):
            w = apply(v / jnp.linalg.norm(v))
            return w, jnp.linalg.norm(w)

        return jax.lax.scan(step, start, length=_POWER_STEPS)[1][-1]

    return grow(partial(times, t)) * grow(lambda v: backward(t, forward(t, v)))


def plan_factors(
    d_ff: int,
    layers: int,
    device_memory: int,
    weights_bytes: int,
    *,
    precision: str = "float64",
    devices: int = 1,
) -> Literal["resident", "streamed"]:
    """Whether all layers can be factored at once and their factors stay on the device beside the model.

    layers: how many; devices: over how many they are spread. device_memory, weights_bytes: on each, in bytes.

    "resident" needs, for every layer on a device, the matrix, its Cholesky factor and the panels kept of it, 2.5 d_ff²
    numbers. Otherwise "streamed": one layer is factored at a time, factors are kept in host memory, and each goes
    to the device when its layer is solved. Raises JaxEditError where not even one layer fits.
    """
    one = factoring_bytes(d_ff, precision)
    free = USABLE * device_memory - weights_bytes
    if one > free:
        raise JaxEditError(
            f"factoring one layer of d_ff {d_ff} in {precision} takes {one / 1e9:.1f} GB of device memory; "
            f"{max(free, 0) / 1e9:.1f} GB are free. Use a mesh with more devices to split the weights, "
            "precision='float32', or run the edit on the CPU"
        )
    return "resident" if math.ceil(layers / devices) * one <= free else "streamed"


def factoring_bytes(d_ff: int, precision: str = "float64") -> int:
    """Device memory that factoring one layer takes: its matrix, the Cholesky factor, and its panels."""
    return (2 * d_ff * d_ff + _entries(d_ff)) * np.dtype(precision).itemsize


def factor_bytes(d_ff: int, precision: str = "float64") -> int:
    """Memory that one layer's factor takes, on the device or on disk."""
    return _entries(d_ff) * np.dtype(precision).itemsize


def _entries(d_ff: int) -> int:
    return sum(math.prod(shape) for shape in panel_shapes(d_ff).values())


def free_memory(devices: Sequence) -> int | None:
    """Bytes free on the fullest of the devices, or None where they do not say (the CPU)."""
    free = [free_bytes(d) for d in devices]
    return None if None in free else min(f for f in free if f is not None)
