"""One way to measure: what every benchmark script here is made of (`records` has the format of what is measured).

Each framework is a `Side`, a process of its own that stays alive for the whole run. Parent and sides talk through a
pipe, so that only one side computes at a time, and `interleave` takes turns (A B A B), so that both meet the same
machine. Two processes rather than one, because then each has its own threads, allocator, peak memory and import
time, and whatever the other has loaded cannot disturb it. A side that waits sits in a read of its pipe: OpenMP's
threads spin only for milliseconds after a parallel region, and each record has the processor seconds that its side
used while it waited (`idle_cpu_seconds`), which shows that they did not spin on. Every thread pool is given all
cores (`threads`).
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from records import Record, Timing, cores

DEMO = Path(__file__).parents[1] / "jaxedit" / "data" / "packaged" / "demo.jsonl"
# JAX takes a GPU's memory as it needs it, so that both sides fit on one
_VARIABLES = {"TOKENIZERS_PARALLELISM": "false", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One call of one task of a side.

    seconds: until the result was there. compile: what of it was tracing, lowering and compiling, and how many
    programs were compiled (JAX). cpu_seconds: processor time of all threads, so cpu_seconds / seconds is how many
    cores were busy. idle_cpu: processor seconds while the side waited for this call. peak: bytes, of what.
    """

    seconds: float
    compile: dict[str, float]
    cpu_seconds: float
    idle_cpu: float
    peak_bytes: int
    peak_of: str
    value: Any


class SideError(RuntimeError):
    """A side failed; the message is its traceback."""


class Side:
    """A framework in a process of its own.

    kind: "jax" or "torch". prepare: a function of a module that takes the backend (see `backends`) and `arguments`,
    and returns tasks by name; it imports what it needs, so that no side loads the other's framework.
    threads: for every thread pool, by default all cores. environment: further variables. JAX's compilation cache on
    disk is empty at first and the side's own, unless they say otherwise.
    """

    def __init__(self, kind: str, prepare: Callable, *arguments, threads=None, environment=None):
        self._programs = tempfile.TemporaryDirectory()
        environment = {**compilation_cache(self._programs.name), **(environment or {})}
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        variables = {name: str(threads or cores()) for name in THREADS} | _VARIABLES
        self._process = context.Process(target=_serve, args=(theirs, kind, prepare, arguments, threads), daemon=True)
        with _environment({**variables, **environment}):
            self._process.start()
        theirs.close()
        self.about: dict[str, Any] = self._receive()

    def __call__(self, task: str, *arguments, **named) -> Sample:
        self._pipe.send((task, arguments, named))
        return self._receive()

    def _receive(self):
        try:
            kind, content = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise SideError(f"the side ended with exit code {self._process.exitcode} (out of memory?)") from None
        if kind == "error":
            raise SideError(content)
        return content

    def close(self):
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join()
        self._programs.cleanup()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_):
        self.close()


def _serve(pipe, kind: str, prepare: Callable, arguments, threads: int | None):
    import backends

    try:
        if threads is not None and hasattr(os, "sched_setaffinity"):  # XLA's own pool knows no variable
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        backend = backends.KINDS[kind]()
        tasks = {"ceiling": backend.ceiling, **prepare(backend, *arguments)}
        pipe.send(("ready", backend.about()))
        cpu = time.process_time()
        while (message := pipe.recv()) is not None:
            idle = time.process_time() - cpu
            task, args, named = message
            backend.reset_peak()
            before, cpu, start = backend.compiled(), time.process_time(), time.perf_counter()
            value = backend.wait(tasks[task](*args, **named))
            seconds = time.perf_counter() - start
            cpu = time.process_time() - cpu
            compiled = {k: v - before[k] for k, v in backend.compiled().items()}
            peak, peak_of = backend.peak()
            pipe.send(("done", Sample(seconds, compiled, cpu, idle, peak, peak_of, value)))
            cpu = time.process_time()
    except EOFError:  # the parent was stopped
        return
    except BaseException:
        pipe.send(("error", traceback.format_exc()))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def compilation_cache(folder: str) -> dict[str, str]:
    """Environment in which compiled programs are kept in `folder`, by the rule that jaxedit itself sets."""
    from jaxedit.compilation import MIN_SECONDS

    return {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(MIN_SECONDS)}


def interleave(repeats: int, calls: Mapping[str, Callable[[], Sample]]) -> dict[str, list[Sample]]:
    """Each call in turn, `repeats` times round."""
    found: dict[str, list[Sample]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(call())
    return found


def measure(function: Callable[[], Any], repeats: int, wait: Callable = lambda x: x, warmup: int = 1) -> Timing:
    """Time a function within a side; `wait` blocks until its result is there."""
    for _ in range(warmup):
        wait(function())
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(function())
        samples.append(time.perf_counter() - start)
    return Timing(tuple(samples))


def record(name: str, side: str, about, settings, samples: Sequence[Sample], first: Sample | None = None, **fields):
    """A `Record` of warm `samples` and, where given, of the first call of a fresh process, with its compilation."""
    seconds = {"run": Timing(tuple(s.seconds for s in samples))}
    if first is not None:
        seconds["first"] = Timing((first.seconds,))
        seconds |= {k: Timing((v,)) for k, v in first.compile.items() if k != "programs"}
    last = samples[-1]
    busy = statistics.median(s.cpu_seconds / s.seconds for s in samples)
    found = {"cores_busy": busy, "idle_cpu_seconds": max(s.idle_cpu for s in samples), **fields.pop("found", {})}
    if first is not None and first.compile:
        found["programs_compiled"] = first.compile["programs"]
    peak = max(s.peak_bytes for s in [*samples, *([first] if first else [])])
    more = {"peak_bytes": peak, "peak_of": last.peak_of, "found": found}
    return Record(name, side, about, settings, seconds, **more, **fields)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all scripts share. Those without a default take the script's, full or quick."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small settings: shows that it works, measures little")
    parser.add_argument("--repeats", type=int, help="timed runs on each side")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--threads", type=int, default=cores(), help="threads for each pool (default: all cores)")
    parser.add_argument("--requests", type=Path, default=DEMO, help="file of edit requests, e.g. CounterFact's JSON")
    parser.add_argument("--first", type=int, default=0, help="first request to use")
    parser.add_argument("--count", type=int, help="how many requests")
    parser.add_argument("--steps", type=int, help="loss evaluations an anchor may take")
    parser.add_argument("--model", default="smollm2-135m", help="anything that jaxedit.load takes")
    parser.add_argument("--shape", help="random weights of this shape instead of --model, and synthetic requests")
    parser.add_argument("--dtype", help="of the weights (default: float32; for --shape with a GPU bfloat16)")
    return parser


def parse(parser: argparse.ArgumentParser, full: Mapping[str, Any], quick: Mapping[str, Any]) -> argparse.Namespace:
    """Parse the command line; options that were not given come from `full`, or with --quick from `quick`."""
    args = parser.parse_args()
    for name, value in {**full, **(quick if args.quick else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args
