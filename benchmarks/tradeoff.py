"""Efficacy and paraphrase against what else changes, as cov_weight varies, for FE, MEMIT, MEMIT undivided and BLUE.

    python benchmarks/tradeoff.py counterfact.json --out benchmarks/results/tradeoff_smollm2.json

Prints a table, writes the rows as JSON, and beside it a figure where matplotlib is installed.
"""

from __future__ import annotations

from pathlib import Path

from common import arguments, machine, prepare, write
from sweep import HEADER, Bench, changed, line

import jaxedit as je

METHODS = ("fe", "memit", "memit_no_divide", "blue")


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--weights", type=float, nargs="+", default=[500, 1500, 5000, 15000])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--neighbours", type=int, help="neighbourhood prompts per record (default: all)")
    args = parser.parse_args()
    model, tokenizer, requests, stats = prepare(args, None)
    bench, rows = Bench(model, tokenizer, requests, stats, args.neighbours), []
    print(HEADER)
    for name in args.methods:
        for weight in args.weights:
            changes = {"cov_weight": weight}
            row, _ = bench.measure(changed(je.method_for(name, model.config), changes), changes)
            rows.append(row)
            print(line(row), flush=True)
    record = {"machine": machine(), "model": args.model, "first": args.first, "count": len(requests)}
    write(args.out, record | {"tokens": args.tokens, "templates": bench.templates, "rows": rows})
    if args.out is not None:
        plot(rows, args.out.with_suffix(".png"))


def plot(rows: list[dict], path: Path):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed; no figure")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    panels = [("efficacy_accuracy", "kl"), ("paraphrase_accuracy", "kl"), ("paraphrase_accuracy", "top1")]
    for axis, (y, x) in zip(axes, panels, strict=True):
        for method in dict.fromkeys(r["method"] for r in rows):
            points = sorted((r[x], 100 * r[y]) for r in rows if r["method"] == method)
            axis.plot(*zip(*points, strict=True), marker="o", label=method)
        axis.set_xlabel("KL(base || edited)" if x == "kl" else "top-1 overlap")
        axis.set_ylabel(y.replace("_", " ") + " (%)")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
