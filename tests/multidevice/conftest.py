"""Workers with several simulated devices: how many a process has is settled before jax is imported, so each test
starts its own processes."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TIMEOUT = 300


def environment(devices: int, **more: str) -> dict[str, str]:
    """What a worker with so many simulated CPU devices is started with."""
    return {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        **more,
    }


def start(devices: int, script: str, *arguments, **more: str) -> subprocess.Popen:
    """Start ``python script arguments…`` (`script` lies in this folder) with so many devices; `more` is environment."""
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        env=environment(devices, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen) -> str:
    """Wait for workers; what the first wrote to stdout. Fails the test with the end of the stderr of one that fails."""
    try:
        ended = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, ended, strict=True):
        assert process.returncode == 0, err[-4000:]
    return ended[0][0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def start_processes() -> Callable[..., list[subprocess.Popen]]:
    """``start_processes(n, devices, script, *arguments, **environment)``: n workers of some devices each, started with
    the further arguments coordinator, n and their number."""

    def several(n: int, devices: int, script: str, *arguments, **more: str) -> list[subprocess.Popen]:
        coordinator = f"127.0.0.1:{free_port()}"
        return [start(devices, script, *arguments, coordinator, n, i, **more) for i in range(n)]

    return several


@pytest.fixture(scope="session", name="finish")
def finish_fixture() -> Callable[..., str]:
    """``finish(*processes) -> stdout`` of the first."""
    return finish


@pytest.fixture(scope="session")
def run_with_devices() -> Callable[..., str]:
    """``run_with_devices(n, script, *arguments, **environment) -> stdout`` of a worker with n simulated devices."""
    return lambda devices, script, *arguments, **more: finish(start(devices, script, *arguments, **more))
