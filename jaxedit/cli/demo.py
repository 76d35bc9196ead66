"""`jaxedit demo`: eight facts edited by several methods under equal conditions, shown before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from jaxedit.cli.console import Work, emit, load_model, out, show_layers, show_seconds, size_of, summary
from jaxedit.cli.inputs import check_out

if TYPE_CHECKING:
    from jaxedit import EditRequest, EditResult, Report

NEW_TOKENS = 10
MAX_TOKENS = 100_000
PATCH = "facts.jaxedit"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One method: the edit, its metrics, and the completions of all prompts shown."""

    result: EditResult
    report: Report
    completions: dict[str, str]


def run(model_name: str, methods: Sequence[str], save_to: Path, seed: int, as_json: bool):
    """Edit, measure, show and save."""
    methods = list(dict.fromkeys(methods))
    with Work() as work:
        requests, before, outcomes = _edit(work, model_name, methods, save_to, seed)
    if as_json:
        emit(_document(model_name, requests, before, outcomes, save_to, work.seconds))
        return
    _show_edits(requests, before, outcomes)
    for name, outcome in outcomes.items():
        _show_outcome(name, outcome)
    _show_comparison(outcomes)
    _show_saved(model_name, requests[0], save_to, methods[0])
    show_seconds(work.seconds)


def _edit(work: Work, model_name: str, methods: list[str], save_to: Path, seed: int):
    model, tokenizer = load_model(work, model_name)
    import jaxedit as je
    from jaxedit.data.templates import sample_templates

    check_out(save_to)
    requests = je.read_requests(files("jaxedit") / "data" / "packaged" / "demo.jsonl")
    prompts = [p for r in requests for p in shown_prompts(r)]
    resolved = {name: je.method_for(name, model.config) for name in methods}
    layers = tuple(sorted({l for method in resolved.values() for l in method.layers}))
    with work.stage("statistics"):
        stats = je.second_moments(
            model, tokenizer, None, layers, max_tokens=MAX_TOKENS, on_progress=work.counter("statistics")
        )
    with work.stage("factor"):
        factors = {solver: je.prepare(solver, stats, layers) for solver in {m.solver for m in resolved.values()}}
    with work.stage("templates"):
        templates = sample_templates(model, tokenizer, seed)
    with work.stage("complete"):
        before = _complete(model, tokenizer, prompts)
    outcomes = {}
    for name, method in resolved.items():
        given = {"stats": stats, "factor": factors[method.solver], "templates": templates}
        with work.stage(f"edit with {name}"):
            result = je.apply_edits(model, tokenizer, requests, method, on_progress=work.reporter(f"{name}: "), **given)
        with work.stage(f"evaluate {name}"):
            report = je.evaluate(model, result.model, tokenizer, requests)
            outcomes[name] = Outcome(result, report, _complete(result.model, tokenizer, prompts))
    with work.stage("save"):
        first = outcomes[methods[0]].result
        je.save(first.model, tokenizer, save_to, base=model_name)
        first.patch.save(save_to / PATCH)
    return requests, before, outcomes


def shown_prompts(request: EditRequest) -> tuple[str, ...]:
    """The edited prompt, a paraphrase, and two prompts about similar subjects."""
    return (request.prompt, *request.paraphrases[:1], *request.neighbourhood[:2])


def _complete(model, tokenizer, prompts: Sequence[str]) -> dict[str, str]:
    from jaxedit import generate

    texts = generate(model, tokenizer, prompts, NEW_TOKENS)
    return {p: " ".join(str(t).removeprefix(p).split()) for p, t in zip(prompts, texts, strict=True)}


