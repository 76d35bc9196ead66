"""Cost of the anchor stage per edit as more edits are optimised together, and the FLOPs it saves.

    python benchmarks/anchor_scaling.py counterfact.json --out benchmarks/results/anchor_scaling_smollm2.json

The edits are those of the most common suffix length in the file, so that every size does the same work per edit; they
differ in how many steps they take, so the time per edit and step is printed too. Each size is run once to compile and
then timed; the median of `--repeats` runs is printed. The naive method is the
published one: each step runs all rows of an edit, padded to the longest, through every layer, makes logits at every
position, and goes back through the layers above the anchor. FLOPs are counted from matrix shapes (two per
multiply-add); attention scores are left out of both.
"""

from __future__ import annotations

import statistics
import time

import jax
import numpy as np
from common import arguments, machine, prepare, write

import jaxedit as je
from jaxedit.data.templates import sample_templates
from jaxedit.data.tokens import check_templates, round_up, validate
from jaxedit.targets import anchor


def layer_flops(config) -> int:
    """Matrix-product FLOPs of one token in one layer, forward."""
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    weights = config.d_model * (2 * q + 2 * kv) + config.d_model * config.d_ff * (3 if config.gated else 2)
    return 2 * weights


def used_flops(config, edits, found, layer: int, settings) -> float:
    """What the anchor stage multiplies, padding and frozen lanes included only as far as they are run."""
    above, per_layer = config.n_layer - layer - 1, layer_flops(config)
    logit = 2 * config.d_model * config.vocab
    sizes = [anchor.suffix_tokens(e) for e in edits]
    total = 0.0
    for members, size in anchor.buckets(sizes, settings.bucket_growth):
        asks = max(len(edits[i].target) for i in members) * len(edits[0].contexts) + 1
        rows = [round_up(sum(len(r.tokens) for r in (*edits[i].contexts, edits[i].essence)), 1) for i in members]
        prefix = [sum(r.lookup for r in (*edits[i].contexts, edits[i].essence)) for i in members]
        total += per_layer * ((layer + 1) * len(members) * round_up(max(rows), 32))
        total += per_layer * above * len(members) * round_up(max(prefix), 32)
        evaluations = sum(int(found.updates[i]) + 1 for i in members)
        total += evaluations * 2 * (per_layer * above * size + logit * asks)
    return total


def naive_flops(config, edits, found, layer: int) -> float:
    """The published procedure for the same edits and the same number of steps."""
    per_layer, logit = layer_flops(config), 2 * config.d_model * config.vocab
    total = 0.0
    for i, e in enumerate(edits):
        rows = (*e.contexts, e.essence)
        tokens = len(rows) * max(len(r.tokens) for r in rows)
        steps = int(found.updates[i]) + 1
        backward = (config.n_layer - layer - 1) * per_layer
        total += steps * tokens * (config.n_layer * per_layer + backward + 2 * logit)
    return total


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pool", type=int, default=400, help="records to choose edits of one length from")
    parser.set_defaults(tokens=20_000)
    args = parser.parse_args()
    args.count = args.pool
    model, tokenizer, requests, _ = prepare(args, None)
    method = je.method_for("fe", model.config)
    layer, settings = method.layers[0], method.anchor
    templates = check_templates(sample_templates(model, tokenizer, 0))
    edits = validate(tokenizer, requests, templates, model.config.max_positions)
    lengths = [anchor.suffix_tokens(e) for e in edits]
    common = max(set(lengths), key=lengths.count)
    edits = [e for e, length in zip(edits, lengths, strict=True) if length == common][: max(args.sizes)]
    rows = []
    print(f"{len(edits)} edits of {common} suffix tokens")
    print("edits  first run (s)  seconds per edit  ms per edit and step  buckets  traces  FLOPs used / naive  GFLOP/s")
    for n in args.sizes:
        before = anchor._optimise._cache_size()

        def run(n=n):
            start = time.perf_counter()
            found = anchor.find_anchors(model.params, model.config, edits[:n], layer, settings)
            return time.perf_counter() - start, found

        first, found = run()
        times = [run()[0] for _ in range(args.repeats)]
        median = statistics.median(times)
        used = used_flops(model.config, edits[:n], found, layer, settings)
        row = {
            "edits": n,
            "first_run_seconds": first,
            "seconds": times,
            "seconds_per_edit": median / n,
            "ms_per_edit_step": 1000 * median / float(np.sum(found.updates + 1)),
            "buckets": len(anchor.buckets([anchor.suffix_tokens(e) for e in edits[:n]], settings.bucket_growth)),
            "traces": anchor._optimise._cache_size() - before,
            "flops": used,
            "flops_over_naive": used / naive_flops(model.config, edits[:n], found, layer),
            "padding": found.padding,
            "mean_updates": float(np.mean(found.updates)),
        }
        rows.append(row)
        cells = (n, first, row["seconds_per_edit"], row["ms_per_edit_step"], row["buckets"], row["traces"])
        shares = (row["flops_over_naive"], used / median / 1e9)
        print(
            "{:5d}  {:13.1f}  {:16.3f}  {:20.1f}  {:7d}  {:6d}  {:18.3f}  {:7.0f}".format(*cells, *shares), flush=True
        )
    write(args.out, {"machine": machine(), "model": args.model, "backend": jax.default_backend(), "rows": rows})


if __name__ == "__main__":
    main()
