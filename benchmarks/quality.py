"""Build results/QUALITY.md from the results of family.py, stream.py and choose_presets.py.

python benchmarks/quality.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from records import RESULTS
from report import markdown_table
from sweep import MEASURES

HEAD = """# What edited models do

Made by `python benchmarks/quality.py` from the JSON files beside it, which hold every setting. Rates in percent.
*accuracy*: answered with the new target outright; *success*: it is likelier than the true one (at neighbours: less
likely). KL(base ‖ edited) and top-1 overlap at neighbouring prompts, which should stay as they are: the mean KL is
driven by few prompts, so small differences in it mean nothing. *remaining*: of what was missing to the target at the
last edited layer."""


def percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.1f}"


def rates(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(percent(row[m]) for m in (*MEASURES, "score"))


def family(name: str, table: dict[str, Any]) -> str:
    head = ("method", *(m.replace("_", " ") for m in MEASURES), "score", "KL", "top-1", "remaining", "largest ‖ΔW‖/‖W‖")
    rows = [head]
    for row in table["rows"]:
        more = ("", "") if "remaining" not in row else (f"{row['remaining'][-1]:.3f}", f"{max(row['update_norm']):.3f}")
        rows.append((row["method"], *rates(row), f"{row['kl']:.3f}", percent(row["top1"]), *more))
    near = "all" if table["neighbours"] is None else table["neighbours"]
    return "\n\n".join(
        [
            f"## {table['count']} edits of {name}, {table['model']}: {len(rows) - 2} methods",
            f"`python benchmarks/family.py {name} --first {table['first']} --count {table['count']}"
            + (f" --neighbours {near}`" if near != "all" else "`")
            + f"; {near} neighbourhood prompts a record, second moments of {table['tokens']:,} tokens.",
            markdown_table(rows),
        ]
    )


def stream(made: dict[str, Any]) -> str:
    rows = [
        ("method", "efficacy accuracy, fresh", "in the end", "paraphrase success, fresh", "in the end")
        + ("perplexity, times", "seconds, first and last batches", "ratio")
    ]
    for name, row in made.items():
        pairs = [percent(float(np.mean(row[k][m]))) for m in (MEASURES[1], MEASURES[2]) for k in ("fresh", "kept")]
        seconds = row["seconds"]
        early, late = np.median(seconds[1:4]), np.median(seconds[-3:])
        times = (f"{early:.1f}, {late:.1f}", f"{row['last_to_first']:.2f}")
        rows.append((name, *pairs, f"{row['perplexity_ratio'][-1]:.3f}", *times))
    some = next(iter(made.values()))
    batches, size, model = len(some["seconds"]), some["size"], some["model"]
    return "\n\n".join(
        [
            f"## A stream of {batches} batches of {size} edits, {model}",
            f"`python benchmarks/stream.py counterfact.json --first {some['first']} --batches {batches} "
            f"--size {size}`. *fresh*: right after a batch was written; *in the end*: of all batches, after the "
            "last. Seconds: medians of three batches, the very first left out, which compiles.",
            markdown_table(rows),
        ]
    )


def presets(made: dict[str, Any]) -> str:
    rows = [("method", "chosen", "of", "edits", *(m.replace("_", " ") for m in MEASURES), "top-1")]
    for name, found in made.items():
        chosen = found["chosen"]
        row = next(r for r in found["rows"] if all(_same(r, k, v) for k, v in chosen.items()))
        text = ", ".join(f"{k} {v}" for k, v in chosen.items())
        values = (*(percent(row[m]) for m in MEASURES), percent(row["top1"]))
        rows.append((name, text, str(len(found["rows"])), str(found["count"]), *values))
    about = "`python benchmarks/choose_presets.py counterfact.json --first 600`: the highest harmonic mean of efficacy "
    return "\n\n".join(
        ["## Presets of SmolLM2-135M", about + "accuracy, paraphrase accuracy and top-1 overlap.", markdown_table(rows)]
    )


def _same(row: dict[str, Any], field: str, value: Any) -> bool:
    return row.get("changes", row).get(field) == value


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results

    def read(name: str) -> dict[str, Any] | None:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    parts = [HEAD]
    for results in ("family_smollm2.json", "jacobian_spread_smollm2.json"):
        parts += [family(name, table) for name, table in (read(results) or {}).items()]
    for name, section in (("stream_smollm2.json", stream), ("presets_smollm2.json", presets)):
        made = read(name)
        parts += [] if made is None else [section(made)]
    (folder / "QUALITY.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
