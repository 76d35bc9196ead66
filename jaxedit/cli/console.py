"""What the commands share: consoles, progress bars, error messages and exit codes, tables, and loading."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperGroup

from jaxedit.errors import JaxEditError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxedit import EditInfo, Report
    from jaxedit.edit import Progress as OnProgress

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_UNITS = {"statistics": "tokens", "anchors": "edits", "layers": "layers"}
INTERRUPTED = 130


class Commands(TyperGroup):
    """Bad input ends in a message and exit code 1, Ctrl-C in 130; anything else keeps its traceback."""

    def invoke(self, ctx):
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except JaxEditError as error:
                fail(str(error))
            except OSError as error:
                if error.filename is None:
                    raise
                fail(f"{error.filename}: {error.strerror}")
            except KeyboardInterrupt:
                err.print("interrupted")
                raise typer.Exit(INTERRUPTED) from None


def fail(message: str):
    """Say what is wrong on stderr and end with exit code 1."""
    err.print("[bold red]error:[/]", Text(message), soft_wrap=True)
    raise typer.Exit(1)


def _show_warning(message, category, filename, lineno, file=None, line=None):
    err.print("[yellow]warning:[/]", Text(str(message)), soft_wrap=True)


class _Rate(ProgressColumn):
    """Done of all, and how many a second; nothing for work that is not counted."""

    def get_table_column(self):
        return Column(no_wrap=True)

    def render(self, task) -> Text:
        unit = task.fields.get("unit")
        if unit is None or task.total is None:
            return Text("")
        seconds = task.finished_time if task.finished else task.elapsed
        rate = (
            f"  {task.completed / seconds:,.{0 if task.completed > 10 * seconds else 1}f} {unit}/s" if seconds else ""
        )
        return Text(f"{task.completed:,.0f}/{task.total:,.0f}{rate}")


class Work:
    """Progress bars on stderr, and the seconds that each stage took."""

    def __init__(self, shown: bool = True):
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(12), TimeElapsedColumn(), _Rate()
        self._bars = Progress(*columns, console=err, disable=not shown)
        self._tasks: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Work:
        self._bars.start()
        return self

    def __exit__(self, *_):
        self._bars.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Work whose length is not known: a moving bar, and its seconds in `seconds`."""
        task, start = self._bars.add_task(name, total=None), time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self._bars.update(task, total=1, completed=1)

    def report(self, name: str, done: int, total: int):
        """Advance the bar called `name` ("fe: anchors"), made at the first call."""
        if name not in self._tasks:
            unit = _UNITS.get(name.split()[-1], "steps")
            self._tasks[name] = self._bars.add_task(f"  {name}", total=total, unit=unit)
        self._bars.update(self._tasks[name], completed=done, total=total)

    def reporter(self, prefix: str = "") -> OnProgress:
        """The `on_progress` of `apply_edits`."""
        return lambda stage, done, total: self.report(prefix + stage, done, total)

    def counter(self, name: str):
        """The `on_progress` of `second_moments`."""
        return partial(self.report, name)


def prepare(dtype: str | None = None):
    """Quiet transformers, and allow float64 where it is asked for."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if dtype == "float64":
        import jax

        jax.config.update("jax_enable_x64", True)


def load_model(work: Work, name: str, dtype: str | None = None, mesh: Mesh | None = None):
    """``(model, tokenizer)``."""
    prepare(dtype)
    with work.stage(f"load {Path(name).name or name}"):
        import jaxedit as je

        return je.load(name, dtype, mesh=mesh)


def emit(document: Any):
    """One JSON document on stdout; numbers that JSON does not know become null."""
    typer.echo(json.dumps(_plain(document), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(report: Report) -> dict[str, Any]:
    """A report without the records of single prompts."""
    return {"base": report.base, "edited": report.edited, "specificity": report.specificity, "counts": report.counts}


def show_layers(info: EditInfo):
    """One line a layer: how much of the residual was there before and after, and how large the update is."""
    table = Table("layer", "residual before", "after", "update / weights", "lost by rounding", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for l in info.layers:
        shares = [f"{100 * x:.1f} %" for x in (l.residual_before, l.residual_after, l.relative_update_norm)]
        table.add_row(str(l.layer), *shares, f"{100 * l.rounding_loss:.2g} %")
    out.print(table)


def show_seconds(seconds: dict[str, float], title: str = "Seconds"):
    """Stages that took a noticeable time, on one line."""
    parts = [f"{name} {spent:.1f}" for name, spent in seconds.items() if spent >= 0.05]
    out.print(f"{title}: {', '.join(parts)}; {sum(seconds.values()):.1f} in all", markup=False)


def size_of(path: Path) -> str:
    """The size of a file or directory in megabytes."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return f"{sum(f.stat().st_size for f in files) / 1e6:,.1f} MB"


def count_edits(n: int) -> str:
    return f"{n} edit" + "s" * (n != 1)
