"""`jaxedit locate`: where a model keeps its facts, and settings to edit it with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from jaxedit.cli.app import app
from jaxedit.cli.console import Work, emit, load_model, out, show_seconds
from jaxedit.cli.inputs import checked_dtype
from jaxedit.cli.options import Dtype, Json, Model, Seed, Skip
from jaxedit.errors import JaxEditError

if TYPE_CHECKING:
    from jaxedit.analysis.record import Trace
    from jaxedit.analysis.suggest import Tuning

FILES = ("trace.npz", "trace.json", "trace.png", "preset.json")


@app.command()
def locate(
    model: Model,
    facts: Annotated[
        Path | None,
        typer.Option(help="What the model may know: prompt, subject, attribute; or requests with a true target."),
    ] = None,
    requests: Annotated[
        Path | None, typer.Option(help="Edits to try settings on, not those that results are reported on.")
    ] = None,
    to: Annotated[Path, typer.Option("--out", help="The directory to write.")] = Path("jaxedit-locate"),
    method: Annotated[str, typer.Option(help="What to find settings for.")] = "fe",
    count: Annotated[int, typer.Option(min=1, help="Layers to suggest.")] = 5,
    max_facts: Annotated[int | None, typer.Option(min=1, help="Trace the first so many facts it knows.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Times that each fact is corrupted.")] = 10,
    window: Annotated[
        int | None, typer.Option(min=1, help="Layers restored together; by default 10, at most a third of all.")
    ] = None,
    noise: Annotated[float, typer.Option(min=0, help="In standard deviations of the embeddings.")] = 3.0,
    tune: Annotated[bool, typer.Option("--tune/--no-tune", help="Try settings on edits.")] = True,
    lr: Annotated[list[float] | None, typer.Option(help="To try; may be given several times.")] = None,
    cov_weight: Annotated[list[float] | None, typer.Option(help="To try; may be given several times.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Try on the first so many requests.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of text, for the key statistics.")] = 100_000,
    dtype: Dtype = None,
    seed: Seed = 0,
    skip_malformed: Skip = False,
    as_json: Json = False,
):
    """Find the layers to edit in a new model by causal tracing, and the settings by trying a few.

    Without --facts and --requests eight packaged ones are used; hundreds tell more.

    \b
    Writes into the directory: trace.npz (every effect), trace.json (averages), trace.png (a plot, where matplotlib is
    installed), and preset.json (the settings).

    \b
    Examples:
      jaxedit locate ./new-model --facts known_facts.json --requests validation.json --out located
      jaxedit locate smollm2-135m --max-facts 20 --samples 3 --no-tune
    """
    _check_out(to)
    with Work() as work:
        decoder, tokenizer = load_model(work, model, checked_dtype(dtype))
        import jaxedit as je
        from jaxedit.analysis import suggest
        from jaxedit.analysis.plots import plot_trace
        from jaxedit.analysis.record import write_json
        from jaxedit.analysis.tracing import trace
        from jaxedit.data.facts import facts_from_requests, read_known_facts

        packaged = Path(je.__file__).parent / "data" / "packaged" / "demo.jsonl"
        known = facts_from_requests(je.read_requests(packaged)) if facts is None else read_known_facts(facts)
        edits = je.read_requests(requests or packaged, skip_malformed=skip_malformed)[:limit]
        with work.stage("trace"):
            options = {"window": window, "noise": noise, "samples": samples, "seed": seed, "max_facts": max_facts}
            found = trace(decoder, tokenizer, known, **options, on_progress=work.reporter())
        found.save(to / "trace.npz")
        layers = suggest.suggest_layers(found, count)
        write_json(to / "trace.json", found.to_dict() | {"layers": list(layers)})
        plot = _plot(plot_trace, found, to / "trace.png", layers)
        chosen, tuning = je.method_for(method, decoder.config, layers), None
        if tune:
            grid = tuple(lr or suggest.LRS), tuple(cov_weight or suggest.COV_WEIGHTS)
            needed = {l for m in suggest.candidates(method, decoder.config, layers, *grid) for l in m.layers}
            stats = je.second_moments(
                *(decoder, tokenizer, None, tuple(sorted(needed))),
                max_tokens=max_tokens,
                on_progress=work.counter("statistics"),
            )
            with work.stage("tune"):
                tuning = suggest.tune(
                    *(decoder, tokenizer, edits, method, layers),
                    lrs=grid[0],
                    cov_weights=grid[1],
                    stats=stats,
                    seed=seed,
                    on_progress=work.reporter(),
                )
            chosen = tuning.best.method
        validation = None if tuning is None else {"requests": len(edits), **tuning.to_dict()}
        suggest.write_preset(to / "preset.json", decoder, chosen, validation)
    saved = [to / name for name in FILES if plot or name != "trace.png"]
    if as_json:
        emit(
            {
                "model": model,
                "trace": {name: x for name, x in found.to_dict().items() if name != "effects"},
                "layers": list(layers),
                "preset": {"method": method, "layers": list(chosen.layers)},
                "validation": validation,
                "saved": [str(path) for path in saved],
                "seconds": work.seconds,
            }
        )
        return
    _show_trace(found)
    out.print(f"\nsuggested layers: {', '.join(map(str, layers))}\n")
    if tuning is not None:
        _show_tuning(tuning, len(edits))
    for path in saved:
        out.print(f"saved {path}", markup=False, soft_wrap=True)
    show_seconds(work.seconds)


def _check_out(to: Path):
    """Refuse a directory of something else, before hours of work and not after."""
    if to.exists() and (not to.is_dir() or {f.name for f in to.iterdir()} - set(FILES)):
        raise JaxEditError(f"{to} exists and holds other files; choose another directory")


def _plot(plot_trace, found: Trace, path: Path, layers) -> bool:
    """Whether a plot could be drawn: everything else is worth having without."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        warnings.warn("no plot was drawn: it needs matplotlib (pip install 'jaxedit[plot]')", stacklevel=1)
        return False
    plot_trace(found, path, layers)
    return True


