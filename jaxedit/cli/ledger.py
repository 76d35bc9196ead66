"""The commands ``jaxedit ledger …``: edits that are kept, listed, changed and withdrawn one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from jaxedit.cli.app import app
from jaxedit.cli.console import Work, count_edits, emit, load_model, out, show_layers, show_seconds, size_of
from jaxedit.cli.inputs import (
    anchor_folder,
    check_out,
    checked_dtype,
    load_moments,
    named_method,
    parse_layers,
    read_facts,
    refuse_out,
    with_cov_weight,
    with_settings,
)
from jaxedit.cli.options import (
    Checkpoint,
    CovWeight,
    Devices,
    Dtype,
    Json,
    Layers,
    Limit,
    MeshSizes,
    Model,
    Requests,
    Settings,
    Skip,
    StatsFile,
    argument,
)
from jaxedit.errors import JaxEditError

if TYPE_CHECKING:
    from jaxedit.ledger_files import LedgerRecord

ledger_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(ledger_app, name="ledger")

LedgerFile = Annotated[Path, argument("LEDGER", "The ledger's file, for example facts.ledger.")]
Id = Annotated[str, argument("ID", "Of the edit, as `jaxedit ledger list` shows it.")]


@ledger_app.callback()
def _ledger():
    """Keep edits in a file: add, list, show, update and withdraw them, and export the model of all of them.

    \b
    Examples:
      jaxedit ledger add facts.ledger smollm2-135m facts.jsonl
      jaxedit ledger withdraw facts.ledger 3 17
      jaxedit ledger export facts.ledger smollm2-135m --out edited
    """


@ledger_app.command()
def add(
    ledger: LedgerFile,
    model: Model,
    requests: Requests,
    method: Annotated[str | None, typer.Option(help="One of those of `jaxedit edit`. [default: fe]")] = None,
    layers: Layers = None,
    settings: Settings = None,
    cov_weight: CovWeight = None,
    stats: StatsFile = None,
    seed: Annotated[int | None, typer.Option(help="Of the contexts that are sampled. [default: 0]")] = None,
    checkpoint: Checkpoint = True,
    mesh: MeshSizes = None,
    dtype: Dtype = None,
    limit: Limit = None,
    skip_malformed: Skip = False,
    as_json: Json = False,
):
    """Add facts. Makes the ledger if there is none: method, its settings, stats, seed and dtype hold for good.

    \b
    Examples:
      jaxedit ledger add facts.ledger smollm2-135m facts.jsonl
      jaxedit ledger add facts.ledger ./my-model facts.json --method memit --layers 3-7 --json
    """
    from jaxedit.ledger_files import locked, read_record

    chosen, facts = parse_layers(layers), read_facts(requests, limit, skip_malformed)
    with locked(ledger):
        record = read_record(ledger) if ledger.exists() else None
        if record is not None:
            if settings:
                raise JaxEditError("settings hold for good; they cannot be given to a ledger that exists")
            _agree(record, method=method, cov_weight=cov_weight, seed=seed, dtype=checked_dtype(dtype))
        moments = load_moments(stats)
        with Work() as work:
            decoder, tokenizer = _load(work, model, record.dtype if record else checked_dtype(dtype), mesh)
            from jaxedit.ledger import Ledger
            from jaxedit.presets import METHODS, method_for

            if record is None:
                recipe = with_settings(named_method(method or "fe", decoder, chosen), settings or ())
                recipe = with_cov_weight(recipe, cov_weight)
                held = Ledger.create(decoder, tokenizer, recipe, stats=moments, seed=seed or 0)
            else:
                held = Ledger.load(ledger, decoder, tokenizer, moments)
                if chosen is not None:  # of which some methods take the first or the last
                    name = held.method.name
                    _agree(
                        record, layers=method_for(name, decoder.config, chosen).layers if name in METHODS else chosen
                    )
            with work.stage("add"):
                grown = held.add(facts, anchor_cache=anchor_folder(checkpoint), on_progress=work.reporter())
            grown.save(ledger)
    new = list(grown.list())[len(held) :]
    if as_json:
        done = {"created": record is None, "added": new, "edits": len(grown)}
        emit({"ledger": str(ledger), "model": model, **done, "seconds": work.seconds})
        return
    out.print(f"added {count_edits(len(new))} to {ledger}, which holds {len(grown)} now", markup=False, soft_wrap=True)
    show_seconds(work.seconds)


@ledger_app.command("list")
def list_(ledger: LedgerFile, as_json: Json = False):
    """List all edits. Needs no model.

    \b
    Examples:
      jaxedit ledger list facts.ledger
      jaxedit ledger list facts.ledger --json
    """
    from jaxedit.ledger_files import read_record

    record = read_record(ledger)
    method, layers = record.method["name"], record.method.get("layers")
    if as_json:
        edits = [
            {"id": id, "prompt": r.prompt, "subject": r.subject, "target": r.target}
            for id, r in record.requests.items()
        ]
        emit({"ledger": str(ledger), "method": method, "layers": layers, "dtype": record.dtype, "edits": edits})
        return
    table = Table("id", "prompt", "target", box=None, pad_edge=False)
    for id, r in record.requests.items():
        table.add_row(*map(Text, (id, r.prompt, r.target)))
    where = f" at layers {list(layers)}" if layers else ""
    out.print(f"{count_edits(len(record.requests))} with {method}{where}", markup=False)
    if record.requests:
        out.print(table)


@ledger_app.command()
def show(ledger: LedgerFile, id: Id, as_json: Json = False):
    """Show one edit: its request, and how its anchor was found. Needs no model.

    \b
    Examples:
      jaxedit ledger show facts.ledger 3
    """
    from jaxedit.ledger_files import read_record

    record = read_record(ledger)
    anchors = record.found(id)
    request = dataclasses.asdict(record.requests[id])
    if as_json:
        emit({"ledger": str(ledger), "id": id, "request": request, "anchors": anchors})
        return
    for name, value in request.items():
        if value not in (None, (), "") and name not in ("id", "subject_start"):
            text = "; ".join(value) if isinstance(value, tuple) else value
            out.print(f"{name}: {text}", markup=False, soft_wrap=True)
    for l, found in anchors.items():
        out.print(
            f"anchor at layer {l}: loss {found['first_loss']:.3f} → {found['final_loss']:.3f} in "
            f"{found['updates']} updates, moved by {found['delta_norm'] / (found['init_norm'] or 1):.2f} of its norm",
            markup=False,
            soft_wrap=True,
        )


@ledger_app.command()
def withdraw(
    ledger: LedgerFile,
    ids: Annotated[list[str] | None, argument("IDS", "Of the edits, as `jaxedit ledger list` shows them.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Withdraw every edit.")] = False,
    as_json: Json = False,
):
    """Withdraw edits. Needs no model; `jaxedit ledger export` solves for those that remain.

    \b
    Examples:
      jaxedit ledger withdraw facts.ledger 3 17
      jaxedit ledger withdraw facts.ledger --all
    """
    from jaxedit.ledger_files import locked, read_record, write_record

    if bool(ids) == every:
        raise typer.BadParameter("name the edits to withdraw, or give --all", param_hint="IDS")
    with locked(ledger):
        record = read_record(ledger)
        gone = list(record.requests) if every else list(ids or ())
        rest = record.without(gone)
        write_record(rest, ledger)
    if as_json:
        emit({"ledger": str(ledger), "withdrawn": gone, "edits": len(rest.requests)})
        return
    out.print(f"withdrew {count_edits(len(gone))}; {len(rest.requests)} remain", markup=False)


@ledger_app.command()
def update(
    ledger: LedgerFile,
    model: Model,
    id: Id,
    target: Annotated[str | None, typer.Option(help="The new target of the same prompt.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="A file with the one request to take instead.")] = None,
    checkpoint: Checkpoint = True,
    mesh: MeshSizes = None,
    as_json: Json = False,
):
    """Change an edit, which keeps its id.

    \b
    Examples:
      jaxedit ledger update facts.ledger smollm2-135m 3 --target Paris
      jaxedit ledger update facts.ledger smollm2-135m 3 --from fact.json
    """
    from jaxedit.ledger_files import locked, read_record

    if (target is None) == (source is None):
        raise typer.BadParameter("give one of the two", param_hint="--target / --from")
    given = [] if source is None else read_facts(source, None, False)
    if len(given) > 1:
        raise JaxEditError(f"{source} holds {len(given)} requests, expected the one to take the place of edit {id}")
    with locked(ledger):
        record = read_record(ledger)
        record.rows([id])
        old = record.requests[id]
        new = given[0] if target is None else dataclasses.replace(old, target=target)
        with Work() as work:
            decoder, tokenizer = _load(work, model, record.dtype, mesh)
            from jaxedit.ledger import Ledger

            with work.stage("update"):
                held = Ledger.load(ledger, decoder, tokenizer)
                held = held.update(id, new, anchor_cache=anchor_folder(checkpoint), on_progress=work.reporter())
            held.save(ledger)
    if as_json:
        change = {"updated": id, "request": dataclasses.asdict(held.get(id)), "edits": len(held)}
        emit({"ledger": str(ledger), "model": model, **change, "seconds": work.seconds})
        return
    for verb, request in (("was", old), ("is now", new)):
        out.print(f"edit {id} {verb}: {request.prompt} {request.target}", markup=False, soft_wrap=True)
    show_seconds(work.seconds)


@ledger_app.command()
def export(
    ledger: LedgerFile,
    model: Model,
    to: Annotated[Path | None, typer.Option("--out", help="Save the model with all edits in this directory.")] = None,
    patch: Annotated[Path | None, typer.Option(help="Save all edits as one patch in this file.")] = None,
    stats: Annotated[Path | None, typer.Option(help="The ledger's own, if it was created with --stats.")] = None,
    checkpoint: Checkpoint = True,
    mesh: MeshSizes = None,
    as_json: Json = False,
):
    """Solve for all edits and save the model, the edits as a patch, or both. The ledger stays as it is.

    \b
    Examples:
      jaxedit ledger export facts.ledger smollm2-135m --out edited --patch facts.jaxedit
    """
    from jaxedit.ledger_files import read_record

    check_out(to)
    if to is None and patch is None:
        raise typer.BadParameter("give --out, --patch or both", param_hint="--out / --patch")
    record, moments = read_record(ledger), load_moments(stats)
    if record.statistics is not None and moments is None:
        raise JaxEditError(f"{ledger} was created with second moments of its own; give them as --stats")
    refuse_out(to, record.method["name"])
    if patch is not None and not record.requests:
        raise JaxEditError(f"{ledger} holds no edits, so there is no patch of them")
    with Work() as work:
        decoder, tokenizer = _load(work, model, record.dtype, mesh)
        import jaxedit as je
        from jaxedit.ledger import Ledger

        held, result = Ledger.load(ledger, decoder, tokenizer, moments), None
        if len(held):
            with work.stage("solve"):
                result = held.solve(anchor_cache=anchor_folder(checkpoint), on_progress=work.reporter())
        if patch is not None and result is not None:
            result.patch.save(patch)
        if to is not None:
            with work.stage("save"):
                je.save(result.model if result else decoder, tokenizer, to, base=model)
    if as_json:
        saved = {"model": str(to) if to else None, "patch": str(patch) if patch else None}
        info = result.info.to_dict() if result else None
        held_now = {"ledger": str(ledger), "model": model, "edits": len(held)}
        emit({**held_now, "info": info, "saved": saved, "seconds": work.seconds})
        return
    out.print(f"{count_edits(len(held))} with {held.method.name}\n", markup=False)
    if result is not None:
        if result.info.layers:
            show_layers(result.info)
            out.print()
    for path in (to, patch):
        if path is not None:
            out.print(f"saved {path} ({size_of(path)})", markup=False, soft_wrap=True)
    show_seconds(work.seconds)


def _load(work: Work, model: str, dtype: str | None, mesh: str | None):
    return load_model(work, model, dtype, Devices.of(mesh, None, None, None).join(dtype))


def _agree(record: LedgerRecord, **options: Any):
    """Refuse options that differ from what the ledger was created with."""
    has = {
        "method": record.method["name"],
        "layers": tuple(record.method.get("layers") or ()),
        "cov_weight": record.method.get("solver", {}).get("cov_weight"),
        "seed": record.seed,
        "dtype": record.dtype,
    }
    wrong = [name for name, value in options.items() if value is not None and value != has[name]]
    if wrong:
        named = ", ".join(f"--{name.replace('_', '-')} {has[name]}" for name in wrong)
        raise JaxEditError(f"the ledger was created with {named}; leave these options out, or make another ledger")
