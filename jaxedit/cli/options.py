"""Arguments and options that several commands share."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxedit.cli.console import err, prepare
from jaxedit.errors import JaxEditError

if TYPE_CHECKING:
    from jax.sharding import Mesh


def argument(name: str, help: str):
    return typer.Argument(metavar=name, help=help, show_default=False)


Model = Annotated[str, argument("MODEL", "Directory, .gguf file, hub id, or smollm2-135m.")]
Requests = Annotated[Path, argument("REQUESTS", "Facts: .json, .jsonl, .csv or .tsv, in any known format.")]
Corpus = Annotated[
    str | None, argument("CORPUS", "Text, directory, or name:config:split of the hub; by default a packaged one.")
]
Layers = Annotated[str | None, typer.Option(help="Such as 3,4,5 or 3-7; by default the model's preset.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first so many requests.")]
Skip = Annotated[bool, typer.Option("--skip-malformed", help="Leave out malformed records instead of stopping.")]
Seed = Annotated[int, typer.Option(help="Of what is sampled.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64; by default the checkpoint's.")]

CovWeight = Annotated[
    float | None, typer.Option(min=0, help="Weight of what is to be left alone; by default the model's preset.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="A setting of what does not solve for weights; may be given several times."
    ),
]
StatsFile = Annotated[Path | None, typer.Option(help="From `jaxedit stats`; by default made of the packaged corpus.")]
Checkpoint = Annotated[
    bool, typer.Option(help="Keep finished anchors in the cache, so that a killed run goes on where it was.")
]
MeshSizes = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="data=N,model=M",
        help="Devices over which rows (data) and weights (model) are split; data counts all processes' devices.",
    ),
]
Coordinator = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Of process 0, where several processes meet.")
]
Processes = Annotated[int | None, typer.Option(metavar="N", help="How many processes there are.")]
ProcessId = Annotated[
    int | None, typer.Option(metavar="I", help="Which of them this is, from 0; 0 writes the results.")
]


@dataclasses.dataclass(frozen=True)
class Devices:
    """What --mesh, --coordinator, --processes and --process-id say."""

    mesh: dict[str, int] | None
    coordinator: str | None
    processes: int
    process_id: int

    @classmethod
    def of(cls, mesh: str | None, coordinator: str | None, processes: int | None, process_id: int | None) -> Devices:
        """Raises JaxEditError where the options do not make sense, before anything is loaded."""
        given = {"--coordinator HOST:PORT": coordinator, "--processes N": processes, "--process-id I": process_id}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise JaxEditError(f"several processes also need {' and '.join(missing)}, each its own --process-id")
        sizes = None
        if mesh is not None:
            from jaxedit.sharding import parse_mesh

            sizes = parse_mesh(mesh)
        return cls(sizes, coordinator, processes or 1, process_id or 0)

    def join(self, dtype: str | None) -> Mesh | None:
        """Meet the other processes, if there are any; the mesh to load the model on."""
        prepare(dtype)
        if self.coordinator is not None:
            from jaxedit.distributed import connect

            _own_stdout()
            if self.process_id == 0:
                err.print(f"process 0 of {self.processes} waits for the others at {self.coordinator}", markup=False)
            connect(self.coordinator, self.processes, self.process_id)
        if self.mesh is None and self.coordinator is None:
            return None
        import jax

        from jaxedit.sharding import make_mesh

        return make_mesh(**(self.mesh or {"data": jax.device_count()}))


def _own_stdout():
    """Keep stdout for results: the libraries that connect processes write greetings there, which go to stderr now."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", encoding="utf-8")
