"""What the benchmark scripts share: model, requests, statistics, and the record of a run."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import jax
import records

import jaxedit as je
from jaxedit.cache import cache_dir


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("requests", help="file of edit requests, e.g. CounterFact's JSON")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--first", type=int, default=0, help="first record to use")
    parser.add_argument("--count", type=int, default=48, help="how many records")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens for the second moments")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    return parser


def prepare(args, layers):
    """``(model, tokenizer, requests, stats)``; compilations are cached on disk."""
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "xla"))
    )
    model, tokenizer = je.load(args.model)
    requests = je.read_requests(args.requests)[args.first : args.first + args.count]
    if layers is None:
        layers = je.method_for("fe", model.config).layers
    stats = je.second_moments(model, tokenizer, None, layers, max_tokens=args.tokens)
    return model, tokenizer, requests, stats


def machine() -> dict:
    """What a number was measured on."""
    python, device = platform.python_version(), jax.devices()[0].device_kind
    return {**records.machine(), "device": device, "python": python, "jax": jax.__version__}


def write(path: Path | None, record: dict) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
