"""Editors that add parameters, from the command line."""

import json

import pytest
from helpers_cli import run_command, words


@pytest.fixture(scope="module")
def model(goldens):
    return goldens / "tiny-llama"


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    path = tmp_path_factory.mktemp("facts") / "facts.json"
    records = [
        {"prompt": f"{s} is headquartered in", "subject": s, "target": target, "target_true": "Stockholm"}
        for s, target in (("HealthCap", "Toronto"), ("Khabarovsk", "Chicago"), ("Crazed Fruit", "Renault"))
    ]
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_edit_and_measure(model, facts, tmp_path):
    patch = tmp_path / "facts.jaxedit"
    settings = ("--set", "alpha=1.0", "--set", "theta=0.9", "--set", "gate=hard")
    made = run_command("edit", model, facts, "--method", "ireva", *settings, "--patch", patch, "--json")
    document = json.loads(made.stdout)
    assert document["info"]["method"] == "ireva" and len(document["info"]["trace"]["rows"]) == 3
    again = json.loads(run_command("eval", model, patch, facts, "--json").stdout)
    assert again["report"]["edited"] == document["report"]["edited"]
    said = run_command(
        "generate", model, "HealthCap is headquartered in", "--patch", patch, "--max-new-tokens", 4
    ).stdout
    assert "Toronto" in said
    text = run_command("edit", model, facts, "--method", "ireva", "--no-eval").stdout
    assert "3 edits with ireva" in text and "residual" not in text


def test_a_ledger(model, facts, tmp_path):
    ledger, patch = tmp_path / "facts.ledger", tmp_path / "facts.jaxedit"
    run_command("ledger", "add", ledger, model, facts, "--method", "cache", "--set", "radius=1.5")
    assert "3 edits with cache" in run_command("ledger", "list", ledger).stdout
    run_command("ledger", "withdraw", ledger, "1")
    done = json.loads(run_command("ledger", "export", ledger, model, "--patch", patch, "--json").stdout)
    assert done["edits"] == 2
    from jaxedit import EditPatch

    (cache,) = EditPatch.load(patch).adapters
    assert set(cache.owner.tolist()) - {-1} == {0, 2} and float(cache.radius) == 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "ireva", "--out", "edited"), "use --patch"),
        (("--method", "ireva", "--set", "alpha"), "expected name=value"),
        (("--method", "ireva", "--set", "beta=1"), "unknown fields ['beta']"),
        (("--method", "ireva", "--set", "gate=soft"), "gate"),
        (("--method", "ireva", "--cov-weight", "1"), "has no such weight"),
        (("--method", "fe", "--layers", "1-2", "--set", "alpha=1"), "--set is for editors"),
        (("--method", "irevas"), "did you mean 'ireva'"),
    ],
)
def test_what_cannot_be(model, facts, options, message):
    assert message in words(run_command("edit", model, facts, *options, code=1).stderr)
