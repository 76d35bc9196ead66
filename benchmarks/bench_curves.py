"""How does the cost grow: anchors with edits, the solve with edits and with d_ff, statistics with tokens?

    python benchmarks/bench_curves.py --requests counterfact.json --out benchmarks/results/curves_cpu.json

Exponents are fitted by least squares to logarithms. Anchors: edits of the most common suffix length among `--pool`
records, and the threshold out of reach, so that every size does the same work per edit.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import bench_anchors
import bench_solve
import bench_statistics
import flops
import workload
from harness import Side, arguments, interleave, parse, record
from records import Curve, Results

FULL = {
    "count": 600,
    "steps": 10,
    "repeats": 3,
    "sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "edits": [10, 32, 100, 320, 1000],
    "d_ff": [512, 1024, 2048, 4096],
    "tokens": [4096, 16384, 65536, 131072],
}
QUICK = {
    "count": 16,
    "steps": 3,
    "repeats": 1,
    "sizes": [1, 2, 4],
    "edits": [10, 40],
    "d_ff": [128, 256],
    "tokens": [2048, 8192],
}
BASELINE_EDITS = 4
QUESTION = "How does the cost grow with edits, d_ff and tokens?"


def length_tasks(backend, work: workload.Workload):
    from jaxedit.data.templates import sample_templates
    from jaxedit.data.tokens import check_templates, edit_tokens
    from jaxedit.targets.anchor_plan import suffix_tokens

    model, tokenizer = workload.jax_model(work)
    templates = work.templates or sample_templates(model, tokenizer, 0)

    def alike():
        """Requests of the most common suffix length, with different prompts."""
        requests = list({r.prompt: r for r in work.requests}.values())
        groups = check_templates(templates)
        lengths = [suffix_tokens(edit_tokens(tokenizer, r, groups)) for r in requests]
        common = Counter(lengths).most_common(1)[0][0]
        return templates, [r for r, n in zip(requests, lengths, strict=True) if n == common], common

    return {"alike": alike}


def main():
    parser = arguments(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", help="edits whose anchors are optimised together")
    parser.add_argument("--edits", type=int, nargs="+", help="edits solved together, at the second largest d_ff")
    parser.add_argument("--d-ff", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, nargs="+")
    args = parse(parser, FULL, QUICK)
    work = workload.make(args)
    results = Results(QUESTION, args)
    anchors(results, args, work)
    solves(results, args)
    statistics(results, args, work)
    results.finish()


def anchors(results: Results, args, work: workload.Workload):
    with Side("jax", length_tasks, work, threads=args.threads) as side:
        templates, alike, length = side("alike").value
    points: dict[str, list] = {"jaxedit": [], "torch": []}
    for n in sorted({min(n, len(alike)) for n in args.sizes}):
        some = dataclasses.replace(work, requests=tuple(alike[:n]))
        repeats = 1 if n >= 64 else args.repeats
        with Side("jax", bench_anchors.jax_tasks, some, args.steps, threads=args.threads) as side:
            first = side("anchors", templates, 1e-30)
            warm = [side("anchors", templates, 1e-30) for _ in range(repeats)]
            counted = side("counted", templates, 1e-30, warm[-1].value["updates"]).value
            add(results, points, "jaxedit", side, some, args, n, warm, first, counted["used"], length)
        if n <= BASELINE_EDITS:
            with Side("torch", bench_anchors.torch_tasks, some, args.steps, threads=args.threads) as side:
                side("anchors", templates, 1e-30, 1)
                warm = [side("anchors", templates, 1e-30) for _ in range(args.repeats)]
                add(results, points, "torch", side, some, args, n, warm, None, counted["baseline"], length)
    why = {
        "jaxedit": "the FLOPs are linear in edits: 1 where the device is busy, less while more edits fill it better",
        "torch": "one edit after the other: 1",
    }
    for side, found in points.items():
        results.curves.append(Curve.of("anchors", side, "edits", "seconds", found, why[side]))


def add(results, points, name: str, side: Side, work, args, n: int, warm, first, used: float, length: int):
    settings = work.settings(steps=args.steps, suffix_tokens=length)
    made = record(f"anchors, {n} edits", name, side.about, settings, warm, first, flops=used)
    made.found["seconds_per_edit"] = made.seconds["run"].median / n
    results.records.append(made)
    points[name].append((n, made.seconds["run"].median))


def solves(results: Results, args):
    at = sorted(args.d_ff)[-2] if len(args.d_ff) > 1 else args.d_ff[0]
    n_fixed = min(100, max(args.edits))
    by_n: dict[str, list] = {"jaxedit": [], "torch": []}
    by_width: dict[str, list] = {"jaxedit": [], "torch": []}
    made: dict[str, list] = {"jaxedit": []}
    for d_ff in args.d_ff:
        d_model = d_ff // 4
        with (
            Side("jax", bench_solve.jax_tasks, d_ff, d_model, threads=args.threads) as ours,
            Side("torch", bench_solve.torch_tasks, d_ff, d_model, threads=args.threads) as theirs,
        ):
            ours("factorise")
            made["jaxedit"].append((d_ff, ours("factorise").seconds))
            for n in sorted({*args.edits, n_fixed} if d_ff == at else {n_fixed}):
                ours("edits", n, 0), theirs("edits", n, 0), ours("solve"), theirs("solve")
                both = {"jaxedit": lambda o=ours: o("solve"), "torch": lambda t=theirs: t("solve")}
                warm = interleave(args.repeats, both)
                for name, samples in warm.items():
                    about = (ours if name == "jaxedit" else theirs).about
                    count = flops.solve_cached if name == "jaxedit" else flops.solve_naive
                    settings = {"d_ff": d_ff, "d_model": d_model, "edits": n, "layers": bench_solve.LAYERS}
                    work_done = bench_solve.LAYERS * count(d_ff, d_model, n)
                    one = record(f"solve, d_ff {d_ff}, {n} edits", name, about, settings, samples, flops=work_done)
                    results.records.append(one)
                    if d_ff == at and n in args.edits:
                        by_n[name].append((n, one.seconds["run"].median))
                    if n == n_fixed:
                        by_width[name].append((d_ff, one.seconds["run"].median))
    for name in by_n:
        cached = name == "jaxedit"
        why = "2 d_ff² n + 4 d_ff n²: 1 while n is well below d_ff" if cached else "LU of d_ff³ dominates: near 0"
        results.curves.append(Curve.of(f"solve at d_ff {at}", name, "edits", "seconds", by_n[name], why))
        why = "triangular solves of d_ff² n: 2" if cached else "LU of d_ff³: 3 where it dominates"
        label = f"solve of {n_fixed} edits"
        results.curves.append(Curve.of(label, name, "d_ff", "seconds", by_width[name], why))
    why = "Cholesky of d_ff³, once for all edits: 3 where it dominates"
    results.curves.append(Curve.of("factorise", "jaxedit", "d_ff", "seconds", made["jaxedit"], why))


def statistics(results: Results, args, work: workload.Workload):
    points: dict[str, list] = {"jaxedit": [], "torch, one pass": []}
    for tokens in args.tokens:
        with (
            Side("jax", bench_statistics.jax_tasks, work, None, tokens, threads=args.threads) as ours,
            Side("torch", bench_statistics.torch_tasks, work, threads=args.threads) as theirs,
        ):
            theirs("keep", ours("rows").value)
            counted = ours("counted").value
            calls = {"jaxedit": lambda o=ours: o("second moments"), "torch, one pass": lambda t=theirs: t("one pass")}
            for call in calls.values():
                call()
            for name, samples in interleave(1 if tokens > 50_000 else args.repeats, calls).items():
                about = (ours if name == "jaxedit" else theirs).about
                settings = work.settings(tokens=counted["tokens"], layers=counted["layers"])
                label = f"statistics, {counted['tokens']} tokens"
                one = record(label, name, about, settings, samples, flops=counted["one pass"])
                results.records.append(one)
                points[name].append((counted["tokens"], one.seconds["run"].median))
    why = "each token costs the same: 1, less while a last batch that is filled up weighs"
    for name, found in points.items():
        results.curves.append(Curve.of("statistics", name, "tokens", "seconds", found, why))


if __name__ == "__main__":
    main()
