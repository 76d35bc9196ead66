"""What the harness needs to know of each framework, used inside that framework's process only."""

from __future__ import annotations

import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

_COMPILE = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}


class Jax:
    """JAX on its default device."""

    def __init__(self):
        import jax

        self.jax = jax
        self._spent = dict.fromkeys((*_COMPILE.values(), "programs"), 0.0)
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int):
        if event in _COMPILE:
            self._spent[_COMPILE[event]] += duration_secs
            self._spent["programs"] += event.endswith("backend_compile_duration")

    def compiled(self) -> dict[str, float]:
        """Seconds of tracing, lowering and compiling so far, and programs compiled (or read from the disk cache)."""
        return dict(self._spent)

    def wait(self, value):
        return self.jax.block_until_ready(value)

    @property
    def on_gpu(self) -> bool:
        return self.jax.default_backend() == "gpu"

    def reset_peak(self):
        if not self.on_gpu:
            _reset_resident_peak()

    def peak(self) -> tuple[int, str]:
        stats = self.jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"], "device memory, since the process began"
        return _resident_peak()

    def about(self) -> dict[str, Any]:
        import numpy
        from jaxlib.version import __version__ as jaxlib

        device = self.jax.local_devices()[0]
        versions = {"jax": self.jax.__version__, "jaxlib": jaxlib, "numpy": numpy.__version__}
        return {"device": _device_name(device.device_kind), "python": platform.python_version(), **versions}

    def ceiling(self, dtype: str = "float32", size: int | None = None) -> dict[str, float]:
        """Best matrix-product rate and memory bandwidth seen: a square product, and scaling an array in place."""
        jax, jnp = self.jax, self.jax.numpy
        with jax.enable_x64(dtype == "float64"):
            n = size or (8192 if self.on_gpu else 2048)
            rounds = 10 if self.on_gpu else 1
            a = jnp.full((n, n), 1 / n, dtype)
            product = jax.jit(lambda a, b: (a @ b).astype(dtype))

            def multiply():
                b = a
                for _ in range(rounds):
                    b = product(a, b)
                b.block_until_ready()

            length = 2**30 // a.dtype.itemsize if self.on_gpu else 2**28 // a.dtype.itemsize
            scale = jax.jit(lambda x: x * 0.999, donate_argnums=0)
            held = [jnp.ones(length, dtype)]

            def sweep():
                for _ in range(rounds):
                    held[0] = scale(held[0])
                held[0].block_until_ready()

            return _rates(multiply, sweep, rounds, n, a.dtype.itemsize * length)


class Torch:
    """PyTorch on a GPU where there is one."""

    def __init__(self):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.torch, self.transformers = torch, transformers
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def compiled(self) -> dict[str, float]:
        return {}

    def wait(self, value):
        if self.on_gpu:
            self.torch.cuda.synchronize()
        return value

    def reset_peak(self):
        if self.on_gpu:
            self.torch.cuda.reset_peak_memory_stats()
        else:
            _reset_resident_peak()

    def peak(self) -> tuple[int, str]:
        if self.on_gpu:
            return self.torch.cuda.max_memory_allocated(), "device memory"
        return _resident_peak()

    def about(self) -> dict[str, Any]:
        import numpy

        torch, transformers = self.torch, self.transformers
        name = torch.cuda.get_device_name() if self.on_gpu else _device_name("cpu")
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": numpy.__version__}
        return {"device": name, "python": platform.python_version(), **versions, "threads": torch.get_num_threads()}

    def ceiling(self, dtype: str = "float32", size: int | None = None) -> dict[str, float]:
        """The same products and sweeps as JAX's."""
        torch = self.torch
        kind = getattr(torch, dtype)
        n = size or (8192 if self.on_gpu else 2048)
        rounds = 10 if self.on_gpu else 1
        a = torch.full((n, n), 1 / n, dtype=kind, device=self.device)
        length = (2**30 if self.on_gpu else 2**28) // a.element_size()
        x = torch.ones(length, dtype=kind, device=self.device)

        def multiply():
            b = a
            for _ in range(rounds):
                b = a @ b
            self.wait(b)

        def sweep():
            for _ in range(rounds):
                x.mul_(0.999)
            self.wait(x)

        return _rates(multiply, sweep, rounds, n, a.element_size() * length)


KINDS = {"jax": Jax, "torch": Torch}


def _rates(multiply, sweep, rounds: int, n: int, size: int) -> dict[str, float]:
    def best(function) -> float:
        found = []
        for _ in range(6):  # the first compiles
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
        return min(found[1:])

    return {"flop_per_s": rounds * 2 * n**3 / best(multiply), "byte_per_s": rounds * 2 * size / best(sweep)}


def _device_name(kind: str) -> str:
    """A CPU's own name, for a device that only calls itself "cpu"."""
    info = Path("/proc/cpuinfo")
    if kind != "cpu" or not info.exists():
        return kind
    names = [l.split(":")[1].strip() for l in info.read_text().splitlines() if "model name" in l]
    return names[0] if names else kind


def _reset_resident_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is then that of the whole process
        pass


def _resident_peak() -> tuple[int, str]:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(l for l in status.read_text().splitlines() if l.startswith("VmHWM"))
        return int(line.split()[1]) * 1024, "resident memory of the process"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident memory, since the process began"