def _show_trace(found: Trace):
    """By layer the average effects where editors act: MLP and hidden state at the last subject token, attention at
    the prompt's last."""
    from jaxedit.analysis.record import LAST, LAST_SUBJECT

    columns = [
        (found.average(kind), role, name)
        for kind, role, name in (
            ("mlp", LAST_SUBJECT, "MLP, last subject token"),
            ("hidden", LAST_SUBJECT, "hidden state, last subject token"),
            ("attention", LAST, "attention, last token"),
        )
    ]
    out.print(
        f"\n{len(found.facts)} facts known, {len(found.unknown)} not; probability of the answer "
        f"{100 * found.clean.mean():.1f} %, corrupted {100 * found.corrupted.mean():.1f} %. "
        "Restored, average indirect effect in percent points:\n"
    )
    table = Table("layer", *(name for *_, name in columns), box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for l in range(found.n_layer):
        values = ((average.mean[l, role], average.error[l, role]) for average, role, _ in columns)
        table.add_row(str(l), *(f"{100 * mean:.1f} ± {100 * error:.1f}" for mean, error in values))
    out.print(table)


def _show_tuning(tuning: Tuning, n: int):
    out.print(f"settings tried on {n} edits, the best first:\n")
    headings = ("layers", "lr", "cov weight", "score", "KL elsewhere", "")
    table = Table(*headings, box=None, pad_edge=False)
    for s in sorted(tuning.settings, key=lambda s: (-s.score, s.kl or 0.0)):
        about = s.to_dict()
        note = " ".join(["chosen"] * (s is tuning.best) + ["default"] * s.default)
        kl = "-" if s.kl is None else f"{s.kl:.4f}"
        layers = ",".join(map(str, s.method.layers))
        table.add_row(layers, f"{about['lr']:g}", f"{about['cov_weight']:g}", f"{100 * s.score:.1f} %", kl, note)
    out.print(table)
    out.print()
