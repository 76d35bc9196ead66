"""`jaxedit locate` on tiny models: what it writes, and that the settings it suggests edit as well as the default."""

import json

import pytest
from helpers_cli import run_command

import jaxedit as je
import jaxedit.cli.locate  # noqa: F401  (adds the command)
from jaxedit.analysis.record import Trace
from jaxedit.analysis.suggest import read_preset, suggest_layers

pytestmark = pytest.mark.usefixtures("own_cache")
SMALL = ("--max-facts", 3, "--samples", 2, "--limit", 3, "--max-tokens", 4000, "--lr", 0.5, "--cov-weight", 10)


def locate(*arguments, code=0):
    return run_command("locate", *arguments, code=code)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_locate_writes_trace_plot_and_preset(goldens, tiny, tmp_path, name):
    pytest.importorskip("matplotlib")
    facts, to = goldens / name / "facts.json", tmp_path / "out"
    document = json.loads(
        locate(goldens / name, "--facts", facts, "--requests", facts, "--out", to, *SMALL, "--json").stdout
    )
    assert sorted(f.name for f in to.iterdir()) == ["preset.json", "trace.json", "trace.npz", "trace.png"]
    assert document["saved"] == [str(to / f) for f in ("trace.npz", "trace.json", "trace.png", "preset.json")]
    assert (to / "trace.png").read_bytes().startswith(b"\x89PNG")

    found = Trace.load(to / "trace.npz")
    assert len(found.facts) == 3 and tuple(document["layers"]) == suggest_layers(found)
    assert json.loads((to / "trace.json").read_text())["layers"] == document["layers"]

    model, tokenizer = tiny(name)
    method = read_preset(to / "preset.json", model)
    tried = document["validation"]["settings"]
    assert [s["default"] for s in tried] == [True, False] and method.layers == tuple(document["preset"]["layers"])
    requests = je.read_requests(facts)[:3]
    stats = je.second_moments(model, tokenizer, None, method.layers, max_tokens=4000)

    def score(method):
        edited = je.apply_edits(model, tokenizer, requests, method, stats=stats).model
        return je.evaluate(model, edited, tokenizer, requests).edited["score"]

    suggested, shipped = score(method), score(je.method_for("fe", model.config, method.layers))
    assert suggested is not None and shipped is not None and suggested >= shipped
    assert suggested == pytest.approx(document["validation"]["best"]["score"])


def test_locate_without_tuning_prints_tables(goldens, tmp_path):
    """A second call may write over the first one's files, but not into a directory of something else."""
    facts, to = goldens / "tiny-gpt2" / "facts.json", tmp_path / "out"
    for _ in range(2):
        result = locate(
            *(goldens / "tiny-gpt2", "--facts", facts, "--out", to, "--count", 2, "--no-tune"),
            *("--max-facts", 3, "--samples", 2),
        )
    for text in ("3 facts known", "MLP, last subject token", "suggested layers: ", "preset.json"):
        assert text in result.stdout
    assert len(read_preset(to / "preset.json").layers) == 2
    (to / "notes.txt").write_text("mine", encoding="utf-8")
    assert "choose another directory" in locate(goldens / "tiny-gpt2", "--out", to, code=1).stderr


def test_help_has_an_example():
    assert "jaxedit locate smollm2-135m" in locate("--help").stdout
