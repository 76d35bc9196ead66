"""`second_moment`: one function over all implementations, and the rule by which one is chosen."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxedit_kernels.second_moment import reference, xla
from jaxedit_kernels.second_moment.specs import HopperSpec, TPUSpec, hopper_spec, tpu_spec

IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu", "mosaic_tpu")
_HOPPER = re.compile(r"\b(GH200|H20|H100|H200|H800)\b")


@dataclass(frozen=True)
class Resolution:
    """Which implementation runs, why, how it is tuned, and on how many multiprocessors."""

    implementation: str
    reason: str
    spec: HopperSpec | TPUSpec | None = None
    cores: int = 0


def second_moment(
    x: jax.Array,
    total: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    slot: jax.Array | int | None = None,
    implementation: str = "auto",
    spec: HopperSpec | TPUSpec | None = None,
) -> jax.Array:
    """``total + xᵀ x`` on and right of the diagonal; what is left of it is unspecified.

    x: ``[n, d]``, of any float dtype. mask: ``[n]``, rows where it is False count as zeros, whatever they hold.
        They are zeroed before the product, which XLA fuses into whatever computes x; pass no mask where there is
        nothing to leave out.
    total: ``[d, d]``, or ``[slots, d, d]`` with the int `slot` to add to, which may be traced; by default zeros
        ``[d, d]`` of float32 (float64 for a float64 x). Donate it to the enclosing `jax.jit` for an update in place.
    implementation: "auto", or one of `IMPLEMENTATIONS`; see `resolve_implementation`.
    spec: tuning, by default from the table in specs.py.
    Raises ValueError where shapes or dtypes do not fit or the implementation named cannot run.
    """
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; second_moment takes floats of shape [n, d]")
    n, d = x.shape
    total = jnp.zeros((d, d), jnp.promote_types(x.dtype, jnp.float32)) if total is None else total
    if total.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"total is {total.dtype}; sums are kept in float32 or float64")
    if total.shape[-2:] != (d, d) or total.ndim != (2 if slot is None else 3):
        wanted = f"[{d}, {d}]" if slot is None else f"[slots, {d}, {d}] with slot={slot}"
        raise ValueError(f"total has shape {list(total.shape)}; x of shape {[n, d]} needs {wanted}")
    if mask is not None and mask.shape != (n,):
        raise ValueError(f"mask has shape {list(mask.shape)}; x of shape {[n, d]} needs [{n}]")
    chosen = resolve_implementation(n, d, x.dtype, total.dtype, implementation=implementation, spec=spec)
    if mask is not None:
        x = jnp.where(mask[:, None], x, 0)
    if n == 0:
        return total
    sums, at = (total[None], 0) if slot is None else (total, slot)
    match chosen.implementation:
        case "reference":
            sums = reference.second_moment(x, sums, at)
        case "xla":
            sums = xla.second_moment(x, sums, at)
        case "mosaic_gpu":
            from jaxedit_kernels.second_moment import mosaic_gpu  # imports Pallas, which takes a while

            assert isinstance(chosen.spec, HopperSpec)
            sums = mosaic_gpu.second_moment(x, sums, at, chosen.spec, chosen.cores)
        case "mosaic_tpu":
            from jaxedit_kernels.second_moment import tpu

            assert isinstance(chosen.spec, TPUSpec)
            sums = tpu.second_moment(x, sums, at, chosen.spec)
    return sums[0] if slot is None else sums


def resolve_implementation(
    n: int,
    d: int,
    dtype: Any,
    total_dtype: Any = jnp.float32,
    *,
    implementation: str = "auto",
    spec: HopperSpec | TPUSpec | None = None,
    device: Any = None,
) -> Resolution:
    """Which implementation `second_moment` uses for x of shape ``[n, d]``, and why.

    "auto" is the Mosaic GPU kernel where it can run, otherwise XLA, with what stands in the way as the reason.
    device: a `jax.Device` or `jax.sharding.AbstractDevice`, by default that of the mesh in use, or the default one.
    Raises ValueError where the implementation is not known, or was named and cannot run.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"unknown implementation {implementation!r}; choose auto or one of {IMPLEMENTATIONS}")
    if implementation in ("reference", "xla"):
        return Resolution(implementation, "asked for")
    device = default_device() if device is None else device
    x_dtype, sum_dtype = jnp.dtype(dtype), jnp.dtype(total_dtype)
    if implementation == "mosaic_tpu":
        tuned = spec if isinstance(spec, TPUSpec) else tpu_spec(d)
        if obstacle := _tpu_obstacle(d, x_dtype, sum_dtype, tuned, device):
            raise ValueError(f"second_moment cannot run as mosaic_tpu: {obstacle}; use implementation='auto'")
        return Resolution("mosaic_tpu", "asked for", tuned)
    obstacle = _gpu_obstacle(d, x_dtype, sum_dtype, device)
    if obstacle and implementation == "mosaic_gpu":
        raise ValueError(f"second_moment cannot run as mosaic_gpu: {obstacle}; use implementation='auto'")
    if obstacle:
        return Resolution("xla", f"the Mosaic GPU kernel cannot run: {obstacle}")
    reason = "asked for" if implementation == "mosaic_gpu" else f"the Mosaic GPU kernel runs on {device.device_kind}"
    tuned = spec if isinstance(spec, HopperSpec) else hopper_spec(d, device.device_kind)
    return Resolution("mosaic_gpu", reason, tuned, _cores(device))


