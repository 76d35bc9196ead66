"""Every locate-then-edit method on the same facts: what it achieves, what else changes, and what it costs.

    python benchmarks/family.py counterfact.json zsre.json --count 100 --out benchmarks/results/family_smollm2.json

Anchors are found once for all methods that have the same ones, which is also how the seconds are given: of the anchors
of that kind, and of everything else. Methods that make edits one at a time find anchors as they go. Rates are of the
edited model, `base` of the unedited one. --set changes a preset, as in ``--set alphaedit.l2=1``. Tables of other files
that --out holds already stay there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import common
from sweep import HEADER, Bench, changed, line, summary

import jaxedit as je

METHODS = (
    *("memit", "one_layer", "blue", "alphaedit", "prune", "rect", "emmet", "pmet", "adaedit", "namet", "nse"),
    *("fe", "alphaedit+fe", "prune+fe", "rect+fe", "rome", "r_rome"),
)


def read_changes(settings: list[str]) -> dict[str, dict[str, Any]]:
    """``METHOD.FIELD=VALUE`` as fields by method; numbers are numbers."""
    changes: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, value = setting.split("=")
        method, field = name.split(".")
        known: Any = value
        with contextlib.suppress(ValueError):
            known = float(value)
        changes.setdefault(method, {})[field] = known
    return changes


def run(model, tokenizer, requests, stats, methods, changes, neighbours: int | None) -> list[dict]:
    bench, rows = Bench(model, tokenizer, requests, stats, neighbours), []
    print(HEADER)
    for name in methods:
        own = changes.get(name, {})
        row, report = bench.measure(changed(je.method_for(name, model.config), own), own)
        if not rows:
            nothing = {k: 0.0 if k == "kl" else 1.0 for k in report.specificity}
            rows.append(summary("base", report.base, nothing))
            print(line(rows[-1]))
        rows.append(row)
        print(line(row), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("requests", nargs="+", help="files of edit requests; a table for each")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--first", type=int, default=0, help="first record to use")
    parser.add_argument("--count", type=int, default=100, help="how many records")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens for the second moments")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--neighbours", type=int, help="neighbourhood prompts a record (default: all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="METHOD.FIELD=VALUE")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    args = parser.parse_args()
    tables = json.loads(args.out.read_text(encoding="utf-8")) if args.out is not None and args.out.exists() else {}
    about = {name: getattr(args, name) for name in ("model", "first", "count", "tokens", "neighbours")}
    about |= {"machine": common.machine(), "changes": args.set}
    for file in args.requests:
        given = argparse.Namespace(**{**vars(args), "requests": file})
        model, tokenizer, requests, stats = common.prepare(given, None)
        print(f"\n{Path(file).name}: {len(requests)} edits")
        changes = read_changes(args.set)
        rows = run(model, tokenizer, requests, stats, args.methods, changes, args.neighbours)
        tables[Path(file).name] = {**about, "rows": rows}
        common.write(args.out, tables)


if __name__ == "__main__":
    main()