def _show_edits(requests: Sequence[EditRequest], before: dict[str, str], outcomes: dict[str, Outcome]):
    """A table an edit: the edited prompt and a paraphrase, which should change, and two that should not."""
    out.print(
        f"\n[bold]{len(requests)} facts edited.[/] Greedy completions, [green]new target in green[/], "
        "[cyan]old one in blue[/]; prompts below the line are about other subjects and should stay as they were."
    )
    for request in requests:
        title = Text.assemble("\n", (request.subject, "bold"), ": ", (request.target_true or "?", "cyan"), " → ")
        title.append(request.target, "green")
        out.print(title)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=True)
        for heading in ("prompt", "before", *outcomes):
            table.add_column(heading, ratio=1)
        for prompt in shown_prompts(request):
            texts = [before[prompt], *(o.completions[prompt] for o in outcomes.values())]
            last = prompt == shown_prompts(request)[len(request.paraphrases[:1])]
            table.add_row(Text(prompt), *(_coloured(t, request) for t in texts), end_section=last)
        out.print(table)


def _coloured(text: str, request: EditRequest) -> Text:
    shown = Text(text)
    shown.highlight_words([request.target], "green")
    if request.target_true:
        shown.highlight_words([request.target_true], "cyan")
    return shown


def _show_outcome(name: str, outcome: Outcome):
    info = outcome.result.info
    out.rule(f"[bold]{name}")
    out.print(outcome.report.table(), markup=False)
    means = [100 * float(p.mean()) for p in (info.probability_before, info.probability_after)]
    out.print(f"\nMean probability of the new target: {means[0]:.1f} % before, {means[1]:.1f} % after")
    out.print("Residual at the last edited layer, as a share of what was missing at first:\n")
    show_layers(info)
    out.print()
    show_seconds(info.seconds, "Seconds to edit")


def _show_comparison(outcomes: dict[str, Outcome]):
    """The methods side by side: shares of prompts that went as wanted, and what changed elsewhere."""
    out.rule("[bold]side by side")
    headings = ("edits taken", "paraphrases", "neighbours kept", "score", "KL elsewhere", "seconds")
    table = Table("method", *headings, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, outcome in outcomes.items():
        report, names = outcome.report, ("efficacy_success", "paraphrase_success", "neighbourhood_success", "score")
        shares = [f"{100 * (report.edited[n] or 0):.1f} %" for n in names]
        seconds = sum(outcome.result.info.seconds.values())
        table.add_row(name, *shares, f"{report.specificity['kl'] or 0:.3f}", f"{seconds:.0f}")
    out.print(table)
    out.print("Seconds include compilation; compiled programs are kept for the next run.\n", style="dim")


def _show_saved(model_name: str, request: EditRequest, to: Path, method: str):
    out.rule("[bold]saved")
    lines = [
        f"{to}  the model edited by {method}, as a Hugging Face directory ({size_of(to)})",
        f"{to / PATCH}  the edits alone ({size_of(to / PATCH)})",
        "",
        "Try it:",
        f'  jaxedit generate {to} "{request.prompt}"',
        f'  jaxedit generate {model_name} "{request.prompt}" --patch {to / PATCH}',
        "",
        "From Python:",
        "  import jaxedit as je",
        f'  model, tokenizer = je.load("{to}")',
        f'  patch = je.EditPatch.load("{to / PATCH}")',
        "  original = je.withdraw_patch(model, patch)",
        "",
    ]
    out.print("\n".join(lines), markup=False, soft_wrap=True)


def _document(model_name, requests, before, outcomes: dict[str, Outcome], to: Path, seconds) -> dict[str, Any]:
    def rows(request):
        return [
            {"prompt": p, "before": before[p], **{name: o.completions[p] for name, o in outcomes.items()}}
            for p in shown_prompts(request)
        ]

    return {
        "model": model_name,
        "edits": [{**dataclasses.asdict(r), "completions": rows(r)} for r in requests],
        "methods": {
            name: {"report": summary(o.report), "info": o.result.info.to_dict()} for name, o in outcomes.items()
        },
        "saved": {"model": str(to), "patch": str(to / PATCH)},
        "seconds": seconds,
    }