def default_device() -> Any:
    """The device that the mesh in use is made of, or else JAX's default device."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return chosen if isinstance(chosen, jax.Device) else jax.devices(chosen)[0]


def flops(n: int, d: int) -> int:
    """FLOPs of one triangle with its diagonal: the work that any implementation must do."""
    return n * d * (d + 1)


def bytes_moved(n: int, d: int, itemsize: int = 2) -> int:
    """Bytes that must cross device memory: x read once, one float32 triangle read and written."""
    return n * d * itemsize + d * (d + 1) * 4


def _gpu_obstacle(d: int, dtype, total_dtype, device) -> str | None:
    """What keeps the Mosaic GPU kernel from running, in words, or None."""
    if device.platform not in ("gpu", "cuda"):
        return f"the backend is {device.platform}, not a GPU"
    if not _is_hopper(device):
        return f"{device.device_kind} is not of compute capability 9.0 (H100, H200), whose matrix instructions it uses"
    if sys.version_info < (3, 12):
        return f"it needs Python 3.12 or later, this is {sys.version_info.major}.{sys.version_info.minor}"
    if jax.__version_info__ < (0, 11, 2):
        return f"it needs jax 0.11.2 or later, this is {jax.__version__}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {dtype}, not bfloat16 or float16"
    if total_dtype != jnp.float32:
        return f"the sum is {total_dtype}, not float32"
    if d % 64:
        return f"d = {d} is not a multiple of 64, the width in which it loads x"
    return None


def _tpu_obstacle(d: int, dtype, total_dtype, spec: TPUSpec, device) -> str | None:
    if device.platform != "tpu":
        return f"the backend is {device.platform}, not a TPU"
    if dtype != jnp.bfloat16 or total_dtype != jnp.float32:
        return f"x is {dtype} and the sum {total_dtype}, not bfloat16 and float32"
    if d % spec.tile:
        return f"d = {d} is not a multiple of the tile, {spec.tile}"
    return None


def _is_hopper(device) -> bool:
    """Abstract devices do not know their compute capability, only their name."""
    capability = getattr(device, "compute_capability", None)
    return capability == "9.0" if capability else bool(_HOPPER.search(device.device_kind))


def _cores(device) -> int:
    """Multiprocessors of a device or an abstract device."""
    return int(getattr(device, "core_count", None) or getattr(device, "num_cores", None) or 1)
