"""Choose each method's cov_weight for a model on validation records.

    python benchmarks/choose_presets.py counterfact.json --first 600 --out benchmarks/results/presets_smollm2.json

Rule: the highest harmonic mean of efficacy accuracy, paraphrase accuracy and top-1 overlap with the base model at
neighbourhood prompts. Use records here that are not used to report results.
"""

from __future__ import annotations

from statistics import harmonic_mean

from common import arguments, machine, prepare, write
from sweep import HEADER, METHODS, line, sweep

from jaxedit.data.templates import sample_templates


def choose(rows: list[dict]) -> dict:
    """The row of one method that the rule picks."""
    return max(rows, key=lambda r: harmonic_mean([r["efficacy_accuracy"], r["paraphrase_accuracy"], r["top1"]]))


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--weights", type=float, nargs="+", default=[150, 500, 1500, 5000, 15000])
    args = parser.parse_args()
    model, tokenizer, requests, stats = prepare(args, None)
    templates = sample_templates(model, tokenizer, 0)
    print(HEADER)
    rows = sweep(model, tokenizer, requests, stats, templates, (*METHODS, "one_layer"), args.weights, 4)
    chosen = {m: choose([r for r in rows if r["method"] == m]) for m in dict.fromkeys(r["method"] for r in rows)}
    print("\nchosen:\n" + "\n".join(line(r) for r in chosen.values()))
    record = {"machine": machine(), "model": args.model, "first": args.first, "count": len(requests), "rows": rows}
    write(args.out, record | {"chosen": {m: r["cov_weight"] for m, r in chosen.items()}})


if __name__ == "__main__":
    main()
