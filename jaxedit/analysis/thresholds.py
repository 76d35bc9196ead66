"""What the threshold of REP's gates does: scores of one state at several τ (Yan et al. 2024, figure 7)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxedit.adapters.rep_adaptors import RepState
from jaxedit.analysis.figures import new_figure, save_figure
from jaxedit.errors import JaxEditError


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """taus ``[t]`` in rising order, and scores ``[t]`` by name, between 0 and 1; NaN where there is none."""

    taus: np.ndarray
    scores: dict[str, np.ndarray]

    def table(self) -> str:
        """Scores in percent as aligned text, a line for each τ."""
        lines = [["tau", *self.scores]]
        for i, tau in enumerate(self.taus):
            found = (of[i] for of in self.scores.values())
            lines.append([f"{tau:g}", *("-" if np.isnan(x) else f"{100 * x:.1f}" for x in found)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def at_thresholds(
    state: RepState, taus: Sequence[float], measure: Callable[[RepState], Mapping[str, float | None]]
) -> Thresholds:
    """Measure adaptors at several thresholds. Nothing is trained again, and nothing compiled anew.

    measure: what is asked of the state, such as ``lambda s: evaluate_robustness(base, attach(host, s), …).rates``; of
    the same names at each. Raises JaxEditError where there is no τ, or one is not between 0 and 1.
    """
    if not len(taus):
        raise JaxEditError("name at least one tau")
    every = sorted(set(map(float, taus)))
    found = [dict(measure(state.at(tau))) for tau in every]
    columns = {name: [one[name] for one in found] for name in found[0]}
    scores = {name: np.asarray([np.nan if x is None else x for x in of], np.float64) for name, of in columns.items()}
    return Thresholds(np.asarray(every), scores)


def plot_thresholds(curve: Thresholds, path) -> Path:
    """Draw scores in percent against τ, a line each.

    path: a .png, .pdf or .svg file, written whole or not at all. Raises JaxEditError where matplotlib is missing.
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for name, scores in curve.scores.items():
        axes.plot(curve.taus, 100 * scores, marker=".", label=name.replace("_", " "))
    axes.set(xlabel="gate threshold τ", ylabel="percent", ylim=(-2, 102))
    figure.legend(loc="outside right upper", fontsize=9)
    return save_figure(figure, path, 130)
