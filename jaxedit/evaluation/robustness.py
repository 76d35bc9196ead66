"""Robustness: are edits heard where the subject is rephrased or shuffled, or after a long text?

The metrics of REP (Yan et al. 2024, "Keys to Robust Edits"). A query counts where the whole target is said: every token
of it is the likeliest one, the earlier ones given. Rates are over all queries of a kind and a half at once. Facts that
have no query of a kind (a subject of one token cannot be shuffled) are not in that rate, and the counts say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxedit.data.queries import HALVES, KINDS, RobustQueries
from jaxedit.data.subject_forms import SubjectPrompt
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.predictions import likeliest, tokenise
from jaxedit.evaluation.report import Summary, mean
from jaxedit.evaluation.specificity import check_models
from jaxedit.models.transformer import Decoder
from jaxedit.types import EditRequest

CELLS = ("success", "locality", *(f"{kind}_{half}" for kind in KINDS for half in HALVES))


@dataclasses.dataclass(frozen=True)
class Robustness:
    """What one method's edits achieve. Each cell of CELLS holds, for each request, a number for each of its queries.

    success: at the prompt itself, and the kinds of queries in both halves: whether the whole target is said.
    locality: at neighbourhood prompts, the share of places where the base model's likeliest token is the edited one's.
    """

    found: dict[str, tuple[tuple[float, ...], ...]]

    @property
    def rates(self) -> Summary:
        """Means over all queries of a cell, between 0 and 1; None where there are none."""
        return {cell: mean([x for some in self.found[cell] for x in some]) for cell in CELLS}

    @property
    def counts(self) -> dict[str, int]:
        """How many queries stand behind each rate."""
        return {cell: sum(map(len, self.found[cell])) for cell in CELLS}

    @property
    def errors(self) -> Summary:
        """Standard errors of the rates, queries of one fact counted as alike; None where fewer than two facts have any.

        That is ``sqrt(m / (m - 1) Σ (hits - rate · queries)²) / Σ queries`` over the m facts that have some.
        """
        made: Summary = {}
        for cell, rate in self.rates.items():
            hits, sizes = np.asarray([(sum(some), len(some)) for some in self.found[cell] if some]).reshape(-1, 2).T
            m = len(hits)
            spread = None if rate is None or m < 2 else np.sqrt(m / (m - 1) * np.sum((hits - rate * sizes) ** 2))
            made[cell] = None if spread is None else float(spread / sizes.sum())
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: rates, their standard errors, counts, and every query's number."""
        found = {cell: [list(some) for some in every] for cell, every in self.found.items()}
        return {"rates": self.rates, "errors": self.errors, "counts": self.counts, "found": found}

    def __str__(self) -> str:
        return robustness_table({"edited": self})


def evaluate_robustness(
    base: Decoder,
    edited: Decoder | Sequence[Decoder],
    tokenizer,
    requests: Sequence[EditRequest],
    queries: Sequence[RobustQueries],
    *,
    max_contexts: int | None = None,
    max_neighbours: int | None = None,
    batch_tokens: int = 8192,
) -> Robustness:
    """Ask each request's queries (from `jaxedit.data.queries.robust_queries`).

    edited: one model with all edits; or one for each request, with its edit alone. A model whose adapter holds edits
        apart (`for_rows`, as `jaxedit.adapters.apart.Apart`) answers each query with edit i alone where it is
        request i's; that is the same as many models, in few passes.
    max_contexts: use the first so many long contexts of each half, which cost by far the most. max_neighbours: use the
        first so many neighbourhood prompts. batch_tokens: tokens, padding included, in one pass of a device.
    Every query is one row of one pass, target included. The likeliest token is that of the float32 logits (float64).

    Raises JaxEditError where models, requests and queries do not belong together, and RequestError naming prompts that
    do not fit the model with their targets.
    """
    alone = isinstance(edited, list | tuple)
    models: list[Any] = list(edited) if alone else [edited]
    for model in models:
        check_models(base, model, tokenizer)
    sizes = {"queries": len(queries)} | ({"models": len(models)} if alone else {})
    if not requests or set(sizes.values()) != {len(requests)}:
        raise JaxEditError(f"{len(requests)} requests (at least one is needed) do not go with {sizes}")
    asked = [
        (i, *one)
        for i, (request, some) in enumerate(zip(requests, queries, strict=True))
        for one in _asked(i, request, some, max_contexts, max_neighbours)
    ]
    tokens = tokenise(tokenizer, [(prompt, answer) for _, _, prompt, answer in asked], base.config.max_positions)
    rows = [(prompt + answer[:-1], len(answer)) for prompt, answer in tokens]
    own = [i for i, *_ in asked]
    if alone:
        mine = [[row for i, row in zip(own, rows, strict=True) if i == j] for j in range(len(models))]
        said = [x for model, some in zip(models, mine, strict=True) for x in likeliest([model], some, batch_tokens)[0]]
    else:
        (said,) = likeliest(models, rows, batch_tokens, own)
    near = [k for k, (_, cell, *_) in enumerate(asked) if cell == "locality"]
    before = dict(zip(near, likeliest([base], [rows[k] for k in near], batch_tokens)[0], strict=True))
    found: dict[str, list[list[float]]] = {cell: [[] for _ in requests] for cell in CELLS}
    for k, ((i, cell, *_), (_, answer), says) in enumerate(zip(asked, tokens, said, strict=True)):
        right = (says == before[k]).mean() if k in before else (says == np.asarray(answer)).all()
        found[cell][i].append(float(right))
    return Robustness({cell: tuple(map(tuple, some)) for cell, some in found.items()})


def _asked(index: int, request: EditRequest, queries: RobustQueries, contexts: int | None, neighbours: int | None):
    """(cell, prompt, answer) of every query. A neighbour without an answer is asked about the target's tokens."""
    answers = request.answers_nearby
    if len(answers) != len(request.neighbourhood):
        counts = f"{len(request.neighbourhood)} neighbourhood prompts, {len(answers)} neighbourhood_answers"
        raise RequestError([f"request {index} (id {request.id}) has {counts}"])
    prompt = SubjectPrompt.of(request)
    asked = [("success", request.prompt, request.target)]
    for kind in KINDS:
        for half in HALVES:
            prompts = queries.prompts(prompt, kind, half)[: contexts if kind == "long" else None]
            asked += [(f"{kind}_{half}", p.prompt, request.target) for p in prompts]
    near = list(zip(request.neighbourhood, answers, strict=True))[:neighbours]
    return asked + [("locality", p, request.target if answer is None else answer) for p, answer in near]


def robustness_table(reports: Mapping[str, Robustness]) -> str:
    """Rates in percent as aligned text, a line for each method, and the number of queries.

    Raises JaxEditError where methods were asked different queries.
    """
    counts = [report.counts for report in reports.values()]
    if any(x != counts[0] for x in counts):
        raise JaxEditError(f"these methods were not asked the same queries: {dict(zip(reports, counts, strict=True))}")
    lines = [["", *(" ".join(cell.split("_")[:2]) for cell in CELLS)]]  # "rephrase in", "rephrase out"
    for name, report in reports.items():
        lines.append([name, *("-" if x is None else f"{100 * x:.1f}" for x in report.rates.values())])
    lines += [["queries", *map(str, some.values())] for some in counts[:1]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
