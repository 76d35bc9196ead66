"""Every locate-then-edit method on the same facts: what it achieves, what else changes, and what it costs.

    python benchmarks/family.py counterfact.json zsre.json --count 100 --out benchmarks/results/family_smollm2.json

Anchors are found once for all methods that have the same ones, which is also how the seconds are given: of the anchors
of that kind, and of everything else. Methods that make edits one at a time find anchors as they go. Rates are of the
edited model, `base` of the unedited one. --set changes a preset, as in ``--set alphaedit.l2=1``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
from sweep import MEASURES

import jaxedit as je
from jaxedit.data.templates import sample_templates
from jaxedit.plain import describe

METHODS = (
    *("memit", "one_layer", "blue", "alphaedit", "prune", "rect", "emmet", "pmet", "adaedit", "namet", "nse"),
    *("fe", "alphaedit+fe", "prune+fe", "rect+fe", "rome", "r_rome"),
)


def changed(method: je.Method, settings: list[str]) -> je.Method:
    """The method with ``field=value`` of its solver, its anchors or itself."""
    for setting in settings:
        field, value = setting.split("=")
        number: Any = value
        with contextlib.suppress(ValueError):
            number = float(value)
        for part in ("solver", "anchor"):
            of = getattr(method, part)
            if field in {f.name for f in dataclasses.fields(of)}:
                method = dataclasses.replace(method, **{part: dataclasses.replace(of, **{field: number})})
                break
        else:
            method = dataclasses.replace(method, **{field: number})
    return method


def first_layer_anchors(found: je.Targets) -> je.Targets:
    return je.Targets(found.layers[:1], found.values[:1], found.lookup, {l: found.anchors[l] for l in found.layers[:1]})


class Shared:
    """Targets that methods share, and the seconds that they took."""

    def __init__(self, model, tokenizer, requests, templates):
        self.arguments, self.templates = (model, tokenizer, requests), templates
        self.found: dict[tuple, tuple[je.Targets, float]] = {}

    def of(self, method: je.Method) -> tuple[je.Targets | None, float]:
        if method.at_once is not None:
            return None, 0.0
        layers = method.layers
        if isinstance(method.targets, je.PerLayer):
            like = dataclasses.replace(method, targets=je.ForwardReplay())
        else:
            like = method
            layers = layers if isinstance(method.targets, je.ForwardReplay) else layers[-1:]
        key = (type(like.targets).__name__, layers if like is method else layers[:1], method.anchor)
        if key not in self.found:
            start = time.perf_counter()
            found = je.targets(*self.arguments, like, templates=self.templates)
            self.found[key] = found, time.perf_counter() - start
        found, seconds = self.found[key]
        return (found if like is method else first_layer_anchors(found)), seconds


def run(model, tokenizer, requests, stats, methods, changes, neighbours: int | None) -> list[dict]:
    templates = sample_templates(model, tokenizer, 0)
    shared, rows = Shared(model, tokenizer, requests, templates), []
    print(HEADER)
    for name in methods:
        own = [s.partition(".")[2] for s in changes if s.startswith(f"{name}.")]
        method = changed(je.method_for(name, model.config), own)
        given, anchors = shared.of(method)
        start = time.perf_counter()
        result = je.apply_edits(model, tokenizer, requests, method, stats=stats, targets=given, templates=templates)
        spent = time.perf_counter() - start
        report = je.evaluate(model, result.model, tokenizer, requests, max_neighbours=neighbours)
        if not rows:
            rows.append(
                row("base", {m: report.base[m] for m in MEASURES}, {"kl": 0.0, "top1": 1.0}, report.base["score"])
            )
            print(line(rows[-1]))
        made = row(name, {m: report.edited[m] for m in MEASURES}, report.specificity, report.edited["score"])
        layers = result.info.layers
        made |= {
            "settings": describe(method),
            "anchor_seconds": anchors,
            "other_seconds": spent,
            "remaining": float(np.nanmean(result.info.remaining[-1]) / np.nanmean(result.info.remaining[0])),
            "update_norm": [l.relative_update_norm for l in layers],
            "solve_residual": max(l.solve_residual for l in layers),
        }
        rows.append(made)
        print(line(made), flush=True)
    return rows


def row(name: str, rates: dict, specificity: dict, score) -> dict:
    return {"method": name, **rates, **specificity, "score": score}


HEADER = (
    "method           eff.succ/acc   para.succ/acc  neigh.  score   KL     top-1  remaining  seconds: anchors, rest"
)


def line(r: dict) -> str:
    def percent(x) -> str:
        return f"{100 * x:6.1f}" if x is not None else "     -"

    rates = [percent(r[m]) for m in MEASURES] + [percent(r["score"])]
    text = f"{r['method']:14s} {rates[0]} {rates[1]}  {rates[2]} {rates[3]}  {rates[4]} {rates[5]}"
    text += f"  {r['kl']:.3f} {percent(r['top1'])}"
    if "remaining" in r:
        text += f"  {r['remaining']:8.3f}  {r['anchor_seconds']:10.1f} {r['other_seconds']:8.1f}"
    return text


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("requests", nargs="+", help="files of edit requests; a table for each")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--first", type=int, default=0, help="first record to use")
    parser.add_argument("--count", type=int, default=100, help="how many records")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens for the second moments")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--neighbours", type=int, help="neighbourhood prompts a record (default: all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="METHOD.FIELD=VALUE")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    args = parser.parse_args()
    tables: dict[str, list[dict]] = {}
    for file in args.requests:
        given = argparse.Namespace(**{**vars(args), "requests": file})
        model, tokenizer, requests, stats = common.prepare(given, None)
        print(f"\n{Path(file).name}: {len(requests)} edits")
        tables[Path(file).name] = run(model, tokenizer, requests, stats, args.methods, args.set, args.neighbours)
        about = {"machine": common.machine(), "model": args.model, "first": args.first, "count": args.count}
        common.write(args.out, {**about, "tokens": args.tokens, "changes": args.set, "tables": tables})


if __name__ == "__main__":
    main()
