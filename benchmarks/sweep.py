"""Edit one batch with several methods and settings, and measure each edited model.

Anchors do not depend on how they are solved for, so each kind is found once and shared: by all methods that have the
same, and BLUE's first is Forward Replay's. (BLUE's second is found on the edited model, and methods that make edits one
at a time find theirs as they go.) Statistics, templates and evaluation prompts are the same for all.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

import jaxedit as je
from jaxedit.data.templates import sample_templates
from jaxedit.plain import describe

MEASURES = (
    "efficacy_success",
    "efficacy_accuracy",
    "paraphrase_success",
    "paraphrase_accuracy",
    "neighbourhood_success",
)


def changed(method: je.Method, settings: dict[str, Any]) -> je.Method:
    """The method with other fields of its solver, its anchors, its targets, its regulariser or itself."""
    for field, value in settings.items():
        for part in ("solver", "anchor", "targets", "regulariser"):
            of = getattr(method, part)
            if of is not None and field in {f.name for f in dataclasses.fields(of)}:
                method = dataclasses.replace(method, **{part: dataclasses.replace(of, **{field: value})})
                break
        else:
            method = dataclasses.replace(method, **{field: value})
    return method


class Bench:
    """One model and one batch of requests, on which methods are measured."""

    def __init__(self, model, tokenizer, requests, stats, neighbours: int | None):
        self.arguments, self.stats, self.neighbours = (model, tokenizer, requests), stats, neighbours
        self.templates = sample_templates(model, tokenizer, 0)
        self.found: dict[tuple, tuple[je.Targets, float]] = {}  # by kind, layers and how anchors are found

    def targets(self, method: je.Method) -> tuple[je.Targets | None, float]:
        """Targets that the method shares with others, if it does, and the seconds that they took."""
        if method.at_once is not None:
            return None, 0.0
        first_only = isinstance(method.targets, je.PerLayer)
        like = dataclasses.replace(method, targets=je.ForwardReplay()) if first_only else method
        # of a spread only the last layer's target is an anchor; replayed ones are of all layers
        layers = like.layers[-1:] if isinstance(like.targets, je.BackwardSpread) else like.layers
        kind = je.BackwardSpread if isinstance(like.targets, je.BackwardSpread) else type(like.targets)
        first = (kind, layers[0], like.anchor)
        fits = [f for (t, l, a), f in self.found.items() if (t, l[0], a) == first and (first_only or l == layers)]
        if fits:
            known = fits[0]
        else:
            start = time.perf_counter()
            known = je.targets(*self.arguments, like, templates=self.templates), time.perf_counter() - start
            self.found[kind, layers, like.anchor] = known
        found, seconds = known
        if first_only:
            anchors = {l: found.anchors[l] for l in layers[:1]}
            found = je.Targets(found.layers[:1], found.values[:1], found.lookup, anchors)
        return found, seconds

    def measure(self, method: je.Method, changes: dict[str, Any]) -> tuple[dict, je.Report]:
        """A row of results of the method with `changes`, and the report behind it."""
        given, anchor_seconds = self.targets(method)
        start = time.perf_counter()
        result = je.apply_edits(*self.arguments, method, stats=self.stats, targets=given, templates=self.templates)
        seconds = time.perf_counter() - start
        model, tokenizer, requests = self.arguments
        report = je.evaluate(model, result.model, tokenizer, requests, max_neighbours=self.neighbours)
        row = summary(method.name, report.edited, report.specificity) | {
            "changes": changes,
            "settings": describe(method),
            "remaining": remaining(result.info.remaining),
            "layers": [layer.layer for layer in result.info.layers],
            "update_norm": [layer.relative_update_norm for layer in result.info.layers],
            "solve_residual": max(layer.solve_residual for layer in result.info.layers),
            "anchor_seconds": anchor_seconds,
            "other_seconds": seconds,
        }
        return row, report


def remaining(norms) -> list[float]:
    """Residuals' norms (n_layers + 1, n) as means over the edits, in parts of what they were at first."""
    means = np.nanmean(np.asarray(norms), 1)
    return [float(x) for x in means / means[0]]


def summary(name: str, rates: dict, specificity: dict) -> dict:
    return {"method": name, **{m: rates[m] for m in MEASURES}, "score": rates["score"], **specificity}


HEADER = "method          eff.succ    acc  para.succ   acc   neigh.  score      KL   top-1  remains  anchors, rest (s)"


def line(row: dict) -> str:
    """One row as text, rates in percent."""

    def percent(x) -> str:
        return f"{100 * x:6.1f}" if x is not None else "     -"

    rates = "  ".join(percent(row[m]) for m in (*MEASURES, "score"))
    text = f"{row['method']:16s} {rates}  {row['kl']:7.4f}  {percent(row['top1'])}"
    if "remaining" in row:
        text += f"  {row['remaining'][-1]:7.3f}  {row['anchor_seconds']:7.1f} {row['other_seconds']:6.1f}"
    return (
        text
        + "  "
        + " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.get("changes", {}).items())
    )
