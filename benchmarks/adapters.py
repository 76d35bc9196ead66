"""Editors that add parameters beside methods that change weights, on the same zsRE edits.

    python benchmarks/adapters.py zsre.json --count 1000 --methods ireva cache --out benchmarks/results/zsre_edits.json

The metrics are iReVa's (Zhu et al. 2024): ES at the edits' prompts, PS at paraphrases, NS of the neighbours' own
answers (not agreement with the base), their harmonic mean, and the same with NS capped at the base's; of editors whose
edits can be taken back one by one also how often that is heard (RS), and how often it gives the base's answer (Con).
Anchors of methods that need them are kept in --anchors, from which a later call takes them. --set changes an editor's
preset, as in ``--set ireva.alpha=0.5``. Tables that --out holds already stay there, by number of edits.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import common

import jaxedit as je
from jaxedit.adapters.editors import EDITORS, editor_for
from jaxedit.cli.inputs import with_settings

METHODS = ("ireva", "cache", "grace", "melo", "wise", "ft", "fe", "memit")


def measure(name: str, settings: list[str], model, tokenizer, requests, anchors: Path | None, nothing: bool) -> list:
    """The row of a method, behind the row of the base where `nothing` is asked for."""
    begun = time.perf_counter()
    if name in EDITORS:
        method = with_settings(editor_for(name, model.config), settings)
        result = je.apply_edits(model, tokenizer, requests, method)
    else:
        result = je.apply_edits(model, tokenizer, requests, name, anchor_cache=anchors)
    seconds = time.perf_counter() - begun
    compared = je.evaluate_zsre(model, result.model, tokenizer, requests)
    base, edited = je.edit_scores(compared)
    row = {"method": name, "settings": settings, **edited, "seconds_per_edit": seconds / len(requests)}
    row["agreement"] = compared.edited["neighbourhood_agreement"]
    if name in ("ireva", "cache"):
        row |= je.evaluate_withdrawal(result.model, tokenizer, requests).summary()
    return [{"method": "base", **base}, row] if nothing else [row]


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("requests", help="file of edit requests whose neighbourhood prompts have answers")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--first", type=int, default=0, help="first record to use")
    parser.add_argument("--count", type=int, default=1000, help="how many records")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens for the second moments")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--set", nargs="+", default=[], metavar="METHOD.NAME=VALUE")
    parser.add_argument("--anchors", type=Path, help="folder of finished anchors")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    args = parser.parse_args()
    model, tokenizer, requests, _ = common.prepare(args, None)
    tables = json.loads(args.out.read_text(encoding="utf-8")) if args.out is not None and args.out.exists() else {}
    about = {"model": args.model, "first": args.first, "machine": common.machine()}
    table = {**about, "rows": []} | tables.get(str(len(requests)), {})
    for name in args.methods:
        own = [text.split(".", 1)[1] for text in args.set if text.startswith(f"{name}.")]
        rows = measure(name, own, model, tokenizer, requests, args.anchors, not table["rows"])
        table["rows"] = [r for r in table["rows"] if r["method"] != name] + rows
        for row in rows:
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        tables[str(len(requests))] = table
        common.write(args.out, tables)


if __name__ == "__main__":
    main()
