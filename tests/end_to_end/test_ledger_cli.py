"""``jaxedit ledger`` on a tiny model: what it writes, prints and returns, also when it is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_cli import run_command, words

import jaxedit.cli.ledger  # noqa: F401  (adds the subcommands)

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("own_cache")
COMMANDS = ("add", "list", "show", "withdraw", "update", "export")


def jaxedit_(*arguments, code=0):
    return run_command("ledger", *arguments, code=code)


def document(*arguments):
    return json.loads(jaxedit_(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def model(goldens):
    return goldens / "tiny-llama"


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Files of four facts, of two others, and of one more, all of the same numbers of tokens."""
    subjects = "HealthCap|Khabarovsk|Crazed Fruit|Flemish Community|Bosco Gurin|Ancient Aliens|Ivan Pavlov".split("|")
    records = [
        {"prompt": f"{s} is headquartered in", "subject": s, "target": target, "target_true": "Stockholm"}
        for s, target in zip(subjects, ("Toronto", "Chicago", "Toronto", "Renault") * 2, strict=False)
    ]
    folder = tmp_path_factory.mktemp("facts")
    for name, some in (("four", records[:4]), ("two", records[4:6]), ("one", records[6:7])):
        (folder / f"{name}.json").write_text(json.dumps(some), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def moments(model, tmp_path_factory):
    import jaxedit as je

    path = tmp_path_factory.mktemp("stats") / "moments.safetensors"
    with np.load(model / "cov.npz") as arrays:
        je.SecondMoments.from_arrays({l: arrays[f"cov_L{l}"] for l in (1, 2, 3)}, 19_200).save(path)
    return path


@pytest.fixture(scope="module")
def options(moments):
    return "--layers", "1,2,3", "--cov-weight", 10, "--stats", moments


@pytest.fixture(scope="module")
def first(model, facts, options, tmp_path_factory):
    """The bytes of a ledger of four edits, and what the command that made it printed."""
    path = tmp_path_factory.mktemp("first") / "facts.ledger"
    printed = document("add", path, model, facts / "four.json", *options)
    return path.read_bytes(), printed


@pytest.fixture
def ledger(first, tmp_path):
    path = tmp_path / "facts.ledger"
    path.write_bytes(first[0])
    return path


def test_add_creates_and_extends(ledger, first, model, facts, options):
    assert first[1]["created"] and first[1]["added"] == ["0", "1", "2", "3"] and first[1]["edits"] == 4
    more = document("add", ledger, model, facts / "two.json", *options)  # the same command with other facts
    assert not more["created"] and more["added"] == ["4", "5"] and more["edits"] == 6
    again = jaxedit_("add", ledger, model, facts / "two.json", code=1)
    assert "request 0 repeats edit 4 of the ledger" in words(again.stderr)


def test_list_and_show_need_no_model(ledger):
    code = (
        "import sys, jaxedit.cli.ledger\nfrom jaxedit.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\nassert 'jax' not in sys.modules"
    )
    for arguments in (("list", ledger), ("show", ledger, "2"), ("withdraw", ledger, "1", "3")):
        done = run_child(code, *arguments, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        if arguments[0] == "list":
            assert found["method"] == "fe" and found["layers"] == [1, 2, 3] and found["dtype"] == "float32"
            assert found["edits"][2] == {
                "id": "2",
                "prompt": "Crazed Fruit is headquartered in",
                "subject": "Crazed Fruit",
                "target": "Toronto",
            }
        elif arguments[0] == "show":
            assert found["request"]["target_true"] == "Stockholm" and found["anchors"]["1"]["updates"] > 0
            assert found["anchors"]["1"]["final_loss"] < found["anchors"]["1"]["first_loss"]
        else:
            assert found["withdrawn"] == ["1", "3"] and found["edits"] == 2
    assert [e["id"] for e in document("list", ledger)["edits"]] == ["0", "2"]


def run_child(code: str, *arguments):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", code, "ledger", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_tables_for_people(ledger):
    listed = jaxedit_("list", ledger).stdout
    assert "4 edits with fe at layers [1, 2, 3]" in listed and "Crazed Fruit is headquartered in" in words(listed)
    shown = jaxedit_("show", ledger, 2).stdout
    assert "target: Toronto" in shown and "anchor at layer 1: loss" in shown
    assert "withdrew 1 edit; 3 remain" in jaxedit_("withdraw", ledger, 2).stdout
    assert "withdrew 3 edits; 0 remain" in jaxedit_("withdraw", ledger, "--all").stdout
    assert "0 edits with fe" in jaxedit_("list", ledger).stdout


def test_export_after_withdrawing_equals_editing_without(ledger, model, facts, options, tmp_path):
    import jaxedit as je

    jaxedit_("withdraw", ledger, 3, 2)
    out = ("--out", tmp_path / "model", "--patch", tmp_path / "facts.jaxedit")
    done = document("export", ledger, model, "--stats", options[-1], *out)
    assert done["edits"] == 2 and len(done["info"]["layers"]) == 3
    without = ("--limit", 2, "--no-eval", "--patch", tmp_path / "reference.jaxedit")
    run_command("edit", model, facts / "four.json", *options, *without)
    ours, theirs = (je.EditPatch.load(tmp_path / f"{name}.jaxedit") for name in ("facts", "reference"))
    assert [r.prompt for r in ours.requests] == [r.prompt for r in theirs.requests]
    for l in (1, 2, 3):
        a, b = ours.deltas[l].dense(), theirs.deltas[l].dense()
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b)  # 25 steps in float32, four edits a step or two
    again = je.load(tmp_path / "model")[0]
    applied = je.apply_patch(je.load(model)[0], ours)
    assert (np.asarray(again.params["blocks"]["down"]["w"]) == np.asarray(applied.params["blocks"]["down"]["w"])).all()


def test_export_of_an_empty_ledger_is_the_base(ledger, model, moments, tmp_path):
    jaxedit_("withdraw", ledger, "--all")
    rest = ("--stats", moments)
    assert "no patch" in words(jaxedit_("export", ledger, model, *rest, "--patch", tmp_path / "p", code=1).stderr)
    jaxedit_("export", ledger, model, *rest, "--out", tmp_path / "model")
    from safetensors.numpy import load_file

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", model))
    assert ours.keys() == theirs.keys() and all(ours[k].tobytes() == theirs[k].tobytes() for k in ours)


def test_update(ledger, model, facts):
    done = document("update", ledger, model, 2, "--target", "Swedish")
    assert done["updated"] == "2" and done["request"]["target"] == "Swedish" and done["edits"] == 4
    one = json.loads((facts / "one.json").read_text(encoding="utf-8"))[0]
    printed = words(jaxedit_("update", ledger, model, 2, "--from", facts / "one.json").stdout)
    assert "edit 2 was: Crazed Fruit is headquartered in Swedish edit 2 is now: " in printed
    assert f"{one['prompt']} {one['target']} Seconds:" in printed
    edits = document("list", ledger)["edits"]
    assert [e["id"] for e in edits] == ["0", "1", "2", "3"]
    assert edits[2]["subject"] == one["subject"] and edits[2]["target"] == one["target"]
    refused = jaxedit_("update", ledger, model, 2, "--from", facts / "two.json", code=1)
    assert "holds 2 requests" in words(refused.stderr)


def test_options_must_be_those_of_the_ledger(ledger, model, facts, moments, tmp_path):
    more = ("add", ledger, model, facts / "two.json")
    for options, named in (
        (("--method", "memit"), "created with --method fe"),
        (("--layers", "1-2"), "created with --layers (1, 2, 3)"),
        (("--cov-weight", 11), "created with --cov-weight 10.0"),
        (("--seed", 4), "created with --seed 0"),
        (("--dtype", "bfloat16"), "created with --dtype float32"),
    ):
        assert named in words(jaxedit_(*more, *options, code=1).stderr)
    export = ("export", ledger, model, "--patch", tmp_path / "p")
    assert "give them as --stats" in words(jaxedit_(*export, code=1).stderr)


def test_usage_errors(ledger, model, tmp_path):
    for arguments in (("withdraw", ledger), ("withdraw", ledger, 1, "--all"), ("export", ledger, model)):
        jaxedit_(*arguments, code=2)
    jaxedit_("update", ledger, model, 1, code=2)
    for arguments in (("list", tmp_path / "none"), ("show", tmp_path / "none", 1), ("withdraw", tmp_path / "none", 1)):
        assert "there is no ledger at" in words(jaxedit_(*arguments, code=1).stderr)
    for arguments in (("show", ledger, 9), ("withdraw", ledger, 1, 9), ("update", ledger, model, 9, "--target", "x")):
        assert "no edits 9 in the ledger; its edits: 0, 1, 2, 3" in words(jaxedit_(*arguments, code=1).stderr)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name):
    text = jaxedit_(name, "--help").stdout
    assert "Example" in text and f"jaxedit ledger {name} " in text


