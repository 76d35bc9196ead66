"""Drawings of the geometry of keys; they need matplotlib (``pip install 'jaxedit[plot]'``), imported when one is made.

Each returns a Figure, which a notebook shows, and with a path writes it to a .png, .pdf or .svg file, whole or not at
all. Raises JaxEditError where matplotlib is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxedit.analysis.figures import new_figure, save_figure
from jaxedit.analysis.key_bounds import PREDICTIONS, Agreement, Bounds
from jaxedit.analysis.key_neighbours import Prefix
from jaxedit.analysis.keys import ValueNorms

_DPI = 80
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
_KINDS = {"paraphrase": "tab:blue", "neighbourhood": "tab:orange"}


def plot_similarities(groups: Mapping[str, Any], baseline: str | None = None, path=None, *, label: str = "") -> Any:
    """Distributions of whitening similarities, one line of points a group with its quartiles.

    groups: name to similarities ``[n]``. baseline: the name of the group whose 99th percentile is marked.
    """
    figure = new_figure(8, 0.8 + 0.5 * len(groups), _DPI)
    axes, noise = figure.subplots(), np.random.default_rng(0)
    for i, (name, values) in enumerate(groups.items()):
        values = np.asarray(values, float)
        colour = "0.5" if name == baseline else _COLOURS[i % len(_COLOURS)]
        axes.scatter(values, -i + noise.uniform(-0.3, 0.3, len(values)), s=9, alpha=0.5, color=colour, linewidths=0)
        low, middle, high = np.percentile(values, [25, 50, 75])
        axes.plot([low, high], [-i, -i], color="black", linewidth=1)
        axes.plot(middle, -i, "|", color="black", markersize=14, markeredgewidth=2)
    if baseline is not None:
        edge = float(np.percentile(groups[baseline], 99))
        axes.axvline(edge, color="0.5", linestyle="--", linewidth=1, label=f"99 % of {baseline} are below")
        axes.legend(loc="lower right", fontsize=8)
    axes.set_yticks(-np.arange(len(groups)), [f"{name} ({len(v)})" for name, v in groups.items()])
    axes.set_xlabel(label or "whitening similarity")
    return _written(figure, path)


def plot_key_map(groups: Mapping[str, Any], path=None, *, title: str = "") -> Any:
    """Keys on their first two principal components.

    groups: name to keys ``[n, d]``, whitened if distances are to be those of `whiten`; the first one gives the
    origin, the point that others are compared with. Components are those of all groups together.
    """
    keys = {name: np.atleast_2d(np.asarray(k, float)) for name, k in groups.items()}
    together = np.concatenate(list(keys.values()))
    centre = together.mean(0)
    _, s, axes_of = np.linalg.svd(together - centre, full_matrices=False)
    share = s[:2] ** 2 / max(float((s**2).sum()), np.finfo(float).tiny)
    figure = new_figure(6, 4.5, _DPI)
    axes = figure.subplots()
    for i, (name, k) in enumerate(keys.items()):
        at = (k - centre) @ axes_of[:2].T
        style = {"marker": "*", "s": 180, "color": "black", "zorder": 3} if i == 0 else {"s": 22, "alpha": 0.7}
        axes.scatter(*at.T, label=name, **({"color": _COLOURS[(i - 1) % len(_COLOURS)]} | style))
    axes.set(xlabel=f"first component ({share[0]:.0%})", ylabel=f"second component ({share[1]:.0%})", title=title)
    axes.legend(fontsize=8)
    return _written(figure, path)


def plot_neighbours(near: Sequence[Sequence[Prefix]], own, last: Sequence[str], path=None) -> Any:
    """How much of an edit the closest unrelated prefix of each subject would hear.

    near: from `nearest_prefixes`; own ``[n]``: each subject's similarity with itself; last: its last token's text.
    """
    some = [i for i, found in enumerate(near) if found]
    share = np.asarray([near[i][0].similarity / own[i] for i in some])
    same = np.asarray([near[i][0].token.strip().lower() == last[i].strip().lower() for i in some])
    figure = new_figure(8, 3, _DPI)
    axes = figure.subplots()
    bins = np.linspace(0, max(1.0, float(share.max())), 26)
    parts = [share[same], share[~same]]
    labels = [f"the same last token ({same.sum()})", f"another last token ({(~same).sum()})"]
    axes.hist(parts, bins=list(bins), stacked=True, label=labels, color=["tab:red", "tab:blue"])
    axes.set(xlabel="similarity of the closest unrelated prefix / of the subject with itself", ylabel="subjects")
    axes.legend(fontsize=8)
    return _written(figure, path)


def plot_value_norms(norms: ValueNorms, path=None) -> Any:
    """Norms of values at the decisive token before and after an edit, by layer."""
    layers = tuple(norms.before)
    figure = new_figure(2.2 * len(layers) + 1, 3, _DPI)
    for axes, l in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        before, after = norms.before[l], norms.after[l]
        top = float(max(before.max(), after.max()))
        bins = list(np.linspace(0, top, 25))
        axes.hist(before, bins=bins, alpha=0.7, color="0.5", label="before")
        axes.hist(after, bins=bins, alpha=0.6, color="tab:red", label="after")
        axes.set(title=f"layer {l}: {np.median(after / before):.1f} times", xlabel="‖v‖")
        axes.label_outer()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return _written(figure, path)


def plot_bounds(bounds: Bounds, found: Sequence[Agreement], path=None) -> Any:
    """Left: how much of the edit arrives at each prompt against the change of the gap, marked where the change is
    larger than the gap was. Right: the AUC of each prediction, from `agreement`."""
    figure = new_figure(9, 3.6, _DPI)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for kind, colour in _KINDS.items():
        rows = bounds.rows(kind)
        heard = bounds.change[rows] > bounds.gap[rows]
        for which, marker, say in ((heard, "o", "heard"), (~heard, "x", "not heard")):
            at = rows[which]
            name = f"{kind}: {say} ({len(at)})"
            left.scatter(bounds.reach[at], bounds.change[at], s=16, marker=marker, color=colour, alpha=0.6, label=name)
    left.axhline(0, color="0.7", linewidth=0.8)
    left.set(xlabel="share of the edit that arrives", ylabel="change of the logit gap (nats)")
    left.legend(fontsize=7)
    width = 0.4
    for i, (kind, colour) in enumerate(_KINDS.items()):
        auc = {a.by: a.auc for a in found if a.kind == kind}
        at = np.arange(len(PREDICTIONS)) + (i - 0.5) * width
        bars = right.bar(at, [auc[by] for by in PREDICTIONS], width, color=colour, label=kind)
        right.bar_label(bars, fmt="%.2f", fontsize=7)
    right.axhline(0.5, color="0.5", linestyle="--", linewidth=0.8)
    right.set_xticks(range(len(PREDICTIONS)), PREDICTIONS)
    right.set(ylabel="AUC: will the edit be heard?", ylim=(0, 1.08))
    return _written(figure, path)


def _written(figure, path):
    if path is not None:
        save_figure(figure, path)
    return figure
