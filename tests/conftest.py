"""Shared by all tests: compiled programs are kept between runs, and tiny models are loaded once a session."""

import gc
import os
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
# Must be set before jax is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Most of the time goes into compiling small programs that run once; LLVM need not optimise those.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Test processes run side by side, one a core; BLAS threads that wait for each other make Cholesky ten times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest  # noqa: E402

MAPPINGS = 20_000  # of the 65,530 that Linux gives a process; each compiled program takes several


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Programs are dropped between modules before there are so many that the next one would crash the process."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@cache
def load_tiny(name: str):
    """``(model, tokenizer)`` of one of the trained models: tiny-llama, tiny-gpt2, tiny-gptj."""
    from transformers import AutoTokenizer

    return load_decoder(name), AutoTokenizer.from_pretrained(GOLDENS / name)


@cache
def load_decoder(name: str):
    """The float32 model of a folder of tests/goldens, such as "logits_only/mistral"."""
    from jaxedit.models.checkpoint import SafetensorsCheckpoint
    from jaxedit.models.hub import read_decoder

    return read_decoder(SafetensorsCheckpoint(GOLDENS / name), name)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of reference models and numbers."""
    return GOLDENS


@pytest.fixture(scope="session")
def tiny():
    """``tiny(name) -> (model, tokenizer)``; models are shared between tests and must not be changed."""
    return load_tiny


@pytest.fixture(scope="session")
def decoder():
    """``decoder(name) -> model`` without a tokenizer, for the random models of tests/goldens/logits_only."""
    return load_decoder
