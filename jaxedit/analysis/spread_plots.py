"""Drawings of a study of spreading; they need matplotlib (``pip install 'jaxedit[plot]'``)."""

from __future__ import annotations

import numpy as np

from jaxedit.analysis.figures import new_figure, save_figure
from jaxedit.analysis.study import Spread


def plot_spread(spread: Spread, path=None):
    """Draw a study: cosines and remaining residuals by layer, the step size, and the premises of the theorems.

    path: a .png, .pdf or .svg file, written whole or not at all; without one the matplotlib Figure is returned for
    a notebook to show. Bands are the middle half of the edits. Raises JaxEditError where matplotlib is not installed.
    """
    figure = new_figure(11, 7.5 if spread.studied else 4)
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots(2 if spread.studied else 1, 2, squeeze=False)
    for name, walk in spread.walks.items():
        for axis, values in zip(axes[0], (walk.cosine, walk.remaining), strict=True):
            _band(axis, walk.layers, values, name)
    axes[0, 0].set(title="a layer's change and what becomes of it at the last one", ylabel="cosine")
    axes[0, 1].set(title="residual that remains at the last layer", ylabel="part of what it was", ylim=(0, None))
    if spread.studied is not None and spread.premises is not None:
        for step in spread.steps:
            low, mid, high = np.percentile(step.remaining, [25, 50, 75], axis=1)
            (line,) = axes[1, 0].plot(step.scales, mid, marker=".", label=f"layer {step.layer}")
            axes[1, 0].fill_between(step.scales, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axes[1, 0].axhline(1, color="0.6", linewidth=0.8)
        axes[1, 0].set(
            title=f"steering by part of the residual ({spread.studied})", xlabel="part", ylabel="residual that remains"
        )
        p = spread.premises
        _band(axes[1, 1], p.layers, p.smallest, "smallest eigenvalue of (J + Jᵀ)/2")
        _band(axes[1, 1], p.layers, p.cosine, "cosine of J δ and δ")
        _band(axes[1, 1], p.layers, p.random_cosine.reshape(len(p.layers), -1), "cosine of J v and v, random v")
        axes[1, 1].axhline(0, color="0.6", linewidth=0.8)
        axes[1, 1].set(title=f"premises, from each layer to layer {p.last}")
        axes[1, 1].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[1, 1].set_xlabel("layer")
    for axis in axes[0]:
        axis.set_xlabel("layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes.flat:
        axis.legend(fontsize=9)
        axis.grid(alpha=0.3)
    if path is None:
        return figure
    return save_figure(figure, path, 130)


def _band(axis, layers, values, label: str):
    low, mid, high = np.nanpercentile(values, [25, 50, 75], axis=1)
    (line,) = axis.plot(layers, mid, marker="o", label=label)
    axis.fill_between(layers, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
