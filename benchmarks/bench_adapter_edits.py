"""How many edits a second do iReVa and GRACE take in, against PyTorch loops of the published algorithms?

    python benchmarks/bench_adapter_edits.py --requests counterfact.json --out benchmarks/results/adapter_edits.json

"iReVa": keys and values from the model alone. "iReVa +L": then trained ("retrofit"); texts out of scope are drawn once,
and both sides get them, so the time that it takes to draw them is in neither. "GRACE": codebook and values, 100 steps.
PyTorch makes one edit after another, as published; see `torch_baseline/adapters.py` for what it does not compute twice.
"torch, batched" takes many prompts in a pass, where nothing is trained. Both sides' keys and values are compared.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import workload
from harness import Side, arguments, interleave, parse, record
from records import Ratio, Record, Results

FULL = {"count": 48, "trained": 12, "steps": 100, "repeats": 3}
QUICK = {"count": 4, "trained": 2, "steps": 3, "repeats": 1}
FEW = 3  # steps after which values of GRACE are compared: later, rounding has grown
BATCH = 128
QUESTION = "How many edits a second do adapters take in?"


def jax_tasks(backend, work: workload.Workload, trained: int, steps: int):
    from unittest.mock import patch

    from jaxedit.adapters import ireva_retrofit
    from jaxedit.adapters.codebook import drawn
    from jaxedit.adapters.grace import Grace
    from jaxedit.adapters.ireva import IReVa

    model, tokenizer = workload.jax_model(work)
    settings = IReVa(retrofit=True)
    scope = ireva_retrofit.out_of_scope(model, tokenizer, work.requests)

    def neurons(retrofit: bool):
        made = dataclasses.replace(settings, retrofit=retrofit)
        with patch.object(ireva_retrofit, "out_of_scope", lambda *_: scope):
            state, _ = made.edit(model, tokenizer, work.requests)
        used = np.asarray(state.owner) >= 0
        return np.asarray(state.keys)[used], np.asarray(state.values)[used]

    def grace(steps: int = steps):
        state, trace = Grace(steps=steps).edit(model, tokenizer, work.requests[:trained])
        used = np.asarray(state.owner) >= 0
        return *(np.asarray(x)[used] for x in (state.keys, state.values, state.radii)), trace["losses"]

    def about():
        names = ("alpha", "theta", "rec_weight", "irr_weight", "steps", "lr", "betas", "weight_decay")
        plain = {"scope": tuple(scope), "ireva": {name: getattr(settings, name) for name in names}}
        plain["layers"] = {"ireva": settings.layer_in(model.config), "grace": Grace().layer_of(model.config)}
        plain["grace"] = {"radius": Grace().radius, "lr": Grace().lr}
        return plain | {"cold": np.asarray(drawn(0, np.arange(trained), model.config.d_model))}

    def texts():
        ireva_retrofit.out_of_scope(model, tokenizer, work.requests)

    calls = {"iReVa": partial(neurons, False), "iReVa +L": partial(neurons, True), "GRACE": grace}
    return {**calls, "about": about, "texts out of scope": texts}


def torch_tasks(backend, work: workload.Workload, trained: int, steps: int, given):
    from torch_baseline import adapters as baseline
    from torch_baseline.models import load

    from jaxedit.data.tokens import CLEAN, validate

    model, tokenizer = load(work.directory, work.dtype, backend.device)
    edits = validate(tokenizer, work.requests, CLEAN, model.config.max_position_embeddings)
    layers = given["layers"]

    def plain(*arrays):
        return tuple(np.asarray(x) for x in arrays)

    def ireva(batch: int = 1):
        return plain(*baseline.ireva(model, edits, layers["ireva"], batch))

    def retrofit():
        return plain(*baseline.retrofit(model, edits, layers["ireva"], given["scope"], given["ireva"]))

    def grace(steps: int = steps):
        chosen = {**given["grace"], "steps": steps}
        return plain(*baseline.grace(model, edits[:trained], layers["grace"], given["cold"], chosen))

    return {"iReVa": ireva, "iReVa +L": retrofit, "GRACE": grace, "batched": partial(ireva, BATCH)}


def main():
    parser = arguments(__doc__)
    parser.add_argument("--trained", type=int, help="edits of GRACE, on either side")
    args = parse(parser, FULL, QUICK)
    if args.shape is not None:
        raise SystemExit("both sides must have the same weights: give --model instead of --shape")
    work = workload.make(args)
    results = Results(QUESTION, args)
    with Side("jax", jax_tasks, work, args.trained, args.steps, threads=args.threads) as ours:
        given = ours("about").value
        with Side("torch", torch_tasks, work, args.trained, args.steps, given, threads=args.threads) as theirs:
            for name in ("iReVa", "iReVa +L", "GRACE"):
                edits = min(args.trained, len(work.requests)) if name == "GRACE" else len(work.requests)
                calls = {"jaxedit": partial(ours, name), "torch": partial(theirs, name)}
                if name == "iReVa":
                    calls["torch, batched"] = partial(theirs, "batched")
                found = differences(ours, theirs, name)
                first = {side: call() for side, call in calls.items()}
                warm = interleave(args.repeats, calls)
                made: dict[str, Record] = {}
                for side in calls:
                    about = (ours if side == "jaxedit" else theirs).about
                    rate = {"edits_per_s": edits / float(np.median([s.seconds for s in warm[side]]))}
                    settings = work.settings() | {"edits": edits}
                    more = found if side == "jaxedit" else {}
                    made[side] = record(name, side, about, settings, warm[side], first[side], found=rate | more)
                    results.records.append(made[side])
                for side in list(calls)[1:]:
                    label = name + side.removeprefix("torch")
                    results.ratios.append(Ratio.of(f"{label}, warm", made["jaxedit"], made[side]))
                rates = ", ".join(f"{side} {r.found['edits_per_s']:.2f}" for side, r in made.items())
                gaps = ", ".join(f"{what} {gap:.1e}" for what, gap in found.items())
                results.notes.append(
                    f"{name}: edits a second of {edits}: {rates}. Largest differences of the sides: {gaps}."
                )
                print(results.notes[-1], flush=True)
        ours("texts out of scope")
        texts = [ours("texts out of scope") for _ in range(args.repeats)]
        results.records.append(record("texts out of scope", "jaxedit", ours.about, work.settings(), texts))
    results.finish()


def differences(ours: Side, theirs: Side, name: str) -> dict[str, float]:
    """How far keys and values of both sides are apart; of GRACE after a few steps.

    Where gradients are nearly nothing, Adam's steps are rounding on either side, so that a few entries of what is
    trained are further apart than 1e-4. In float64 they are not (tests/parity/test_torch_baseline.py).
    """
    steps = {"steps": FEW} if name == "GRACE" else {}
    mine, other = ours(name, **steps).value, theirs(name, **steps).value
    found = {}
    for what, a, b in zip(("keys", "values"), mine, other, strict=False):
        apart = np.abs(a - b)
        found |= {what: float(apart.max()), f"share of {what} beyond 1e-4": float((apart > 1e-4).mean())}
        if found[what] > 1e-4 if name == "iReVa" else found[f"share of {what} beyond 1e-4"] > 0.01:
            raise SystemExit(f"{name}: the sides do not do the same work: {found}")
    return found


if __name__ == "__main__":
    main()
