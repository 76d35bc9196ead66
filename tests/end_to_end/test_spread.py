"""`jaxedit spread` on a tiny model; its tables are tested with the study itself."""

import json

import pytest
from helpers_cli import run_command

import jaxedit as je

pytestmark = pytest.mark.usefixtures("own_cache")


def test_spread_prints_tables_and_draws(goldens, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    folder, plot, stats = goldens / "tiny-llama", tmp_path / "spread.png", tmp_path / "moments.safetensors"
    je.second_moments(*tiny("tiny-llama"), None, (2, 3, 4), max_tokens=4000).save(stats)
    arguments = (folder, folder / "edits.json", "--layers", "2-4", "--stats", stats, "--limit", 3, "--directions", 4)
    methods = ("--method", "memit", "--method", "fe")
    document = json.loads(run_command("spread", *arguments, *methods, "--plot", plot, "--json").stdout)
    assert document["layers"] == [2, 3, 4] and document["edits"] == 3 and document["studied"] == "memit"
    assert set(document["walks"]) == {"memit", "fe"} and plot.read_bytes().startswith(b"\x89PNG")
    assert document["premises"]["violations"] == 0 and document["premises"]["pairs"] == 6
