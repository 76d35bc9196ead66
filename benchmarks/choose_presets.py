"""Choose each method's settings for a model on validation records.

    python benchmarks/choose_presets.py counterfact.json --first 600 --out benchmarks/results/presets_smollm2.json

Rule: the highest harmonic mean of efficacy accuracy, paraphrase accuracy and top-1 overlap with the base model at
neighbourhood prompts. Use records here that are not used to report results. Choices of other methods that --out holds
already stay there.
"""

from __future__ import annotations

import itertools
import json
from statistics import harmonic_mean

from common import arguments, machine, prepare, write
from sweep import HEADER, Bench, changed, line

import jaxedit as je

_WEIGHTS = {"cov_weight": (150.0, 500.0, 1500.0, 5000.0, 15000.0)}
_FEW_WEIGHTS = {"cov_weight": (150.0, 500.0, 1500.0)}
_NULL_SPACE = {"measure": ("energy",), "threshold": (0.05, 0.1, 0.2), "l2": (1.0, 10.0)}
GRIDS: dict[str, dict[str, tuple]] = {
    **dict.fromkeys(("fe", "memit", "memit_no_divide", "one_layer", "blue"), _WEIGHTS),
    **dict.fromkeys(("alphaedit", "alphaedit+fe"), _NULL_SPACE),
    **dict.fromkeys(("pmet", "adaedit", "rect", "prune", "namet", "rect+fe", "prune+fe", "nse"), _FEW_WEIGHTS),
    "jacobian_spread": {"cov_weight": (500.0, 1500.0, 5000.0), "damping": (0.1, 1.0)},
    "emmet": {"layers": ((5,), (7,)), "cov_weight": (10.0, 1000.0)},
    **dict.fromkeys(("r_rome", "rome"), {"layers": ((3,), (5,), (7,)), "clamp": (4.0,)}),
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
    bench = Bench(model, tokenizer, requests, stats, args.neighbours)
    about = {"machine": machine(), "model": args.model, "first": args.first, "count": len(requests)}
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out is not None and args.out.exists() else {}
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
        known[name] = about | {"chosen": best["changes"], "rows": own}
        write(args.out, known)


if __name__ == "__main__":
    main()
