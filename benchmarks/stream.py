"""Batches of edits in a row: what becomes of earlier ones, of perplexity, and of the time that a batch takes.

    python benchmarks/stream.py counterfact.json --batches 20 --size 10 --out benchmarks/results/stream_smollm2.json

Each method edits the same batches, with the keys of earlier ones protected. Perplexity is measured after each batch;
give --texts for text that the second moments have not seen, the packaged corpus is used for those. Retention is
measured at the end, of every batch's edits. Seconds are of the edit alone, compilation included where there is any.
Other methods that --out holds already stay there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common
import numpy as np

import jaxedit as je
from jaxedit.plain import describe

MEASURES = ("efficacy_success", "efficacy_accuracy", "paraphrase_success", "neighbourhood_success")


def run(model, tokenizer, requests, stats, name: str, size: int, texts) -> dict[str, Any]:
    batches = [requests[i : i + size] for i in range(0, len(requests), size)]
    method = je.method_for(name, model.config)
    guard = je.CollapseGuard(texts=texts, max_ratio=1e9, max_update=1e9)
    fresh = []  # of each batch, right after it was written

    def look(step: je.StreamStep, result: je.EditResult):
        some = requests[step.edits - size : step.edits]
        fresh.append(je.evaluate(model, result.model, tokenizer, some, max_neighbours=1).edited)
        print(f"{name:14s} {step.edits:4d} edits  {step.seconds:6.1f} s  perplexity x {step.ratio:.3f}", flush=True)

    stream = je.edit_stream(model, tokenizer, batches, method, stats=stats, guard=guard, on_step=look)
    kept = [je.evaluate(model, stream.model, tokenizer, some, max_neighbours=1).edited for some in batches]
    seconds = [s.seconds for s in stream.steps]
    later = seconds[1:]
    found: dict[str, Any] = {
        "settings": describe(method),
        "seconds": seconds,
        "last_to_first": float(np.median(seconds[-3:]) / np.median(later[:3])),
        "perplexity_ratio": [s.ratio for s in stream.steps],
        "update_norm": [max(s.updates.values()) for s in stream.steps],
        "fresh": {m: [f[m] for f in fresh] for m in MEASURES},
        "kept": {m: [k[m] for k in kept] for m in MEASURES},
    }
    pairs = {m: (100 * np.mean(found["fresh"][m]), 100 * np.mean(found["kept"][m])) for m in MEASURES}
    print(f"{name}: " + ", ".join(f"{m} {a:.1f} -> {b:.1f}" for m, (a, b) in pairs.items()))
    print(f"{name}: last batches took {found['last_to_first']:.2f} of the time of the first ones after the very first")
    return found


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("requests", help="file of edit requests, e.g. CounterFact's JSON")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--first", type=int, default=0, help="first record to use")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--size", type=int, default=10, help="edits in a batch")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens for the second moments")
    parser.add_argument("--texts", help="held-out text for perplexity: a file, or anything that perplexity takes")
    parser.add_argument("--methods", nargs="+", default=["memit", "fe", "alphaedit"])
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    args = parser.parse_args()
    args.count = args.batches * args.size
    model, tokenizer, requests, stats = common.prepare(args, None)
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out is not None and args.out.exists() else {}
    about = {name: getattr(args, name) for name in ("model", "first", "size", "tokens")}
    for name in args.methods:
        found = run(model, tokenizer, requests, stats, name, args.size, args.texts)
        rows[name] = {**about, "machine": common.machine(), **found}
        common.write(args.out, rows)


if __name__ == "__main__":
    main()
