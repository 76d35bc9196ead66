"""Are edits heard in other forms of their subject, and after a long text? Each edit is made and asked alone.

    python benchmarks/robustness.py counterfact.json --count 200 --out benchmarks/results/robustness_smollm2.json

Anchors of all edits are found together, once for each method, then each edit is made by itself; their updates stand
side by side in one model (`jaxedit.adapters.apart.Apart`), so that all edits are asked in the same passes. "base" is
the unedited model, "ireva" has the neurons of all edits at once, "ireva-alone" those of one at a time; behind "+rep"
each edit has REP's adaptors too. A figure is written beside --out, and with --taus one of what REP's threshold does
(without long contexts). Other methods that --out holds already stay there, where they were asked the same.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import common
import numpy as np

import jaxedit as je
from jaxedit.adapters.apart import Apart
from jaxedit.adapters.attached import adapters_of, attach, detach
from jaxedit.adapters.editors import editor_for
from jaxedit.adapters.rep import rep_for
from jaxedit.analysis.robustness_plots import plot_robustness
from jaxedit.analysis.thresholds import Thresholds, at_thresholds, plot_thresholds
from jaxedit.data.queries import Halves, read_rephrases, robust_queries
from jaxedit.data.templates import sample_templates
from jaxedit.evaluation.robustness import Robustness, evaluate_robustness, robustness_table
from jaxedit.models.transformer import Decoder
from jaxedit.plain import describe
from jaxedit.presets import REP


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

    def alone(self, name: str) -> tuple[list[je.EditPatch], dict[int, np.ndarray]]:
        """Each request's patch by itself, made by a locate-then-edit method, and all keys ``{layer: [n, d_ff]}``."""
        method = je.method_for(name, self.model.config)
        arguments = (self.model, self.tokenizer, self.requests, method)
        found = je.targets(*arguments, templates=self.templates, anchor_cache=self.anchors)
        made, keys, factor = [], [], None
        for i, request in enumerate(self.requests):
            given = {"stats": self.stats, "targets": found.take([i]), "templates": self.templates, "factor": factor}
            result = je.apply_edits(self.model, self.tokenizer, [request], method, **given)
            made.append(result.patch)
            keys.append(result.keys)
            factor = result.factor
        return made, {l: np.concatenate([own[l] for own in keys]) for l in method.layers}


def located(name: str) -> Callable[[Bench], tuple[Decoder, dict]]:
    def edited(bench: Bench):
        settings = describe(je.method_for(name, bench.model.config))
        return attach(bench.model, Apart.of(bench.alone(name)[0])), settings

    return edited


def with_rep(name: str) -> Callable[[Bench], tuple[Decoder, dict]]:
    def edited(bench: Bench):
        method, rep = je.method_for(name, bench.model.config), rep_for(bench.model.config)
        patches, keys = bench.alone(name)
        apart = Apart.of(patches)
        state, _ = rep.edit(
            *(bench.model, bench.tokenizer, bench.requests),
            **{"layers": method.layers, "stats": bench.stats, "queries": bench.queries, "keys": keys, "apart": apart},
        )
        return attach(bench.model, apart, state), {**describe(method), "rep": dataclasses.asdict(rep)}

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
    "rome+rep": with_rep("rome"),
    "fe+rep": with_rep("fe"),
}


def measure(bench: Bench, name: str, args) -> tuple[Robustness, dict, Thresholds | None]:
    without = [dataclasses.replace(some, long=Halves()) for some in bench.queries]
    asked = bench.queries[: args.long_facts] + without[len(bench.queries[: args.long_facts]) :]

    def ask(edited, queries) -> Robustness:
        given = (bench.model, edited, bench.tokenizer, bench.requests, queries)
        return evaluate_robustness(*given, max_contexts=args.contexts, max_neighbours=args.neighbours)

    start = time.perf_counter()
    edited, settings = METHODS[name](bench)
    made = time.perf_counter()
    report = ask(edited, asked)
    more = {"settings": settings, "edit_seconds": made - start, "evaluation_seconds": time.perf_counter() - made}
    if not name.endswith(REP) or not args.taus:
        return report, more, None
    *others, state = adapters_of(edited)
    curve = at_thresholds(state, args.taus, lambda at: short(ask(attach(detach(edited), *others, at), without).rates))
    return report, more | {"thresholds": curve.table().splitlines()}, curve


def short(rates: Mapping[str, float | None]) -> dict[str, float | None]:
    """Without what was not asked."""
    return {cell: rate for cell, rate in rates.items() if rate is not None}


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
    parser.add_argument("--long-facts", type=int, help="ask only the first so many facts after long contexts")
    parser.add_argument("--context-tokens", type=int, default=512)
    parser.add_argument("--neighbours", type=int, help="neighbourhood prompts a record (default: all)")
    parser.add_argument("--taus", nargs="+", type=float, default=[], help="thresholds to ask REP's adaptors at")
    parser.add_argument("--corpus", help="of the long contexts (default: the packaged one)")
    parser.add_argument("--anchors", type=Path, help="folder in which anchors are kept")
    parser.add_argument("--seed", type=int, default=0, help="of the queries")
    args = parser.parse_args()
    model, tokenizer, requests, stats = common.prepare(args, None)
    rephrases = None if args.rephrases is None else read_rephrases(args.rephrases)
    like = {"n": args.queries, "context_tokens": args.context_tokens, "corpus": args.corpus, "seed": args.seed}
    queries = robust_queries(tokenizer, requests, rephrases=rephrases, **like)
    bench = Bench(model, tokenizer, requests, queries, stats, sample_templates(model, tokenizer, 0), args.anchors)
    names = ("model", "first", "tokens", "contexts", "long_facts", "neighbours")
    about = {name: getattr(args, name) for name in names} | like
    about |= {"requests": Path(args.requests).name, "count": len(requests)}
    about["rephrases"] = None if args.rephrases is None else args.rephrases.name
    record = {"about": about, "machine": common.machine(), "methods": {}}
    if args.out is not None and args.out.exists():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        record["methods"] = before["methods"] if before["about"] == about else {}
    reports = {name: unpacked(row["found"]) for name, row in record["methods"].items()}
    for name in args.methods:
        reports[name], more, curve = measure(bench, name, args)
        record["methods"][name] = {**reports[name].to_dict(), "found": packed(reports[name]), **more}
        print(f"{name}: {more['edit_seconds']:.0f} s to edit, {more['evaluation_seconds']:.0f} s to ask", flush=True)
        common.write(args.out, record)
        if curve is not None and args.out is not None:
            plot_thresholds(curve, args.out.with_name(f"{args.out.stem}_{name.replace(REP, '_rep')}_tau.png"))
    record["table"] = robustness_table(reports).splitlines()
    print("\n".join(record["table"]))
    common.write(args.out, record)
    if args.out is not None:
        plot_robustness(reports, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
