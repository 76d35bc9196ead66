"""Notebooks run on a tiny model, and what is committed is what a run gives."""

import importlib.util
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE = re.compile(r"""(?:^|[\s"'(=`])(?:/[\w.~-]+){2,}|\b[A-Za-z]:\\""", re.MULTILINE)
MOST_BYTES = 700_000
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
pytestmark = pytest.mark.usefixtures("own_cache")


def _script():
    spec = importlib.util.spec_from_file_location("refresh_notebooks", ROOT / "notebooks" / "refresh.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


refresh = _script()


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows: printed text, tables, pictures."""
    return [sorted(o.data) if "data" in o else [o.output_type] for o in cell.outputs]


def texts(cell):
    """The source of a cell and all text that it shows, but not its pictures."""
    yield cell.source
    for output in cell.get("outputs", ()):
        yield output.get("text", "")
        yield from (str(x) for kind, x in output.get("data", {}).items() if not kind.startswith("image/"))


@each
def test_runs_on_a_tiny_model(path, goldens, tmp_path):
    model, committed = goldens / "tiny-llama", refresh.read(path)
    values = {"MODEL": str(model), "REQUESTS": str(model / "facts.json"), "QUICK": True}
    ran = refresh.execute(refresh.with_parameters(committed, values), tmp_path, timeout=300)
    assert [kinds(c) for c in code(ran)] == [kinds(c) for c in code(committed)], "refresh the committed outputs"


@each
def test_committed_outputs_are_of_one_clean_run(path):
    notebook = refresh.read(path)
    assert path.stat().st_size < MOST_BYTES
    assert [c.execution_count for c in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert {o.output_type for c in code(notebook) for o in c.outputs} <= {"stream", "display_data", "execute_result"}
    assert all(o.get("name", "stdout") == "stdout" for c in code(notebook) for o in c.outputs)
    assert [found for c in notebook.cells for text in texts(c) for found in ABSOLUTE.findall(text)] == []
    assert notebook == refresh.clean(notebook), "it has metadata; refresh it"
    settings = {}
    exec(refresh.parameters_cell(notebook).source, settings)
    assert settings["MODEL"] == "smollm2-135m" and settings["QUICK"] is False


def made(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    return nbformat.v4.new_notebook(cells=cells)


def test_a_failing_cell_fails_the_run_with_its_error(tmp_path):
    notebook = made(
        "MODEL = 1", "import os, sys, jaxedit\nraise KeyError(sys.executable, jaxedit.__file__, os.getcwd())"
    )
    with pytest.raises(CellExecutionError) as caught:
        refresh.execute(notebook, tmp_path)
    assert repr(KeyError(sys.executable, str(ROOT / "jaxedit" / "__init__.py"), str(tmp_path)))[8:] in str(caught.value)


def test_parameters_are_replaced_and_comments_stay():
    notebook = made("MODEL = 'é'  # é\nREQUESTS = None  # None\nQUICK = False")
    changed = refresh.with_parameters(notebook, {"MODEL": 'ü"\\', "QUICK": True})
    assert changed.cells[0].source == 'MODEL = "ü\\"\\\\"  # é\nREQUESTS = None  # None\nQUICK = True'
    assert notebook.cells[0].source.startswith("MODEL = 'é'")


@pytest.mark.parametrize("source", ["MODEL = 1", "MODEL = 'a'\nQUICK = False\nREQUESTS = None", "print(1)"])
def test_a_parameters_cell_sets_the_three_names(source):
    with pytest.raises(ValueError, match="does not set MODEL, REQUESTS, QUICK"):
        refresh.with_parameters(made(source), {})


def test_refresh_replaces_a_notebook_whole_or_not_at_all(tmp_path):
    path, requests = tmp_path / "one.ipynb", tmp_path / "facts.json"
    requests.write_text("[]", encoding="utf-8")
    show = "import sys\nprint(open(REQUESTS).read(), file=sys.stderr)\nMODEL"
    nbformat.write(made("MODEL = 'a'\nREQUESTS = None\nQUICK = False", show), path)
    refresh.refresh(path, {"REQUESTS": "facts.json"}, requests)
    cells = code(refresh.read(path))
    assert cells[0].source == "MODEL = 'a'\nREQUESTS = \"facts.json\"\nQUICK = False"
    assert [(o.output_type, o.data) for o in cells[1].outputs] == [("execute_result", {"text/plain": "'a'"})]
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="FileNotFoundError"):
        refresh.refresh(path, {"REQUESTS": "other.json"}, requests)
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == [requests, path]
