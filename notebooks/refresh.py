"""Run notebooks and write them back as they are committed: with outputs, and with nothing of the machine they ran on.

    python notebooks/refresh.py                                       # all, with the parameters they have
    python notebooks/refresh.py 04 05 --requests counterfact.json     # some, on your own edits

Each runs in an empty folder that holds a copy of the file of edits, and is written whole, or, where a cell fails, not
at all.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from jaxedit.cache import write_atomically

HERE = Path(__file__).resolve().parent
PARAMETERS = ("MODEL", "REQUESTS", "QUICK")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook of the current format. Raises nbformat's ValidationError on anything else."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def parameters_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The first code cell, which sets PARAMETERS, in their order, and nothing else. Raises ValueError otherwise."""
    cell = next((c for c in notebook.cells if c.cell_type == "code"), None)
    if cell is None or "parameters" not in cell.metadata.get("tags", ()):
        raise ValueError('the first code cell is not tagged "parameters"')
    names = tuple(ast.unparse(s.targets[0]) if isinstance(s, ast.Assign) else "" for s in ast.parse(cell.source).body)
    if names != PARAMETERS:
        raise ValueError(f"the first code cell does not set {', '.join(PARAMETERS)}, each on a line, and nothing else")
    return cell


def with_parameters(notebook: nbformat.NotebookNode, values: Mapping[str, Any]) -> nbformat.NotebookNode:
    """A copy in which some of PARAMETERS have other values: text, True, False or None. Comments stay."""
    notebook = copy.deepcopy(notebook)
    cell = parameters_cell(notebook)
    lines = cell.source.splitlines()
    for name, value in values.items():
        old = next(s.value for s in ast.parse(cell.source).body if ast.unparse(s.targets[0]) == name)
        shown = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
        line = lines[old.lineno - 1].encode()  # offsets are in bytes
        line = line[: old.col_offset] + shown.encode() + line[old.end_col_offset :]
        lines[old.lineno - 1] = line.decode()
    cell.source = "\n".join(lines)
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path, timeout: int | None = None) -> nbformat.NotebookNode:
    """Run a copy in `folder` and return it, cleaned.

    timeout: seconds that a cell may take, by default any number. The kernel is this interpreter, with this process's
    environment, and imports jaxedit from this checkout. Raises nbclient's CellExecutionError, which shows the cell and
    its traceback, where one fails.
    """
    notebook = copy.deepcopy(notebook)
    paths = [str(HERE.parent), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
    # no folders of kernels: there "python3" may be another interpreter
    kernels = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(
        notebook,
        km=kernels,
        timeout=timeout,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(cleanup_kc=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))})
    return clean(notebook)


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy without what was written to stderr and without metadata other than tags."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = nbformat.from_dict({})
    return notebook


def refresh(path: Path, values: Mapping[str, Any], requests: Path | None = None) -> None:
    """Execute the notebook `path` with other parameters and replace it. requests: a file that it reads by its name."""
    notebook = with_parameters(read(path), values)
    with tempfile.TemporaryDirectory() as folder:
        if requests is not None:
            shutil.copyfile(requests, Path(folder) / requests.name)
        notebook = execute(notebook, Path(folder))
    write_atomically(path, lambda p: nbformat.write(notebook, p))


def main() -> None:
    parser = argparse.ArgumentParser(description="Run notebooks and write them back as they are committed.")
    parser.add_argument("names", nargs="*", help="how their file names begin; by default all")
    parser.add_argument("--model", help="what to write as MODEL")
    parser.add_argument("--requests", type=Path, help="a file of edits; its name is written as REQUESTS")
    given = parser.parse_args()
    paths = [p for p in sorted(HERE.glob("*.ipynb")) if not given.names or p.name.startswith(tuple(given.names))]
    if not paths:
        parser.error(f"there is no notebook whose name begins with {' or '.join(given.names)}")
    values = {"MODEL": given.model, "REQUESTS": given.requests and given.requests.name}
    for path in paths:
        print(path.name, flush=True)
        refresh(path, {name: value for name, value in values.items() if value}, given.requests)


if __name__ == "__main__":
    main()
