"""The command line on a tiny model: what it writes, prints and returns."""

import json
import subprocess
import sys

import pytest
from helpers_cli import run_command as jaxedit
from helpers_cli import words

COMMANDS = (
    *("demo", "edit", "eval", "stats", "generate", "export"),
    *("perplexity", "benchmark", "fluency", "lora", "merge", "ledger", "locate"),
)
pytestmark = pytest.mark.usefixtures("own_cache")
WEAK = ("--layers", "1,2,3", "--cov-weight", 10)  # the usual weight is too much for keys of 192 channels
PROMPT = "The mother tongue of Danielle Darrieux is"


@pytest.fixture(scope="module")
def model(goldens):
    return goldens / "tiny-llama"


@pytest.fixture(scope="module")
def facts(model):
    return model / "facts.json"


@pytest.fixture(scope="module")
def moments(model, tmp_path_factory):
    """Second moments made by `jaxedit stats`, and what it printed."""
    path = tmp_path_factory.mktemp("stats") / "moments.safetensors"
    result = jaxedit("stats", model, "--layers", "1-3", "--max-tokens", 4000, "--length", 128, "--out", path, "--json")
    return path, json.loads(result.stdout)


@pytest.fixture(scope="module")
def edited(model, facts, moments, tmp_path_factory):
    """The folder with a model and a patch made by `jaxedit edit`, and what it printed."""
    to = tmp_path_factory.mktemp("edited")
    result = jaxedit(
        *("edit", model, facts, *WEAK, "--limit", 4, "--stats", moments[0], "--json"),
        *("--out", to / "model", "--patch", to / "facts.jaxedit"),
    )
    return to, json.loads(result.stdout)


def test_stats_writes_moments(moments):
    import jaxedit as je

    path, document = moments
    assert document["layers"] == [1, 2, 3] and document["tokens"] == 4000
    assert je.SecondMoments.load(path).layers == (1, 2, 3)


def test_stats_of_a_corpus_file(model, facts, tmp_path):
    records = json.loads(facts.read_text(encoding="utf-8"))
    corpus, to = tmp_path / "corpus.txt", tmp_path / "m.safetensors"
    corpus.write_text("\n\n".join(p for r in records for p in r["neighborhood_prompts"]), encoding="utf-8")
    result = jaxedit("stats", model, corpus, "--layers", 1, "--max-tokens", 300, "--mesh", "data=1", "--out", to)
    assert to.exists() and "300 tokens" in result.stdout


def test_edit_writes_model_and_patch(edited):
    import jaxedit as je

    to, document = edited
    assert document["edits"] == 4 and document["info"]["method"] == "fe"
    assert [l["layer"] for l in document["info"]["layers"]] == [1, 2, 3]
    assert document["report"]["edited"]["efficacy_success"] == 1.0
    assert document["saved"] == {"model": str(to / "model"), "patch": str(to / "facts.jaxedit")}
    assert (to / "model" / "config.json").exists()
    assert len(je.EditPatch.load(to / "facts.jaxedit").requests) == 4


def test_edit_prints_tables_and_says_what_is_not_saved(model, facts, moments):
    result = jaxedit("edit", model, facts, *WEAK, "--limit", 4, "--stats", moments[0])
    for text in ("4 edits with fe", "residual before", "efficacy success", "Seconds:"):
        assert text in result.stdout
    assert "nothing was saved" in result.stderr


def test_eval_of_patch_and_of_directory_agree(model, facts, edited):
    by_patch = json.loads(jaxedit("eval", model, edited[0] / "facts.jaxedit", facts, "--limit", 4, "--json").stdout)
    by_model = json.loads(jaxedit("eval", model, edited[0] / "model", facts, "--limit", 4, "--json").stdout)
    assert by_patch["report"] == by_model["report"]
    assert len(by_patch["report"]["records"]) == 4
    assert by_patch["report"]["edited"] == edited[1]["report"]["edited"]


def test_eval_prints_the_table_with_generation(model, facts, edited):
    result = jaxedit("eval", model, edited[0] / "facts.jaxedit", facts, "--limit", 2, "--generate")
    assert "efficacy generation accuracy" in result.stdout and "KL(base || edited)" in result.stdout


def test_generate_with_and_without_the_patch(model, facts, edited):
    import jaxedit as je

    prompt = je.read_requests(facts)[0].prompt
    rest = ("--max-new-tokens", 4, "--json")
    plain = json.loads(jaxedit("generate", model, prompt, PROMPT, *rest).stdout)
    patched = json.loads(jaxedit("generate", model, prompt, "--patch", edited[0] / "facts.jaxedit", *rest).stdout)
    saved = json.loads(jaxedit("generate", edited[0] / "model", prompt, *rest).stdout)
    assert [row["prompt"] for row in plain] == [prompt, PROMPT]
    assert patched == saved != plain[:1]


