"""Choose each method's settings for a model on validation records.

    python benchmarks/choose_presets.py counterfact.json --first 600 --out benchmarks/results/presets_smollm2.json

Rule: the highest harmonic mean of efficacy accuracy, paraphrase accuracy and top-1 overlap with the base model at
neighbourhood prompts. Use records here that are not used to report results.
"""

from __future__ import annotations

import itertools
from statistics import harmonic_mean

from common import arguments, machine, prepare, write
from sweep import HEADER, Bench, changed, line

import jaxedit as je

_WEIGHTS = {"cov_weight": (150.0, 500.0, 1500.0, 5000.0, 15000.0)}
_NULL_SPACE = {"measure": ("energy",), "threshold": (0.05, 0.1, 0.2, 0.4), "l2": (1.0, 10.0)}
_ONE_LAYER = {"layers": ((3,), (5,), (7,))}
GRIDS: dict[str, dict[str, tuple]] = {
    **dict.fromkeys(("memit", "memit_no_divide", "one_layer", "rect", "prune", "namet", "adaedit", "pmet"), _WEIGHTS),
    **dict.fromkeys(("fe", "blue", "rect+fe", "prune+fe"), _WEIGHTS),
    **dict.fromkeys(("alphaedit", "alphaedit+fe"), _NULL_SPACE),
    "emmet": {**_ONE_LAYER, "cov_weight": (10.0, 1000.0, 100000.0)},
    "nse": {**_WEIGHTS, "share": (0.8, 1.0)},
    **dict.fromkeys(("r_rome", "rome"), {**_ONE_LAYER, "clamp": (0.75, 4.0)}),
}


def candidates(grid: dict[str, tuple]) -> list[dict]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def merit(row: dict) -> float:
    return harmonic_mean([row["efficacy_accuracy"], row["paraphrase_accuracy"], row["top1"]])


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(GRIDS))
    parser.add_argument("--neighbours", type=int, default=4, help="neighbourhood prompts a record")
    args = parser.parse_args()
    model, tokenizer, requests, stats = prepare(args, None)
    bench, rows, chosen = Bench(model, tokenizer, requests, stats, args.neighbours), [], {}
    about = {"machine": machine(), "model": args.model, "first": args.first, "count": len(requests)}
    print(HEADER)
    for name in args.methods:
        preset = je.method_for(name, model.config)
        own = []
        for changes in candidates(GRIDS[name]):
            row, _ = bench.measure(changed(preset, changes), changes)
            own.append(row)
            print(line(row), flush=True)
        best = max(own, key=merit)
        print(f"chosen: {best['changes']}, {merit(best):.3f}\n", flush=True)
        rows, chosen = rows + own, chosen | {name: best["changes"]}
        write(args.out, about | {"rows": rows, "chosen": chosen})


if __name__ == "__main__":
    main()
