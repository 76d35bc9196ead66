"""One format of records, what a script writes and prints, and the machine it ran on."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT = "jaxedit-benchmark-1"
RESULTS = Path(__file__).parent / "results"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs, in the order in which they were made."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def iqr(self) -> float:
        """The interquartile range; 0 for a single run."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    def to_dict(self) -> dict[str, Any]:
        spread = {"min": min(self.samples), "max": max(self.samples), "iqr": self.iqr}
        return {"median": self.median, **spread, "samples": list(self.samples)}


@dataclasses.dataclass(frozen=True)
class Record:
    """One thing measured on one side.

    seconds: timings by name: "run" is the time that counts; "first", "lower", "compile" and others beside it.
    flops, bytes: counted from shapes, of one run; `counted` says how. ceiling: rates measured on the same side in
    the same run. found: results that show that the work was done.
    """

    name: str
    side: str
    about: Mapping[str, Any]
    settings: Mapping[str, Any]
    seconds: Mapping[str, Timing]
    peak_bytes: int = 0
    peak_of: str = ""
    flops: float | None = None
    bytes: float | None = None
    counted: str = ""
    ceiling: Mapping[str, float] | None = None
    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    def achieved(self) -> dict[str, float]:
        """Rates of the median run, and as fractions of the ceiling."""
        run, ceiling, made = self.seconds["run"].median, self.ceiling or {}, {}
        for name, amount, top in (("flop", self.flops, "flop_per_s"), ("byte", self.bytes, "byte_per_s")):
            if amount is not None:
                made[f"{name}_per_s"] = amount / run
                if top in ceiling:
                    made[f"fraction_of_{name}_ceiling"] = amount / run / ceiling[top]
        return made

    def to_dict(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self) | {"seconds": {k: t.to_dict() for k, t in self.seconds.items()}}
        return plain | {"achieved": self.achieved()}


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times faster `fast` is than `slow` (names of records as "name/side"), in their timing `timing`.

    low, high: the smallest and largest ratio of runs that followed each other.
    """

    name: str
    fast: str
    slow: str
    value: float
    low: float
    high: float
    timing: str = "run"

    @classmethod
    def of(cls, name: str, fast: Record, slow: Record, timing: str = "run", per: Callable = lambda r: 1.0) -> Ratio:
        """per: what each record's seconds are divided by, for example its edits."""
        a, b, scale = fast.seconds[timing], slow.seconds[timing], per(fast) / per(slow)
        pairs = [scale * y / x for x, y in zip(a.samples, b.samples, strict=False)]
        value = scale * b.median / a.median
        where = (f"{fast.name}/{fast.side}", f"{slow.name}/{slow.side}")
        return cls(name, *where, value, min([value, *pairs]), max([value, *pairs]), timing)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Cost against size, and the least-squares exponent of y ~ x^exponent over `fitted` points from the largest."""

    name: str
    side: str
    x_name: str
    y_name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    exponent: float
    fitted: int
    explanation: str

    @classmethod
    def of(cls, name, side, x_name, y_name, points: Sequence[tuple[float, float]], explanation, fitted=None) -> Curve:
        """fitted: how many of the largest sizes are fitted, by default all."""
        import numpy as np

        points = sorted(points)
        used = points[-(fitted or len(points)) :]
        exponent = float("nan")
        if len(used) > 1:
            exponent = float(np.polyfit(np.log([p[0] for p in used]), np.log([p[1] for p in used]), 1)[0])
        x, y = zip(*points, strict=True)
        return cls(name, side, x_name, y_name, x, y, exponent, len(used), explanation)


def machine() -> dict[str, Any]:
    """What a number was measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in l]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": cores(), "system": platform.system(), "commit": commit()}


def commit() -> str:
    """The commit of this checkout, "+" where tracked files of the library were changed since; "" without git."""

    def git(*words: str) -> str:
        made = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        return made.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno", "../jaxedit") else "")
    except OSError:
        return ""


@dataclasses.dataclass
class Results:
    """What one script measured; written as one JSON file."""

    question: str
    args: argparse.Namespace
    records: list[Record] = dataclasses.field(default_factory=list)
    ratios: list[Ratio] = dataclasses.field(default_factory=list)
    curves: list[Curve] = dataclasses.field(default_factory=list)
    tables: list[list[tuple[str, ...]]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def finish(self):
        """Print the records, ratios, curves and notes, and write them to ``--out``."""
        print(table([RECORD_HEADER, *map(record_row, (r.to_dict() for r in self.records))]))
        for ratio in self.ratios:
            print(f"{ratio.name}: {ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})")
        for curve in self.curves:
            print(f"{curve.name} ({curve.side}): {curve.y_name} ~ {curve.x_name}^{curve.exponent:.2f}")
        for cells in self.tables:
            print(table(cells))
        print("\n".join(self.notes), flush=True)
        if self.args.out is None:
            return
        plain = {
            "format": FORMAT,
            "script": Path(sys.argv[0]).stem,
            "question": self.question,
            "command": shlex.join([Path(sys.argv[0]).name, *(shown(a) for a in sys.argv[1:])]),
            "quick": bool(self.args.quick),
            "machine": machine(),
            "records": [r.to_dict() for r in self.records],
            "ratios": [dataclasses.asdict(r) for r in self.ratios],
            "curves": [dataclasses.asdict(c) for c in self.curves],
            "tables": self.tables,
            "notes": self.notes,
        }
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        self.args.out.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def shown(argument: str) -> str:
    """An argument as it is recorded: of a path, its name."""
    return Path(argument).name if os.sep in argument else argument


RECORD_HEADER = ("what", "side", "seconds", "spread", "first", "GFLOP/s", "of ceiling", "peak MB", "cores")


def record_row(r: Mapping[str, Any]) -> tuple[str, ...]:
    """A record (as plain data) as cells of a table."""
    run, first, made = r["seconds"]["run"], r["seconds"].get("first"), r["achieved"]
    fraction = made.get("fraction_of_flop_ceiling")
    return (
        r["name"],
        r["side"],
        f"{run['median']:.4g}",
        f"{run['min']:.4g} to {run['max']:.4g}",
        "" if first is None else f"{first['median']:.4g}",
        f"{made['flop_per_s'] / 1e9:.1f}" if "flop_per_s" in made else "",
        "" if fraction is None else f"{100 * fraction:.0f} %",
        f"{r['peak_bytes'] / 1e6:.0f}" if r["peak_bytes"] else "",
        f"{r['found']['cores_busy']:.1f}" if "cores_busy" in r["found"] else "",
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