def test_generate_prints_texts_only(model):
    sampled = ("--temperature", 1, "--top-k", 5, "--seed", 3, "--max-new-tokens", 4)
    first, second = (jaxedit("generate", model, PROMPT, *sampled).stdout for _ in range(2))
    assert first == second and first.startswith(PROMPT)


def test_export_gives_the_edited_model(model, edited, tmp_path):
    jaxedit("export", model, "--patch", edited[0] / "facts.jaxedit", "--out", tmp_path / "out")
    ours, theirs = (d / "model.safetensors" for d in (tmp_path / "out", edited[0] / "model"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name):
    text = jaxedit(name, "--help").stdout
    assert "Example" in text and f"jaxedit {name} " in text


def test_version():
    assert jaxedit("--version").stdout.startswith("jaxedit")


def test_missing_files_are_named(model, facts, tmp_path):
    nowhere = tmp_path / "no-such-file.jsonl"
    for arguments in (
        ("edit", model, nowhere),
        ("edit", nowhere, facts),
        ("edit", model, facts, "--stats", nowhere),
        ("generate", model, PROMPT, "--patch", nowhere),
        ("stats", model, nowhere, "--layers", 1, "--out", tmp_path / "m.safetensors"),
    ):
        result = jaxedit(*arguments, "--json" if arguments[0] == "edit" else "--dtype=float32", code=1)
        assert result.stdout == "" and "no-such-file.jsonl" in result.stderr.replace("\n", "")
        assert "Traceback" not in result.stderr


def test_layers_that_do_not_exist(model, facts, moments):
    result = jaxedit("edit", model, facts, "--layers", 99, "--stats", moments[0], code=1)
    assert "[99] are out of range" in words(result.stderr)


def test_a_model_without_preset_needs_layers(model, facts):
    assert "pass layers=" in words(jaxedit("edit", model, facts, code=1).stderr)


@pytest.mark.parametrize("options", [("--layers", "a,b"), ("--layers", "5-3-1"), ("--dtype", "int8"), ("--limit", 0)])
def test_usage_errors(model, facts, options):
    assert options[0] in jaxedit("edit", model, facts, *options, code=2).stderr


def test_a_foreign_directory_is_refused_before_any_work(model, facts, tmp_path):
    (tmp_path / "precious.txt").write_text("keep me", encoding="utf-8")
    result = jaxedit("edit", model, facts, "--layers", 1, "--out", tmp_path, code=1)
    assert "not a saved model" in words(result.stderr) and len(list(tmp_path.iterdir())) == 1


def test_malformed_records(model, moments, facts, tmp_path):
    source = tmp_path / "facts.json"
    good = json.loads(facts.read_text(encoding="utf-8"))[:4]
    source.write_text(json.dumps([*good, {"prompt": "x", "subject": "y"}]), encoding="utf-8")
    rest = (*WEAK, "--stats", moments[0], "--no-eval", "--json")
    assert "record 4" in jaxedit("edit", model, source, *rest, code=1).stderr
    result = jaxedit("edit", model, source, *rest, "--skip-malformed")
    assert json.loads(result.stdout)["edits"] == 4 and "skipped 1 malformed" in words(result.stderr)


def test_interruption_and_unexpected_errors(model, monkeypatch):
    import jaxedit as je

    def raising(error):
        def generate(*_, **__):
            raise error

        return generate

    monkeypatch.setattr(je, "generate", raising(KeyboardInterrupt()))
    assert "interrupted" in jaxedit("generate", model, PROMPT, code=130).stderr
    monkeypatch.setattr(je, "generate", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        jaxedit("generate", model, PROMPT)


def test_as_a_process(model):
    """stdout holds the document alone, whatever transformers and JAX say at import."""
    call = [sys.executable, "-c", "from jaxedit.cli import main; main()"]
    done = subprocess.run(
        [*call, "generate", str(model), PROMPT, "--max-new-tokens", "2", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0 and json.loads(done.stdout)[0]["prompt"] == PROMPT
    assert "PyTorch" not in done.stderr
    done = subprocess.run([*call, "edit", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""


def test_packaged_facts_are_complete():
    from importlib.resources import files

    import jaxedit as je
    from jaxedit.cli.demo import shown_prompts

    requests = je.read_requests(files("jaxedit") / "data" / "packaged" / "demo.jsonl")
    assert len(requests) == 8 and all(len(shown_prompts(r)) == 4 for r in requests)
    assert all(r.target_true and len(r.paraphrases) == 2 and len(r.neighbourhood) == 3 for r in requests)
