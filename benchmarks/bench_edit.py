"""What does a whole edit cost, Forward Replay and MEMIT, against PyTorch, and does it work on both sides?

    python benchmarks/bench_edit.py --requests counterfact.json --out benchmarks/results/edit_cpu.json

`jaxedit.apply_edits` against `torch_baseline.edit.apply`, with the same second moments, templates and settings. Both
times are from requests to edited weights. jaxedit's includes factoring λC and what the baseline does not do: the
residual of each layer's solve and of the whole edit, rounding losses, a patch, and target probabilities before and
after. "first" is the first edit of a fresh process, with an empty compilation cache.
"""

from __future__ import annotations

import tempfile

import numpy as np
import workload
from harness import Side, arguments, compilation_cache, interleave, parse, record
from records import Ratio, Results

FULL = {"count": 16, "steps": 25, "repeats": 3, "tokens": 100_000, "baseline_count": 0}
QUICK = {"count": 2, "steps": 5, "repeats": 1, "tokens": 4096}
METHODS = ("fe", "memit")
QUESTION = "What does a whole edit cost?"


def jax_tasks(backend, work: workload.Workload, steps: int, tokens: int):
    import jaxedit as je
    from jaxedit.data.templates import sample_templates

    model, tokenizer = workload.jax_model(work)
    layers = workload.method("fe", model.config, steps).layers
    held = {}

    def statistics():
        if work.shape is not None:
            matrices = {l: workload.moment(model.config.d_ff, l) for l in layers}
            held["stats"] = je.SecondMoments.from_arrays(matrices, 4 * model.config.d_ff)
            return None
        held["stats"] = je.second_moments(model, tokenizer, None, layers, max_tokens=tokens)
        return {l: held["stats"][l].matrix for l in layers}

    def edit(name: str, templates):
        method = workload.method(name, model.config, steps)
        held["result"] = je.apply_edits(
            model, tokenizer, work.requests, method, stats=held["stats"], templates=templates
        )
        info = held["result"].info
        return {"seconds": info.seconds, "updates": info.updates}

    def outcome():
        """Metrics of the edited model, and updates by which they can be compared."""
        result = held["result"]
        report = je.evaluate(model, result.model, tokenizer, work.requests)
        return {k: v for k, v in report.edited.items() if v is not None}, updates(result)

    def updates(result):
        found = {}
        for l in layers:
            before, after = (m.params["blocks"]["down"]["w"][l] for m in (model, result.model))
            found[l] = np.asarray(after, np.float64) - np.asarray(before, np.float64)
        return {l: x.sum(1) for l, x in found.items()}

    return {
        "templates": lambda: sample_templates(model, tokenizer, 0),
        "statistics": statistics,
        "edit": edit,
        "outcome": outcome,
    }


def torch_tasks(backend, work: workload.Workload, steps: int, baseline_count: int):
    import torch
    from torch_baseline import edit as baseline
    from torch_baseline import evaluate

    model, tokenizer = workload.torch_model(work, backend.device)
    config = workload.config_of(work)
    layers = workload.method("fe", config, steps).layers
    requests = work.requests[: baseline_count or None]
    held = {}

    def statistics(matrices):
        matrices = matrices or {l: workload.moment(config.d_ff, l) for l in layers}
        held["moments"] = {l: torch.from_numpy(m).to(backend.device) for l, m in matrices.items()}

    def edit(name: str, templates):
        chosen = workload.method(name, config, steps)
        held["result"] = baseline.apply(
            model,
            tokenizer,
            requests,
            name,
            chosen.layers,
            chosen.anchor,
            chosen.solver.cov_weight,
            templates,
            held["moments"],
        )
        return {"seconds": held["result"]["seconds"], "updates": [a.updates for a in held["result"]["anchors"]]}

    def outcome():
        """As jaxedit's, and the weights are put back."""
        found = evaluate.metrics(model, tokenizer, requests)
        sums = {l: d.sum(1).cpu().numpy() for l, d in held["result"]["deltas"].items()}
        return {k: v for k, v in found.items() if v is not None}, sums

    def restore():
        baseline.restore(model, held["result"])

    return {"statistics": statistics, "edit": edit, "outcome": outcome, "restore": restore}


def main():
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, help="tokens for the second moments")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--baseline-count", type=int, help="edits that PyTorch makes (0: all)")
    args = parse(parser, FULL, QUICK)
    work = workload.make(args)
    results = Results(QUESTION, args)
    for name in args.methods:
        with tempfile.TemporaryDirectory() as cache:
            fresh = {"threads": args.threads, "environment": compilation_cache(cache)}
            with (
                Side("jax", jax_tasks, work, args.steps, args.tokens, **fresh) as ours,
                Side("torch", torch_tasks, work, args.steps, args.baseline_count, threads=args.threads) as theirs,
            ):
                theirs("statistics", ours("statistics").value)
                templates = work.templates or ours("templates").value
                compare(results, args, work, name, templates, ours, theirs)
    results.finish()


def compare(results: Results, args, work, name: str, templates, ours: Side, theirs: Side):
    def baseline():
        made = theirs("edit", name, templates)
        theirs("restore")
        return made

    calls = {"jaxedit": lambda: ours("edit", name, templates), "torch": baseline}
    few = args.baseline_count or len(work.requests)
    first = {"jaxedit": calls["jaxedit"](), "torch": theirs("edit", name, templates)}
    (mine, my_sums), (other, other_sums) = ours("outcome").value, theirs("outcome").value
    theirs("restore")
    warm = interleave(args.repeats, calls)
    made = {}
    for side, samples in warm.items():
        value = samples[-1].value
        edits = few if side == "torch" else len(work.requests)
        found = {
            "edits": edits,
            "seconds_per_edit": float(np.median([s.seconds for s in samples])) / edits,
            "stages": value["seconds"],
            "mean_updates": float(np.mean(value["updates"])),
            "metrics": mine if side == "jaxedit" else other,
        }
        same = (
            work.shape is None
            and few == len(work.requests)
            and list(value["updates"]) == list(first["torch"].value["updates"])
        )
        if side == "jaxedit" and same:
            found["relative_difference_of_updates"] = max(
                float(np.linalg.norm(my_sums[l] - other_sums[l]) / np.linalg.norm(other_sums[l])) for l in my_sums
            )
        about = (ours if side == "jaxedit" else theirs).about
        settings = work.settings(method=name, steps=args.steps, tokens=args.tokens)
        made[side] = record(f"edit, {name}", side, about, settings, samples, first[side], found=found)
    results.records += made.values()

    def per_edit(r):
        return r.found["edits"]

    results.ratios.append(Ratio.of(f"edit, {name}, warm", made["jaxedit"], made["torch"], per=per_edit))
    label = f"edit, {name}, first with compilation"
    results.ratios.append(Ratio.of(label, made["jaxedit"], made["torch"], "first", per_edit))
    for side, r in made.items():
        shown = ", ".join(f"{k} {v:.2f} s" for k, v in sorted(r.found["stages"].items(), key=lambda x: -x[1]))
        metrics = ", ".join(f"{k} {100 * v:.1f}" for k, v in r.found["metrics"].items() if "magnitude" not in k)
        results.notes.append(f"{name}, {side}: {shown}. After the edit (percent): {metrics}.")
    if few < len(work.requests):
        results.notes.append(f"{name}: PyTorch made {few} of the {len(work.requests)} edits; times are per edit.")


if __name__ == "__main__":
    main()
