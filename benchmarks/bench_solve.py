"""What does the solve of five layers cost with the factor at hand, against torch.linalg.solve in each layer?

    python benchmarks/bench_solve.py --d-ff 4096 --out benchmarks/results/solve_cpu.json

Second moments, keys and residuals are made up: keys of correlated channels with a decaying spectrum. jaxedit's time
is from keys and residuals to dense updates, for all layers; its factor, which does not depend on the edits, is made
once and timed apart ("factorise", "absorb"). PyTorch forms λC + KᵀK and solves it by LU in float64, layer by layer,
as published. The second part adds edits to a factor that already protects many: the published procedure does all of
its work again (KᵀK of earlier keys it keeps as a sum), jaxedit solves for and absorbs the new keys only. OpenBLAS,
whose LAPACK JAX uses on a CPU, MKL and OpenMP are given all cores.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flops
import numpy as np
from harness import Side, arguments, interleave, parse, record
from records import Curve, Ratio, Results, Timing
from workload import moment, shape_config, spectrum

FULL = {"d_ff": [4096], "d_model": 1024, "edits": [100, 1000], "repeats": 5, "solved": [0, 1000, 2500, 5000]}
QUICK = {"d_ff": [512], "d_model": 64, "edits": [10, 100], "repeats": 2, "solved": [0, 100, 400]}
ADDED, LAYERS, WEIGHT, PROBES = 100, 5, 1500.0, 32
QUESTION = "What does the solve of five layers cost?"


def problem(d_ff: int, d_model: int, n: int, seed: int):
    """Keys ``[n, d_ff]`` and residuals ``[n, d_model]`` of one layer, float32."""
    chance = np.random.default_rng([seed, n])
    keys = chance.normal(size=(n, d_ff)).astype(np.float32) * spectrum(d_ff)
    return keys, chance.normal(size=(n, d_model)).astype(np.float32)


def jax_tasks(backend, d_ff: int, d_model: int):
    import jax

    from jaxedit.config import Ridge
    from jaxedit.export.patch import Delta
    from jaxedit.solvers import ridge
    from jaxedit.statistics import SecondMoment, SecondMoments

    layers = tuple(range(LAYERS))
    solver = Ridge(cov_weight=WEIGHT)
    stats = SecondMoments({l: SecondMoment(moment(d_ff, l), 4 * d_ff) for l in layers})
    held: dict[str, Any] = {}

    def factorise():
        held["factor"] = ridge.factorise(solver, stats, layers, cache=False)
        jax.block_until_ready([held["factor"][l].triangle for l in layers])

    def edits(n: int, seed: int):
        held["edits"] = [problem(d_ff, d_model, n, seed + l) for l in layers]

    def solve():
        """Dense updates of all layers; returns the worst residual that jaxedit reports."""
        found = [ridge.solve(held["factor"], l, keys, residuals) for l, (keys, residuals) in enumerate(held["edits"])]
        held["updates"] = [Delta(f.left, f.right).dense() for f in found]
        return max(f.residual for f in found)

    def absorb():
        """The factor that protects the edits too, kept aside until `grow`."""
        factor = held["factor"]
        for l in layers:
            factor = ridge.absorb(factor, l, held["edits"][l][0])
        held["grown"] = factor
        jax.block_until_ready([factor[l].triangle for l in layers])

    def grow():
        held["factor"] = held["grown"]

    def residual(solved: list[tuple[int, int]]):
        return worst_residual(d_ff, stats, held["edits"], held["updates"], solved)

    return {
        "factorise": factorise,
        "edits": edits,
        "solve": solve,
        "absorb": absorb,
        "grow": grow,
        "residual": residual,
    }


def torch_tasks(backend, d_ff: int, d_model: int):
    import torch
    from torch_baseline import solve as baseline

    layers = range(LAYERS)
    moments = [torch.from_numpy(moment(d_ff, l)).to(backend.device) for l in layers]
    past = [torch.zeros((d_ff, d_ff), dtype=torch.float64, device=backend.device) for _ in layers]
    held: dict[str, Any] = {}

    def edits(n: int, seed: int):
        made = [problem(d_ff, d_model, n, seed + l) for l in layers]
        held["edits"] = [[torch.from_numpy(x).to(backend.device) for x in each] for each in made]

    def solve():
        held["updates"] = [baseline.updates(m, k, r, WEIGHT) for m, (k, r) in zip(moments, held["edits"], strict=True)]

    def solve_again():
        """With earlier keys in the sum: λC + K₀ᵀK₀ in place of λC."""
        sums = (WEIGHT * m.double() + p for m, p in zip(moments, past, strict=True))
        held["updates"] = [baseline.updates(m, k, r, 1.0) for m, (k, r) in zip(sums, held["edits"], strict=True)]

    def grow():
        for l in layers:
            keys = held["edits"][l][0].double()
            past[l].addmm_(keys.T, keys)

    def residual(solved: list[tuple[int, int]]):
        host = [[x.cpu().numpy() for x in each] for each in held["edits"]]
        stats = [m.cpu().numpy() for m in moments]
        return worst_residual(d_ff, stats, host, [u.cpu().numpy() for u in held["updates"]], solved)

    return {"edits": edits, "solve": solve, "solve again": solve_again, "grow": grow, "residual": residual}


def worst_residual(d_ff: int, moments, edits, updates, solved) -> float:
    """Largest ``‖(λC + KᵀK) ΔW − KᵀR‖ / ‖KᵀR‖`` of the layers, in float64 from scratch; solved: earlier edits.

    Of `PROBES` random combinations of the columns, for which the norms are the same in the mean.
    """
    found = []
    mix = np.random.default_rng(0).normal(size=(updates[0].shape[1], PROBES))
    for l, ((k, r), update) in enumerate(zip(edits, updates, strict=True)):
        c = moments[l].matrix if hasattr(moments[l], "matrix") else moments[l]
        every = np.concatenate([k, *(problem(d_ff, 1, n, seed + l)[0] for n, seed in solved)]).astype(np.float64)
        right, update = k.T.astype(np.float64) @ (r @ mix), update @ mix
        left = WEIGHT * (c.astype(np.float64) @ update) + every.T @ (every @ update)
        found.append(float(np.linalg.norm(left - right) / np.linalg.norm(right)))
    return max(found)


def main():
    parser = arguments(__doc__)
    parser.add_argument("--d-ff", type=int, nargs="+")
    parser.add_argument("--d-model", type=int)
    parser.add_argument("--edits", type=int, nargs="+", help="edits solved together")
    parser.add_argument("--solved", type=int, nargs="*", help="edits already solved before 100 more are added")
    args = parse(parser, {"count": 0, "steps": 0, **FULL}, QUICK)
    if args.shape is not None:
        config = shape_config(args.shape)
        args.d_ff, args.d_model = [config.d_ff], config.d_model
    results = Results(QUESTION, args)
    for d_ff in args.d_ff:
        with (
            Side("jax", jax_tasks, d_ff, args.d_model, threads=args.threads) as ours,
            Side("torch", torch_tasks, d_ff, args.d_model, threads=args.threads) as theirs,
        ):
            ceilings = ours("ceiling", "float64").value, theirs("ceiling", "float64").value
            first = ours("factorise")
            settings = {"d_ff": d_ff, "d_model": args.d_model, "layers": LAYERS, "dtype": "float64"}
            again = [ours("factorise")]
            work_done = {
                "flops": LAYERS * d_ff**3 / 3,
                "counted": "d_ff^3 / 3 a layer; the condition number is left out",
            }
            made = record("factorise", "jaxedit", ours.about, settings, again, first, ceiling=ceilings[0], **work_done)
            results.records.append(made)
            for n in args.edits:
                fixed(results, args, settings, n, ours, theirs, ceilings)
            if args.solved:
                growing(results, args, settings, ours, theirs, ceilings)
    results.finish()


def fixed(results: Results, args, settings, n: int, ours: Side, theirs: Side, ceilings):
    """n edits at once."""
    ours("edits", n, 0), theirs("edits", n, 0)
    first = ours("solve")
    theirs("solve")
    warm = interleave(args.repeats, {"jaxedit": lambda: ours("solve"), "torch": lambda: theirs("solve")})
    made = {}
    for side, count, ceiling in (("jaxedit", flops.solve_cached, 0), ("torch", flops.solve_naive, 1)):
        where = theirs if side == "torch" else ours
        made[side] = record(
            f"solve, {n} edits, d_ff {settings['d_ff']}",
            side,
            where.about,
            {**settings, "edits": n},
            warm[side],
            first if side == "jaxedit" else None,
            flops=LAYERS * count(settings["d_ff"], settings["d_model"], n),
            counted=(count.__doc__ or "").splitlines()[0],
            ceiling=ceilings[ceiling],
            found={"relative_residual": where("residual", []).value},
        )
    made["jaxedit"].found["residual_reported"] = warm["jaxedit"][-1].value
    results.records += made.values()
    results.ratios.append(Ratio.of(made["torch"].name, made["jaxedit"], made["torch"]))


def growing(results: Results, args, settings, ours: Side, theirs: Side, ceilings):
    """ADDED edits on top of more and more solved ones."""
    points: dict[str, list[tuple[float, float]]] = {"jaxedit": [], "torch": []}
    solved: list[tuple[int, int]] = []
    for target in args.solved:
        more = target - sum(n for n, _ in solved)
        if more > 0:
            seed = 100 * (1 + len(solved))
            ours("edits", more, seed), theirs("edits", more, seed)
            ours("absorb"), ours("grow"), theirs("grow")
            solved.append((more, seed))
        ours("edits", ADDED, 7), theirs("edits", ADDED, 7)
        ours("solve"), ours("absorb")
        calls = {
            "solve": lambda: ours("solve"),
            "absorb": lambda: ours("absorb"),
            "torch": lambda: theirs("solve again"),
        }
        warm = interleave(args.repeats, calls)
        name = f"add {ADDED} edits to {target}, d_ff {settings['d_ff']}"
        now = {**settings, "edits": ADDED, "solved": target}
        found = {"relative_residual": ours("residual", solved).value}
        solve = record(name, "jaxedit", ours.about, now, warm["solve"], ceiling=ceilings[0], found=found)
        parts = {part: Timing(tuple(s.seconds for s in warm[part])) for part in ("solve", "absorb")}
        both = Timing(tuple(a + b for a, b in zip(*(t.samples for t in parts.values()), strict=True)))
        mine = dataclasses.replace(solve, seconds={"run": both, **parts})
        found = {"relative_residual": theirs("residual", solved).value}
        other = record(name, "torch", theirs.about, now, warm["torch"], ceiling=ceilings[1], found=found)
        results.records += [mine, other]
        results.ratios.append(Ratio.of(name, mine, other))
        results.ratios.append(Ratio.of(f"{name}, without absorbing them", solve, other))
        points["jaxedit"].append((target + ADDED, both.median))
        points["torch"].append((target + ADDED, other.seconds["run"].median))
    why = f"solve and absorb {ADDED} edits: O(d_ff² · {ADDED}) whatever is solved already, so the exponent is 0"
    other = "the d_ff³ of a new LU, which does not depend on the edits, is paid again with each batch"
    for side, text in (("jaxedit", why), ("torch", other)):
        curve = Curve.of(
            f"add {ADDED} edits, d_ff {settings['d_ff']}", side, "edits in the end", "seconds", points[side], text
        )
        results.curves.append(curve)


if __name__ == "__main__":
    main()
