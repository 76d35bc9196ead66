"""Shared by the tests of second_moment: which implementations run here, and how."""

import os
import sys
from contextlib import ExitStack, contextmanager

import jax
import numpy as np
import pytest
from jaxedit_kernels.second_moment.specs import HopperSpec, TPUSpec

MOSAIC_GPU = sys.version_info >= (3, 12) and jax.__version_info__ >= (0, 11, 2)
# The simulator blocks one thread of JAX's CPU pool per simulated warpgroup; with a pool of one thread per core it
# waits forever on a small machine. Read when the CPU backend starts, at the first computation.
if MOSAIC_GPU:
    os.environ["NPROC"] = str(max(os.cpu_count() or 1, 16))
needs_mosaic_gpu = pytest.mark.skipif(not MOSAIC_GPU, reason="Mosaic GPU needs Python >= 3.12 and jax >= 0.11.2")

SMALL = {
    "mosaic_gpu": HopperSpec(tile_m=64, tile_n=128, consumers=1, group=2),
    "mosaic_tpu": TPUSpec(tile=128, tile_k=128, group=2),
}
DEVICES = {
    "H100": jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132),
    "H200": jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132),
    "A100": jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", platform="gpu", num_cores=108),
    "B200": jax.sharding.AbstractDevice(device_kind="NVIDIA B200", platform="gpu", num_cores=148),
    "small": jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=4),
    "TPU": jax.sharding.AbstractDevice(device_kind="TPU v5e", platform="tpu", num_cores=1),
}


def on(device: str):
    """As if this program ran on `device`; enough to lower for it."""
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=DEVICES[device])
    return jax.sharding.use_abstract_mesh(mesh)


@contextmanager
def running(implementation: str, capfd):
    """Kernels run in simulation, with race detection on; a race fails the test."""
    with ExitStack() as stack:
        if implementation == "mosaic_gpu":
            from jax.experimental.pallas import mosaic_gpu as plgpu

            stack.enter_context(on("small"))
            stack.enter_context(plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)))
        if implementation == "mosaic_tpu":
            from jax.experimental.pallas import tpu as pltpu

            stack.enter_context(on("TPU"))
            stack.enter_context(pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)))
        yield
    # Releases differ in whether a race raises or is reported
    reported = "".join(capfd.readouterr())
    assert "RACE DETECTED" not in reported, reported


def gram(x) -> np.ndarray:
    wide = np.asarray(x, np.float64)
    return wide.T @ wide


def assert_upper(found, expected, x, total=None) -> None:
    """Equal on and right of the diagonal, to the rounding of a float32 sum over the rows of x."""
    wide = np.abs(np.asarray(x, np.float64))
    size = wide.T @ wide + (0 if total is None else np.abs(total))
    allowed = 4 * np.finfo(np.float32).eps * np.sqrt(1 + len(wide)) * size + 1e-30
    wrong = np.triu(np.abs(np.asarray(found, np.float64) - expected) > allowed)
    assert np.isfinite(np.triu(found)).all() and not wrong.any(), np.argwhere(wrong)[:5]
