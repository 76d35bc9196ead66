"""Build results/REPORT.md and its plots from all JSON records under results/.

python benchmarks/report.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from records import FORMAT, RECORD_HEADER, RESULTS, record_row

HEAD = """# Benchmark results

Made by `python benchmarks/report.py` from the JSON files beside it, which hold every sample and setting. Seconds are
medians of warm runs, with their smallest and largest; *first* is the first call of a fresh process with its
compilation. GFLOP/s are counted from shapes (the formula is in the JSON), *of ceiling* is against the rate of a large
matrix product that the same framework reached in the same run, *cores* is processor time over time. A ratio is how
many times less time jaxedit takes, with the range over runs that followed each other.
"""


def markdown_table(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def section(name: str, made: dict[str, Any], plots: list[str]) -> str:
    where = made["machine"]
    abouts = {tuple(sorted(r["about"].items())) for r in made["records"]}
    versions = "; ".join(", ".join(f"{k} {v}" for k, v in about) for about in sorted(abouts, key=str))
    parts = [
        f"## {name}",
        f"{made['question']} `{made['command']}`" + (" (quick settings: not a measurement)" if made["quick"] else ""),
        f"{where['cpu']}, {where['cores']} cores, commit {where['commit'] or 'unknown'}. {versions}.",
    ]
    if made["ratios"]:
        rows = [("ratio", "times", "range")]
        rows += [(r["name"], f"**{r['value']:.2f}**", f"{r['low']:.2f} to {r['high']:.2f}") for r in made["ratios"]]
        parts.append(markdown_table(rows))
    parts += [markdown_table(cells) for cells in made.get("tables", [])]
    if made["records"]:
        parts.append(markdown_table([RECORD_HEADER, *map(record_row, made["records"])]))
    if made["curves"]:
        rows = [("curve", "side", "law", "points", "why")]
        for c in made["curves"]:
            law = f"{c['y_name']} ~ {c['x_name']}^{c['exponent']:.2f}"
            points = ", ".join(f"{x:g}: {y:.3g}" for x, y in zip(c["x"], c["y"], strict=True))
            rows.append((c["name"], c["side"], law, points, c["explanation"]))
        parts.append(markdown_table(rows))
    parts += [f"![{p}]({p})" for p in plots]
    parts += [f"- {note}" for note in made["notes"]]
    return "\n\n".join(parts)


def plot_curves(name: str, made: dict[str, Any], folder: Path) -> list[str]:
    """A figure with one panel for each curve's name; none where there are no curves or matplotlib is missing."""
    names = list(dict.fromkeys(c["name"] for c in made["curves"]))
    pyplot = _pyplot()
    if not names or pyplot is None:
        return []
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 3.8), squeeze=False)
    for axis, title in zip(axes[0], names, strict=True):
        for c in (c for c in made["curves"] if c["name"] == title):
            axis.loglog(c["x"], c["y"], marker="o", label=f"{c['side']}: exponent {c['exponent']:.2f}")
            axis.set_xlabel(c["x_name"])
            axis.set_ylabel(c["y_name"])
        sizes = sorted({x for c in made["curves"] if c["name"] == title for x in c["x"]})
        axis.set_xticks(sizes, [f"{x:g}" for x in sizes], fontsize=7, rotation=45)
        axis.minorticks_off()
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return [_save(figure, folder / f"{name}_curves.png")]


def plot_ratios(found: dict[str, dict[str, Any]], folder: Path) -> list[str]:
    """All ratios in one figure, grouped by result."""
    pyplot = _pyplot()
    rows = [(f"{name}: {r['name']}", r) for name, made in found.items() for r in made["ratios"]][::-1]
    if pyplot is None or not rows:
        return []
    figure, axis = pyplot.subplots(figsize=(10, 0.3 * len(rows) + 1.2))
    for at, (_, r) in enumerate(rows):
        color = "#4477aa" if r["value"] >= 1 else "#cc6677"
        axis.barh(at, r["value"] - 1, left=1, color=color)
        axis.plot([r["low"], r["high"]], [at, at], color="#333333", linewidth=1)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    axis.set_ylim(-0.8, len(rows) - 0.2)
    axis.axvline(1, color="#333333", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel("times less time than PyTorch (log scale; the line is the range over neighbouring runs)")
    return [_save(figure, folder / "ratios.png")]


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def _save(figure, path: Path) -> str:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path.name


def main():
    parser = argparse.ArgumentParser(description="Build the report from all JSON results.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        made = json.loads(path.read_text(encoding="utf-8"))
        if made.get("format") == FORMAT:
            found[path.stem] = made
    parts = [HEAD, *(f"![{p}]({p})" for p in plot_ratios(found, folder))]
    parts += [section(name, made, plot_curves(name, made, folder)) for name, made in found.items()]
    (folder / "REPORT.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"{folder / 'REPORT.md'}: {len(found)} results")


if __name__ == "__main__":
    main()
