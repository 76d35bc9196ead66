"""What does evaluation cost, against PyTorch?

    python benchmarks/bench_evaluation.py --requests counterfact.json --out benchmarks/results/evaluation_cpu.json

Both score a model and a changed copy of it at every prompt of every request, each with its two targets. jaxedit also
measures the drift between them (KL, overlap of the likeliest tokens) at neighbourhood prompts, which the baseline
does not. The copy has the edited matrices scaled by 1.05.
"""

from __future__ import annotations

import numpy as np
import workload
from harness import Side, arguments, interleave, parse, record
from records import Ratio, Results

FULL = {"count": 48, "steps": 25, "repeats": 3}
QUICK = {"count": 2, "repeats": 1}
SCALE = 1.05
QUESTION = "What does evaluation cost?"


def jax_tasks(backend, work: workload.Workload):
    import jaxedit as je

    model, tokenizer = workload.jax_model(work)
    layers = workload.method("fe", model.config, 25).layers
    params = model.params
    down = params["blocks"]["down"]
    changed = down["w"].at[np.asarray(layers)].multiply(SCALE)
    copy = model.with_params({**params, "blocks": {**params["blocks"], "down": {**down, "w": changed}}})

    def evaluate():
        report = je.evaluate(model, copy, tokenizer, work.requests)
        return {"base": report.base, "edited": report.edited, "prompts": sum(len(r.prompts) for r in report.records)}

    return {"evaluate": evaluate}


def torch_tasks(backend, work: workload.Workload):
    from torch_baseline import evaluate as baseline
    from torch_baseline.models import matrix

    model, tokenizer = workload.torch_model(work, backend.device)
    layers = workload.method("fe", workload.config_of(work), 25).layers
    weights = {l: matrix(model, l).clone() for l in layers}

    def evaluate():
        base = baseline.metrics(model, tokenizer, work.requests)
        for l in layers:
            matrix(model, l).mul_(SCALE)
        edited = baseline.metrics(model, tokenizer, work.requests)
        for l in layers:
            matrix(model, l).copy_(weights[l])
        return {"base": base, "edited": edited}

    return {"evaluate": evaluate}


def main():
    args = parse(arguments(__doc__), FULL, QUICK)
    work = workload.make(args)
    results = Results(QUESTION, args)
    with (
        Side("jax", jax_tasks, work, threads=args.threads) as ours,
        Side("torch", torch_tasks, work, threads=args.threads) as theirs,
    ):
        calls = {"jaxedit": lambda: ours("evaluate"), "torch": lambda: theirs("evaluate")}
        first = {side: call() for side, call in calls.items()}
        warm = interleave(args.repeats, calls)
    mine, other = (warm[side][-1].value for side in calls)
    gaps = [
        abs(mine[which][name] - value)
        for which in ("base", "edited")
        for name, value in other[which].items()
        if value is not None
    ]
    for side, about in (("jaxedit", ours.about), ("torch", theirs.about)):
        found = {"prompts": mine["prompts"], "metrics": warm[side][-1].value["edited"]}
        if side == "jaxedit" and work.shape is None:  # random weights are not the same on both sides
            found["largest_difference_to_torch"] = max(gaps)
        settings = work.settings(prompts=mine["prompts"])
        results.records.append(record("evaluation", side, about, settings, warm[side], first[side], found=found))
    results.ratios.append(Ratio.of("evaluation, warm", results.records[0], results.records[1]))
    results.ratios.append(
        Ratio.of("evaluation, first with compilation", results.records[0], results.records[1], "first")
    )
    if work.shape is None:
        results.notes.append(f"Largest difference of a rate or score between the sides: {max(gaps):.4f}.")
    results.finish()


if __name__ == "__main__":
    main()
