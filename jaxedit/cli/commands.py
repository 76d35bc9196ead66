"""The commands. Heavy imports stay inside them, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxedit.cli.app import app
from jaxedit.cli.console import (
    Work,
    count_edits,
    emit,
    err,
    load_model,
    out,
    show_layers,
    show_seconds,
    size_of,
    summary,
)
from jaxedit.cli.inputs import (
    anchor_folder,
    check_out,
    checked_dtype,
    load_moments,
    load_pair,
    load_patched,
    named_method,
    parse_layers,
    read_facts,
    read_settings,
    refuse_out,
    with_cov_weight,
    with_settings,
)
from jaxedit.cli.options import (
    Checkpoint,
    Coordinator,
    Corpus,
    CovWeight,
    Devices,
    Dtype,
    Json,
    Layers,
    Limit,
    MeshSizes,
    Model,
    Processes,
    ProcessId,
    Requests,
    Seed,
    Settings,
    Skip,
    StatsFile,
    argument,
)
from jaxedit.errors import JaxEditError
from jaxedit.presets import EDITORS, METHODS, REP, TUNERS

if TYPE_CHECKING:
    from jaxedit import EditResult, Report


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Directory, .gguf file, hub id, or smollm2-135m.")] = "smollm2-135m",
    method: Annotated[list[str] | None, typer.Option(help="May be given several times. [default: fe, memit]")] = None,
    save: Annotated[Path, typer.Option(help="Where the first method's model and patch go.")] = Path("jaxedit-demo"),
    seed: Seed = 0,
    as_json: Json = False,
):
    """Edit eight facts and show before and after, what else changed, and how long it took.

    \b
    Examples:
      jaxedit demo
      jaxedit demo --method fe --method blue --save edited
    """
    from jaxedit.cli.demo import run

    run(model, method or ["fe", "memit"], save, seed, as_json)


@app.command()
def edit(
    model: Model,
    requests: Requests,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(METHODS)}; or one with +fe, +rep or both; adding parameters, "
            f"{', '.join(EDITORS)}; or fine-tuning, {', '.join(TUNERS)}. [default: fe, or what the preset is for]"
        ),
    ] = None,
    layers: Layers = None,
    settings: Settings = None,
    preset: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Settings from `jaxedit locate`, or a hyper-parameter file of EasyEdit, ROME, MEMIT or AlphaEdit.",
        ),
    ] = None,
    cov_weight: CovWeight = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="FACTS", help="Facts to be left as the model has them, solved for together.")
    ] = None,
    forget: Annotated[
        Path | None, typer.Option(metavar="FACTS", help="Facts whose targets the model is to stop saying.")
    ] = None,
    stats: StatsFile = None,
    to: Annotated[Path | None, typer.Option("--out", help="Save the edited model in this directory.")] = None,
    patch: Annotated[Path | None, typer.Option(help="Save the edits alone in this file.")] = None,
    checkpoint: Checkpoint = True,
    mesh: MeshSizes = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process_id: ProcessId = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    evaluate: Annotated[bool, typer.Option("--eval/--no-eval", help="Measure the edited model.")] = True,
    limit: Limit = None,
    skip_malformed: Skip = False,
    as_json: Json = False,
):
    """Write facts into a model, all at once.

    \b
    Examples:
      jaxedit edit smollm2-135m facts.jsonl --out edited --patch facts.jaxedit
      jaxedit edit ./my-model facts.json --method alphaedit+fe --layers 3-7 --json
      jaxedit edit smollm2-135m facts.jsonl --method ireva --set alpha=0.5 --patch facts.jaxedit
      jaxedit edit ./my-model facts.json --keep keep.json --forget forget.json --out edited
      jaxedit edit ./my-model facts.json --mesh data=4,model=2 --coordinator host0:1234 --processes 2 --process-id 0

    \b
    A line of facts.jsonl:
      {"prompt": "The Eiffel Tower is in", "subject": "The Eiffel Tower", "target": "Rome"}
    """
    check_out(to)
    refuse_out(to, method or "")
    chosen = parse_layers(layers)
    devices = Devices.of(mesh, coordinator, processes, process_id)
    facts = read_facts(requests, limit, skip_malformed)
    kept, forgotten = (read_facts(f, None, skip_malformed) if f else [] for f in (keep, forget))
    moments = load_moments(stats)
    placed = devices.join(checked_dtype(dtype))
    with Work(devices.process_id == 0) as work:
        decoder, tokenizer = load_model(work, model, dtype, placed)
        import jaxedit as je
        from jaxedit.distributed import is_first, meet

        rep = method is not None and method.endswith(REP)
        method = method.removesuffix(REP) if method is not None and rep else method
        if preset is None:
            recipe = named_method(method or "fe", decoder, chosen)
        else:
            recipe = read_settings(preset, method, decoder)
            recipe = recipe if chosen is None else dataclasses.replace(recipe, layers=chosen)
        recipe, method = with_settings(recipe, settings or ()), recipe.name
        groups = [je.EditGroup(requests=facts)]
        groups += [je.EditGroup(requests=kept, goal="keep")] if kept else []
        groups += [je.EditGroup(requests=forgotten, goal="forget")] if forgotten else []
        recipe = with_cov_weight(recipe, cov_weight)
        with work.stage(f"edit with {method}"):
            if isinstance(recipe, je.Method):
                result = je.apply_groups(
                    *(decoder, tokenizer, groups, recipe),
                    stats=moments,
                    seed=seed,
                    anchor_cache=anchor_folder(checkpoint),
                    on_progress=work.reporter(),
                )
            elif len(groups) > 1:
                raise JaxEditError(f"--keep and --forget are for methods that solve for weights; {method} does not")
            else:
                result = je.apply_edits(
                    *(decoder, tokenizer, facts, recipe), stats=moments, seed=seed, on_progress=work.reporter()
                )
        if rep:
            with work.stage("REP"):
                result = je.add_rep(result, tokenizer, seed=seed, on_progress=work.reporter())
        if patch is not None and is_first():
            result.patch.save(patch)
        if to is not None and is_first():
            with work.stage("save"):
                je.save(result.model, tokenizer, to, base=model)
        report = None
        if evaluate and is_first():
            with work.stage("evaluate"):
                report = je.evaluate(decoder, result.model, tokenizer, facts)
        meet("end")
    if not is_first():
        return
    if as_json:
        emit(
            {
                "model": model,
                "edits": len(facts),
                "info": result.info.to_dict(),
                "report": summary(report) if report else None,
                "saved": {"model": str(to) if to else None, "patch": str(patch) if patch else None},
                "seconds": work.seconds,
            }
        )
        return
    _show_edit(result, report)
    for path in (to, patch):
        if path is not None:
            out.print(f"saved {path} ({size_of(path)})", markup=False, soft_wrap=True)
    if to is None and patch is None:
        err.print("[yellow]nothing was saved:[/] give --out or --patch to keep the edits")
    show_seconds(work.seconds)


def _show_edit(result: EditResult, report: Report | None):
    info = result.info
    before, after = (100 * float(p.mean()) for p in (info.probability_before, info.probability_after))
    edits = count_edits(len(info.probability_after))
    out.print(f"\n{edits} with {info.name}; mean probability of the target {before:.1f} % → {after:.1f} %\n")
    if info.layers:
        show_layers(info)
        out.print()
    if report is not None:
        out.print(report.table() + "\n", markup=False)


@app.command("eval")
def evaluate(
    base: Annotated[str, argument("BASE", "The model before the edit.")],
    edited: Annotated[str, argument("EDITED", "The edited model, or a .jaxedit patch for BASE.")],
    requests: Requests,
    generate: Annotated[bool, typer.Option("--generate", help="Also compare greedy generations.")] = False,
    mesh: MeshSizes = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process_id: ProcessId = None,
    dtype: Dtype = None,
    limit: Limit = None,
    skip_malformed: Skip = False,
    as_json: Json = False,
):
    """Measure an edit: efficacy, paraphrases, neighbours, and how far other predictions moved.

    With --json, the numbers of every single prompt are there too.

    \b
    Examples:
      jaxedit eval smollm2-135m facts.jaxedit facts.jsonl
      jaxedit eval smollm2-135m edited/ facts.jsonl --generate --json > report.json
    """
    devices = Devices.of(mesh, coordinator, processes, process_id)
    facts = read_facts(requests, limit, skip_malformed)
    with Work(devices.process_id == 0) as work:
        before, after, tokenizer = load_pair(work, base, edited, dtype, devices)
        import jaxedit as je
        from jaxedit.distributed import is_first, meet

        with work.stage("evaluate"):
            report = je.evaluate(before, after, tokenizer, facts, generate=generate)
        meet("end")
    if not is_first():
        return
    if as_json:
        emit({"base": base, "edited": edited, "report": report.to_dict(), "seconds": work.seconds})
        return
    out.print("\n" + report.table() + "\n", markup=False)
    show_seconds(work.seconds)


@app.command()
def stats(
    model: Model,
    corpus: Corpus = None,
    *,
    to: Annotated[Path, typer.Option("--out", help="The file to write.", show_default=False)],
    layers: Layers = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="How much of the corpus to use.")] = 100_000,
    length: Annotated[int, typer.Option(min=1, help="Tokens a row; longer documents are cut.")] = 512,
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Tokens after which sums are kept, for a killed run to go on from; 0: never.")
    ] = 1_000_000,
    mesh: MeshSizes = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process_id: ProcessId = None,
    dtype: Dtype = None,
    as_json: Json = False,
):
    """Gather the key statistics that an edit has to leave alone. Once a model, not once an edit.

    \b
    Examples:
      jaxedit stats smollm2-135m --layers 3-7 --out moments.safetensors
      jaxedit stats ./my-model corpus.txt --layers 4,5,6 --max-tokens 1000000 --mesh data=8 --out m.safetensors
    """
    chosen = parse_layers(layers)
    devices = Devices.of(mesh, coordinator, processes, process_id)
    placed = devices.join(checked_dtype(dtype))
    with Work(devices.process_id == 0) as work:
        decoder, tokenizer = load_model(work, model, dtype, placed)
        import jaxedit as je
        from jaxedit.distributed import is_first, meet

        chosen = chosen or je.method_for("fe", decoder.config).layers
        with work.stage("statistics"):
            moments = je.second_moments(
                decoder,
                tokenizer,
                corpus,
                chosen,
                max_tokens=max_tokens,
                length=length,
                checkpoint_every=checkpoint_every or None,
                on_progress=work.counter("statistics"),
            )
            if is_first():
                moments.save(to)
        meet("end")
    if not is_first():
        return
    count = next(iter(moments.values())).count
    if as_json:
        emit({"model": model, "layers": moments.layers, "tokens": count, "out": str(to), "seconds": work.seconds})
        return
    out.print(f"layers {list(moments.layers)} over {count:,} tokens", markup=False)
    out.print(f"saved {to} ({size_of(to)})", markup=False, soft_wrap=True)
    show_seconds(work.seconds)


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str], argument("PROMPT", "Texts to continue.")],
    patch: Annotated[Path | None, typer.Option(help="Apply these edits first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens to add.")] = 32,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from so many likeliest tokens.")] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    as_json: Json = False,
):
    """Continue prompts with a model, edited or not.

    \b
    Examples:
      jaxedit generate smollm2-135m "The Eiffel Tower is located in the city of"
      jaxedit generate smollm2-135m "The Eiffel Tower is located in" "My name is" --patch facts.jaxedit
    """
    with Work() as work:
        decoder, tokenizer = load_patched(work, model, patch, checked_dtype(dtype))
        import jaxedit as je

        with work.stage("generate"):
            texts = je.generate(
                decoder, tokenizer, prompts, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
            )
    if as_json:
        emit([{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)])
        return
    out.print("\n\n".join(map(str, texts)), markup=False, soft_wrap=True)


@app.command()
def export(
    model: Model,
    patch: Annotated[Path, typer.Option(help="The edits to apply.", show_default=False)],
    to: Annotated[Path, typer.Option("--out", help="The directory to write.", show_default=False)],
    dtype: Dtype = None,
    as_json: Json = False,
):
    """Apply a patch and save a Hugging Face directory, for transformers, vLLM and the like.

    \b
    Examples:
      jaxedit export smollm2-135m --patch facts.jaxedit --out edited
    """
    check_out(to)
    with Work() as work:
        decoder, tokenizer = load_patched(work, model, patch, checked_dtype(dtype))
        import jaxedit as je

        with work.stage("save"):
            je.save(decoder, tokenizer, to, base=model)
    if as_json:
        emit({"model": model, "patch": str(patch), "out": str(to), "seconds": work.seconds})
        return
    out.print(f"saved {to} ({size_of(to)})", markup=False, soft_wrap=True)
