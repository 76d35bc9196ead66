"""Are edits heard in other forms of their subject, and after a long text? Each edit is made and asked alone.

    python benchmarks/robustness.py counterfact.json --count 200 --out benchmarks/results/robustness_smollm2.json

Anchors of all edits are found together, once for each method, then each edit is made by itself; their updates stand
side by side in one model (`jaxedit.adapters.apart.Apart`), so that all edits are asked in the same passes. "base" is
the unedited model, "ireva" has the neurons of all edits at once, "ireva-alone" those of one at a time. A figure is
written beside --out. Other methods that --out holds already stay there, where they were asked the same.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

import jaxedit as je
from jaxedit.adapters.apart import Apart
from jaxedit.adapters.attached import attach
from jaxedit.adapters.editors import editor_for
from jaxedit.analysis.robustness_plots import plot_robustness
from jaxedit.data.queries import read_rephrases, robust_queries
from jaxedit.data.templates import sample_templates
from jaxedit.evaluation.robustness import Robustness, evaluate_robustness, robustness_table
from jaxedit.models.transformer import Decoder
from jaxedit.plain import describe


@dataclasses.dataclass(frozen=True)
class Bench:
    """One model, the requests, their queries, and what every method shares."""

    model: Decoder
    tokenizer: Any
    requests: list[je.EditRequest]
    queries: list
    stats: je.SecondMoments
    templates: tuple
    anchors: Path | None = None

    def alone(self, name: str) -> list[je.EditPatch]:
        """Each request's patch by itself, made by a locate-then-edit method."""
        method = je.method_for(name, self.model.config)
        arguments = (self.model, self.tokenizer, self.requests, method)
        found = je.targets(*arguments, templates=self.templates, anchor_cache=self.anchors)
        made, factor = [], None
        for i, request in enumerate(self.requests):
            given = {"stats": self.stats, "targets": found.take([i]), "templates": self.templates, "factor": factor}
            result = je.apply_edits(self.model, self.tokenizer, [request], method, **given)
            made.append(result.patch)
            factor = result.factor
        return made


def located(name: str) -> Callable[[Bench], tuple[Decoder, dict]]:
    def edited(bench: Bench):
        settings = describe(je.method_for(name, bench.model.config))
        return attach(bench.model, Apart.of(bench.alone(name))), settings

    return edited


def ireva(bench: Bench):
    editor = editor_for("ireva", bench.model.config)
    state, _ = editor.edit(bench.model, bench.tokenizer, bench.requests)
    return attach(bench.model, state), dataclasses.asdict(editor)


def ireva_alone(bench: Bench):
    editor = editor_for("ireva", bench.model.config)
    states = [editor.edit(bench.model, bench.tokenizer, [request])[0] for request in bench.requests]
    return [attach(bench.model, state) for state in states], dataclasses.asdict(editor)


# By name: what makes the edited model (or a model for each request, or one whose adapters have `for_rows`) and says
# with which settings.
METHODS: dict[str, Callable[[Bench], tuple[Any, dict]]] = {
    "base": lambda bench: (bench.model, {}),
    "fe": located("fe"),
    "memit": located("memit"),
    "rome": located("rome"),
    "ireva": ireva,
    "ireva-alone": ireva_alone,
}


def measure(bench: Bench, name: str, contexts: int | None, neighbours: int | None) -> tuple[Robustness, dict]:
    start = time.perf_counter()
    edited, settings = METHODS[name](bench)
    made = time.perf_counter()
    asked = (bench.model, edited, bench.tokenizer, bench.requests, bench.queries)
    report = evaluate_robustness(*asked, max_contexts=contexts, max_neighbours=neighbours)
    seconds = {"edit_seconds": made - start, "evaluation_seconds": time.perf_counter() - made}
    return report, {"settings": settings, **seconds}


def packed(report: Robustness) -> dict[str, str]:
    """Every query's number, a line for each cell, with a semicolon between requests."""
    return {
        cell: ";".join(" ".join(f"{x:.5g}" for x in some) for some in every) for cell, every in report.found.items()
    }


def unpacked(lines: dict[str, str]) -> Robustness:
    every = {cell: [some.split() for some in line.split(";")] for cell, line in lines.items()}
    return Robustness({cell: tuple(tuple(map(float, some)) for some in found) for cell, found in every.items()})


def main():
    parser = common.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--rephrases", type=Path, help="JSON file {subject: [names]}; by default forms by rules")
    parser.add_argument("--queries", type=int, default=10, help="of each kind, both halves together")
    parser.add_argument("--contexts", type=int, help="long contexts to ask in each half (default: all)")
    parser.add_argument("--context-tokens", type=int, default=512)
    parser.add_argument("--neighbours", type=int, help="neighbourhood prompts a record (default: all)")
    parser.add_argument("--corpus", help="of the long contexts (default: the packaged one)")
    parser.add_argument("--anchors", type=Path, help="folder in which anchors are kept")
    parser.add_argument("--seed", type=int, default=0, help="of the queries")
    args = parser.parse_args()
    model, tokenizer, requests, stats = common.prepare(args, None)
    rephrases = None if args.rephrases is None else read_rephrases(args.rephrases)
    like = {"n": args.queries, "context_tokens": args.context_tokens, "corpus": args.corpus, "seed": args.seed}
    queries = robust_queries(tokenizer, requests, rephrases=rephrases, **like)
    bench = Bench(model, tokenizer, requests, queries, stats, sample_templates(model, tokenizer, 0), args.anchors)
    names = ("model", "first", "tokens", "contexts", "neighbours")
    about = {name: getattr(args, name) for name in names} | like
    about |= {"requests": Path(args.requests).name, "count": len(requests)}
    about["rephrases"] = None if args.rephrases is None else args.rephrases.name
    record = {"about": about, "machine": common.machine(), "methods": {}}
    if args.out is not None and args.out.exists():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        record["methods"] = before["methods"] if before["about"] == about else {}
    reports = {name: unpacked(row["found"]) for name, row in record["methods"].items()}
    for name in args.methods:
        reports[name], more = measure(bench, name, args.contexts, args.neighbours)
        record["methods"][name] = {**reports[name].to_dict(), "found": packed(reports[name]), **more}
        print(f"{name}: {more['edit_seconds']:.0f} s to edit, {more['evaluation_seconds']:.0f} s to ask", flush=True)
        common.write(args.out, record)
    record["table"] = robustness_table(reports).splitlines()
    print("\n".join(record["table"]))
    common.write(args.out, record)
    if args.out is not None:
        plot_robustness(reports, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
