"""The options --mesh, --coordinator, --processes and --process-id."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import jaxedit as je
from jaxedit.cli import app
from jaxedit.errors import JaxEditError
from jaxedit.sharding import make_mesh, parse_mesh

LLAMA = Path(__file__).resolve().parents[1] / "goldens" / "tiny-llama"
TOKENS = ("--layers", "1", "--max-tokens", "600", "--length", "64")


def test_meshes_are_read():
    assert parse_mesh("data=4,model=2") == {"data": 4, "model": 2}
    assert parse_mesh(" model = 2 ") == {"data": 1, "model": 2}


@pytest.mark.parametrize("text", ["", "4", "data=0", "data=4,data=2", "rows=4", "data=-1", "data=4;model=2", "data=x"])
def test_other_meshes_are_refused(text):
    with pytest.raises(JaxEditError, match="data=4,model=2"):
        parse_mesh(text)


def test_a_mesh_that_does_not_fit():
    with pytest.raises(JaxEditError, match="at least 1"):
        make_mesh(0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mesh", "4x2"), "write the number of devices on each axis as data=4,model=2"),
        (("--mesh", "data=64"), "needs 64 devices; "),
        (("--coordinator", "localhost:1"), "also need --processes N and --process-id I"),
        (("--processes", "2", "--process-id", "0"), "also need --coordinator HOST:PORT"),
    ],
)
def test_wrong_options_say_what_is_right(options, message, tmp_path):
    result = CliRunner().invoke(app, ["stats", str(LLAMA), *TOKENS, "--out", str(tmp_path / "m"), *options])
    assert result.exit_code == 1 and message in " ".join(result.stderr.split())
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", 2, 0), "host:port"),
        (("host:99999", 2, 0), "host:port"),
        (("host:1234", 2, 2), "process 2 of 2"),
    ],
)
def test_processes_that_cannot_be(arguments, message):
    from jaxedit.distributed import connect

    with pytest.raises(JaxEditError, match=message):
        connect(*arguments)


def test_two_processes_write_one_result(start_processes, finish, tiny, tmp_path):
    """Process 0 alone prints and writes; stdout holds the document and nothing else."""
    to = tmp_path / "m.safetensors"
    arguments = ("stats", LLAMA, *TOKENS, "--out", to, "--json")
    processes = start_processes(2, 2, "jaxedit_command.py", *arguments, JAXEDIT_CACHE=str(tmp_path / "two"))
    document = json.loads(finish(*processes))
    assert document["tokens"] == 600 and document["out"] == str(to)
    expected = je.second_moments(*tiny("tiny-llama"), None, (1,), max_tokens=600, length=64, cache=False)[1].matrix
    found = je.SecondMoments.load(to)[1].matrix
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)
