"""`jaxedit spread`: what becomes of an edit on its way up, layer by layer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from jaxedit.analysis.figures import figure_path
from jaxedit.cli.app import app
from jaxedit.cli.console import Work, emit, load_model, out, show_seconds
from jaxedit.cli.inputs import checked_dtype, load_moments, parse_layers, read_facts
from jaxedit.cli.options import Dtype, Json, Layers, Limit, Model, Requests, Seed, Skip, StatsFile


@app.command()
def spread(
    model: Model,
    requests: Requests,
    method: Annotated[
        list[str] | None,
        typer.Option(help="May be given several times; by default memit, memit_no_divide, one_layer and fe."),
    ] = None,
    layers: Layers = None,
    stats: StatsFile = None,
    directions: Annotated[int, typer.Option(min=1, help="Random directions a prompt, for the theorems.")] = 32,
    plot: Annotated[Path | None, typer.Option(help="A .png, .pdf or .svg file to draw into.")] = None,
    dtype: Dtype = None,
    limit: Limit = None,
    skip_malformed: Skip = False,
    seed: Seed = 0,
    as_json: Json = False,
):
    """Follow edits layer by layer: does spreading a residual backward point the right way, and what does replay do?

    Tables of cosines, of the residual that remains and of the theorems' premises; nothing is saved but the plot.

    \b
    Examples:
      jaxedit spread smollm2-135m facts.jsonl --plot spread.png
      jaxedit spread smollm2-135m facts.jsonl --method alphaedit --method alphaedit+fe --layers 3-7 --json
    """
    wanted = parse_layers(layers)
    if plot is not None:
        figure_path(plot)
    facts = read_facts(requests, limit, skip_malformed)
    with Work() as work:
        if plot is not None and find_spec("matplotlib") is None:
            raise typer.BadParameter("needs matplotlib: pip install 'jaxedit[plot]'", param_hint="--plot")
        decoder, tokenizer = load_model(work, model, checked_dtype(dtype))
        from jaxedit.analysis.spread_plots import plot_spread
        from jaxedit.analysis.study import METHODS, spread

        with work.stage("spread"):
            found = spread(
                *(decoder, tokenizer, facts, tuple(method or METHODS), wanted, load_moments(stats)),
                directions=directions,
                seed=seed,
                on_progress=work.reporter(),
            )
        if plot is not None:
            plot_spread(found, plot)
    if as_json:
        emit({"model": model, **found.to_dict(), "seconds": work.seconds})
        return
    out.print("\n" + found.table() + "\n", markup=False)
    if plot is not None:
        out.print(f"saved {plot}", markup=False, soft_wrap=True)
    show_seconds(work.seconds)
