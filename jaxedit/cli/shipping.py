"""The commands that ship edits: as a LoRA adapter, and several patches as one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from jaxedit.cli.app import app
from jaxedit.cli.console import Work, emit, err, load_model, out, show_seconds, size_of
from jaxedit.cli.inputs import checked_dtype, load_patch
from jaxedit.cli.options import Dtype, Json, argument

if TYPE_CHECKING:
    from jaxedit.export.lora import LoraInfo
    from jaxedit.export.merge import MergeReport


@app.command()
def lora(
    patch: Annotated[Path, argument("PATCH", "The edits.")],
    base: Annotated[str, argument("BASE", "The model that they were made on.")],
    to: Annotated[Path, typer.Option("--out", help="The directory to write.", show_default=False)],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Keep at most this much of each layer; by default everything.")
    ] = None,
    base_name: Annotated[
        str | None, typer.Option(help="What transformers calls BASE, for the adapter's config; by default the same.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the adapter: float32, bfloat16, float16 or float64.")] = "float32",
    as_json: Json = False,
):
    """Save a patch as a LoRA adapter, which peft and vLLM load on the untouched base model.

    \b
    Examples:
      jaxedit lora facts.jaxedit ./my-model --out adapter
      jaxedit lora facts.jaxedit ./model.gguf --base-name org/model --rank 64 --dtype bfloat16 --out adapter
    """
    checked_dtype(dtype)
    edits = load_patch(patch)
    with Work() as work:
        decoder, _ = load_model(work, base, edits.dtype)
        from jaxedit.export.lora import save_lora

        with work.stage("save"):
            info = save_lora(edits, decoder, to, base_name=base_name or base, rank=rank, dtype=dtype)
    if as_json:
        names = {"patch": str(patch), "base": base, "out": str(to)}
        emit({**names, "adapter": info.to_dict(), "seconds": work.seconds})
        return
    _show_adapter(info)
    out.print(f"saved {to} ({size_of(to)})", markup=False, soft_wrap=True)
    show_seconds(work.seconds)


def _show_adapter(info: LoraInfo):
    table = Table("layer", "rank", "relative error", "module", box=None, pad_edge=False)
    for column in table.columns[:3]:
        column.justify = "right"
    for l in info.layers:
        table.add_row(str(l.layer), str(l.rank), f"{l.error:.2g}", l.module)
    out.print(f"\nadapter of rank {info.rank} in {info.dtype}\n")
    out.print(table)
    out.print()


@app.command()
def merge(
    patches: Annotated[list[Path], argument("PATCH", "The patches, each after those it was made on top of.")],
    base: Annotated[str, typer.Option(help="The model that they were made on.", show_default=False)],
    to: Annotated[Path, typer.Option("--out", help="The patch to write.", show_default=False)],
    dtype: Dtype = None,
    as_json: Json = False,
):
    """Make one patch of several, and show where their edits conflict.

    \b
    Examples:
      jaxedit merge monday.jaxedit tuesday.jaxedit --base ./my-model --out both.jaxedit
    """
    checked_dtype(dtype)
    parts = [load_patch(p) for p in patches]
    with Work() as work:
        decoder, _ = load_model(work, base, dtype or parts[0].dtype)
        from jaxedit.export.merge import merge_patches

        with work.stage("merge"):
            merged, report = merge_patches(parts, decoder, [str(p) for p in patches])
            merged.save(to)
    if as_json:
        counts = {"edits": len(merged.requests), "layers": merged.layers}
        emit({"base": base, **counts, "report": report.to_dict(), "out": str(to), "seconds": work.seconds})
        return
    out.print(f"\n{len(merged.requests)} edits of {len(parts)} patches in layers {list(merged.layers)}\n", markup=False)
    _show_overlaps(report)
    _show_conflicts(report)
    out.print(f"saved {to} ({size_of(to)})", markup=False, soft_wrap=True)
    show_seconds(work.seconds)


def _show_overlaps(report: MergeReport):
    """One line a layer: the pair of updates that is most alike or most opposed, and what the sum keeps."""
    table = Table("layer", "patches", "strongest cosine", "norm of sum / independent", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for o in report.overlaps:
        pairs = [c for i, row in enumerate(o.cosines) for c in row[:i]]
        strongest = f"{max(pairs, key=abs):+.3f}" if pairs else "-"
        table.add_row(str(o.layer), str(len(o.patches)), strongest, f"{o.ratio:.3f}")
    out.print(table)
    out.print()


def _show_conflicts(report: MergeReport):
    if not report.conflicts:
        out.print("no prompt is edited by two patches\n")
        return
    table = Table("", "prompt", "target", "by", "other target", "by", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for column in table.columns:
        column.overflow = "fold"
    for c in report.conflicts:
        (first, second), (i, j) = c.targets, c.patches
        table.add_row(*map(Text, (c.kind, c.prompt, first, report.names[i], second, report.names[j])))
    out.print(table)
    out.print()
    clashes = sum(c.kind == "contradicts" for c in report.conflicts)
    if clashes:
        message = f"[yellow]warning:[/] {clashes} of these contradict each other: neither target may hold"
        err.print(message, soft_wrap=True)
