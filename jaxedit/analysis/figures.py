"""Figures: made without a window or anything global, and written to files. They need matplotlib
(``pip install 'jaxedit[plot]'``), which is imported when one is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxedit.cache import write_atomically
from jaxedit.errors import JaxEditError

SUFFIXES = (".png", ".pdf", ".svg")


def new_figure(width: float, height: float, dpi: int | None = None) -> Any:
    """An empty matplotlib Figure, in inches. Raises JaxEditError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # no pyplot: nothing global, no window
    except ImportError:
        raise JaxEditError("plots need matplotlib: pip install 'jaxedit[plot]'") from None
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def figure_path(path) -> Path:
    """The path of a figure. Raises JaxEditError unless it ends in one of SUFFIXES."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise JaxEditError(f"a figure is written to a {', '.join(SUFFIXES)} file; got {path.name!r}")
    return path


def save_figure(figure, path, dpi: int | str = "figure") -> Path:
    """Write a matplotlib Figure, whole or not at all. Raises JaxEditError as `figure_path`."""
    path = figure_path(path)
    write_atomically(path, lambda p: figure.savefig(p, dpi=dpi))
    return path
