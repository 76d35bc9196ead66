"""Figures as files."""

from __future__ import annotations

from pathlib import Path

from jaxedit.cache import write_atomically
from jaxedit.errors import JaxEditError

SUFFIXES = (".png", ".pdf", ".svg")


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
