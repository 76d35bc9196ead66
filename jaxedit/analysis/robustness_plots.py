"""A drawing of how robust edits are; it needs matplotlib (``pip install 'jaxedit[plot]'``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxedit.analysis.figures import figure_path, new_figure, save_figure
from jaxedit.data.queries import HALVES, KINDS
from jaxedit.evaluation.robustness import Robustness

_NAMES = {"rephrase": "subject\nrephrased", "shuffle": "subject\nshuffled", "long": "long\ncontext"}


def plot_robustness(reports: Mapping[str, Robustness], path) -> Path:
    """Draw reports by method as grouped bars with 95 % intervals (1.96 standard errors): success and locality, and each
    kind of query in domain (above) and out of it.

    path: a .png, .pdf or .svg file, written whole or not at all. Raises JaxEditError where matplotlib is not installed.
    """
    path = figure_path(path)
    figure = new_figure(max(8.0, 1.2 * len(reports) + 6), 7)
    columns = ("prompt\nitself", "neighbours\n(agreement)", *(_NAMES[kind] for kind in KINDS))
    width = 0.8 / max(len(reports), 1)
    for axes, half in zip(figure.subplots(2, 1, sharex=True, sharey=True), HALVES, strict=True):
        cells = ("success", "locality", *(f"{kind}_{half}" for kind in KINDS))
        for i, (name, report) in enumerate(reports.items()):
            of = (report.rates, report.errors)
            heights, errors = ([np.nan if (x := some[cell]) is None else 100 * x for cell in cells] for some in of)
            at = np.arange(len(cells)) + (i - (len(reports) - 1) / 2) * width
            axes.bar(at, heights, 0.92 * width, label=name)
            axes.errorbar(at, heights, 1.96 * np.asarray(errors), fmt="none", ecolor="0.3", elinewidth=0.8)
        axes.set_xticks(range(len(cells)), columns)
        axes.set(ylim=(0, 102), ylabel="%", title=half.replace("_", " "))
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=max(len(reports), 1))
    return save_figure(figure, path, 130)
