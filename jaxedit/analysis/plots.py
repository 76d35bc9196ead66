"""Drawings; they need matplotlib (``pip install 'jaxedit[plot]'``), which is imported when one is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxedit.analysis.figures import new_figure, save_figure
from jaxedit.analysis.record import ROLES, Trace

_NAMES = {"hidden": "hidden state", "mlp": "MLP", "attention": "attention"}
_COLOURS = {"hidden": "Purples", "mlp": "Greens", "attention": "Reds"}


def plot_trace(trace: Trace, path, layers: Sequence[int] = ()) -> Path:
    """Draw a trace: for each kind a heat map (role × layer) of average indirect effects, negative ones as zero, and
    below it the same as lines with 95 % intervals (1.96 standard errors).

    path: a .png, .pdf or .svg file, written whole or not at all. layers: a suggestion to mark.
    Raises JaxEditError where matplotlib is not installed.
    """
    kinds, about = tuple(trace.effects), trace.about
    averages = {kind: trace.average(kind) for kind in kinds}
    shown = [r for r in range(len(ROLES)) if averages[kinds[0]].count[r]]
    figure = new_figure(5 * len(kinds) + 1.5, 7.5)
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots(2, len(kinds), squeeze=False)
    along = np.arange(trace.n_layer)
    for column, kind in enumerate(kinds):
        mean, error, count = averages[kind]
        window = "" if kind == "hidden" else f", {about['window']} layers around"
        heat, lines = axes[:, column]
        image = heat.imshow(
            mean[:, shown].T,
            aspect="auto",
            cmap=_COLOURS[kind],
            vmin=0,
            vmax=max(np.nanmax(mean), 1e-6),
            interpolation="nearest",
        )
        figure.colorbar(image, ax=heat, location="bottom", shrink=0.8, label="average indirect effect")
        heat.set_title(f"{_NAMES[kind]} restored{window}", fontsize=11)
        heat.set_yticks(range(len(shown)), [ROLES[r] for r in shown] if column == 0 else [""] * len(shown))
        for r in shown:
            (line,) = lines.plot(along, mean[:, r], marker=".", label=f"{ROLES[r]} ({count[r]} facts)")
            low, high = mean[:, r] - 1.96 * error[:, r], mean[:, r] + 1.96 * error[:, r]
            lines.fill_between(along, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        lines.axhline(0, color="0.6", linewidth=0.8)
        if len(layers) and kind == "mlp":
            label = f"suggested: {', '.join(map(str, layers))}"
            lines.axvspan(min(layers) - 0.5, max(layers) + 0.5, color="0.85", zorder=0, label=label)
        lines.set(xlabel="layer", xlim=(-0.5, trace.n_layer - 0.5))
        for part in (heat, lines):
            part.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1, 0].set_ylabel("average indirect effect")
    marked = kinds.index("mlp") if "mlp" in kinds else 0
    figure.legend(*axes[1, marked].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(
        f"{about['family']}, {about['n_layer']} layers, {len(trace.facts)} facts: probability of the answer "
        f"{trace.clean.mean():.2f} clean, {trace.corrupted.mean():.2f} corrupted "
        f"(noise {about['noise']:g}σ, {about['samples']} samples; total effect {trace.total_effect:.2f})",
        fontsize=11,
    )
    return save_figure(figure, path, 130)
