"""`jaxedit spread` on a tiny model."""

import json

import pytest
from helpers_cli import run_command

pytestmark = pytest.mark.usefixtures("own_cache")


def test_spread_prints_tables_and_draws(goldens, tmp_path):
    pytest.importorskip("matplotlib")
    folder, plot = goldens / "tiny-llama", tmp_path / "spread.png"
    arguments = (folder, folder / "edits.json", "--layers", "2-4", "--limit", 3, "--directions", 4)
    methods = ("--method", "memit", "--method", "fe")
    document = json.loads(run_command("spread", *arguments, *methods, "--plot", plot, "--json").stdout)
    assert document["layers"] == [2, 3, 4] and document["edits"] == 3 and document["studied"] == "memit"
    assert set(document["walks"]) == {"memit", "fe"} and plot.read_bytes().startswith(b"\x89PNG")
    assert document["premises"]["violations"] == 0 and document["premises"]["pairs"] == 6
    text = run_command("spread", *arguments, "--method", "fe").stdout
    assert "residual that remains" in text and "premises" not in text