KILLED = """
import os, signal, sys
import jaxedit.cli.ledger, jaxedit.ledger
from jaxedit.cli import app
point, replace, make_targets = sys.argv.pop(), os.replace, jaxedit.ledger.make_targets

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def replace_and_die(source, to):
    if str(to).endswith(".ledger"):
        die()
    replace(source, to)

if point == "anchors":
    jaxedit.ledger.make_targets = lambda *a: (make_targets(*a), die())
else:
    os.replace = replace_and_die
app(sys.argv[1:])
"""


@pytest.mark.parametrize("point", ["anchors", "writing"])
def test_killed_while_adding(ledger, first, model, facts, options, point):
    done = run_child(KILLED, "add", ledger, model, facts / "two.json", *options, point)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert ledger.read_bytes() == first[0]
    more = document("add", ledger, model, facts / "two.json", *options)
    assert more["edits"] == 6 and {f.name for f in ledger.parent.iterdir()} == {ledger.name, f"{ledger.name}.lock"}


HOLDS = """
import sys
from jaxedit.ledger_files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_of_two_processes_is_told(ledger, first, model, facts):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    call = [sys.executable, "-c", HOLDS, str(ledger)]
    process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        for arguments in (
            ("withdraw", ledger, 1),
            ("add", ledger, model, facts / "two.json"),
            ("update", ledger, model, 1, "--target", "Rome"),
        ):
            result = jaxedit_(*arguments, "--json", code=1)
            assert result.stdout == "" and "is being changed by another process" in words(result.stderr)
        assert ledger.read_bytes() == first[0]
        assert len(document("list", ledger)["edits"]) == 4
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert document("withdraw", ledger, 1)["edits"] == 3
