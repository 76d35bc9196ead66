"""Edit one batch with several methods at several cov_weights, and measure each edited model.

Anchors do not depend on cov_weight, so they are found once and shared: BLUE's first is Forward Replay's. (BLUE's
second is found on the edited model, anew each time.) Statistics, templates and evaluation prompts are the same for all.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jaxedit as je

METHODS = ("fe", "memit", "memit_no_divide", "blue")
MEASURES = (
    "efficacy_success",
    "efficacy_accuracy",
    "paraphrase_success",
    "paraphrase_accuracy",
    "neighbourhood_success",
)


def sweep(
    model,
    tokenizer,
    requests,
    stats,
    templates,
    methods: Sequence[str],
    weights: Sequence[float],
    neighbours: int | None,
) -> list[dict]:
    """One row a method and cov_weight; `report` is told each as it is made."""
    rows = []
    shared: dict[tuple, je.Targets] = {}
    for name in methods:
        preset = je.method_for(name, model.config)
        key = (type(preset.targets).__name__, preset.layers[-1], preset.anchor)
        if not isinstance(preset.targets, je.PerLayer) and key not in shared:
            shared[key] = je.targets(model, tokenizer, requests, preset, templates=templates)
        for weight in weights:
            method = dataclasses.replace(preset, solver=je.Ridge(cov_weight=weight))
            given = shared.get(key) or first_anchor(preset, shared)
            start = time.perf_counter()
            result = je.apply_edits(model, tokenizer, requests, method, stats=stats, targets=given, templates=templates)
            seconds = time.perf_counter() - start
            report = je.evaluate(model, result.model, tokenizer, requests, max_neighbours=neighbours)
            rows.append(
                {
                    "method": name,
                    "cov_weight": weight,
                    **{m: report.edited[m] for m in MEASURES},
                    **report.specificity,
                    "score": report.edited["score"],
                    "remaining": [1.0] + [layer.residual_after for layer in result.info.layers],
                    "layers": [layer.layer for layer in result.info.layers],
                    "update_norm": [layer.relative_update_norm for layer in result.info.layers],
                    "solve_residual": max(layer.solve_residual for layer in result.info.layers),
                    "edit_seconds": seconds,
                    "evaluate_seconds": time.perf_counter() - start - seconds,
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


def first_anchor(preset: je.Method, shared: dict[tuple, je.Targets]) -> je.Targets | None:
    """PerLayer's first anchor, which Forward Replay has found if it starts at the same layer."""
    for (kind, _, anchor), targets in shared.items():
        if kind == "ForwardReplay" and anchor == preset.anchor and targets.layers[0] == preset.layers[0]:
            return je.Targets(targets.layers[:1], targets.values[:1], targets.lookup, targets.anchors)
    return None


HEADER = "method           cov_weight  eff.succ  eff.acc  para.succ  para.acc  neigh.succ      KL  top-1   remaining"


def line(row: dict) -> str:
    """One row as text, rates in percent."""
    rates = "  ".join(f"{100 * row[m]:8.1f}" for m in MEASURES)
    rest = " ".join(f"{r:.3f}" for r in row["remaining"][1:])
    return f"{row['method']:16s} {row['cov_weight']:9.0f}  {rates}  {row['kl']:7.4f}  {100 * row['top1']:5.1f}   {rest}"
