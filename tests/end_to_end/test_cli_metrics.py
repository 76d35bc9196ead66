"""The measuring commands on a tiny model: they print what the library finds."""

import json

import pytest
from helpers_cli import run_command

from jaxedit.evaluation.perplexity import perplexity

FACT = {
    "prompt": "The mother tongue of Danielle Darrieux is",
    "subject": "Danielle Darrieux",
    "target": "English",
    "neighbourhood": ["The mother tongue of Lev Landau is"],
    "neighbourhood_answers": ["Russian"],
}


def jaxedit_json(*arguments):
    return json.loads(run_command(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")

    def to(name, value):
        (folder / name).write_text(json.dumps(value))
        return folder / name

    return to


def test_perplexity(tiny, goldens, write):
    model = goldens / "tiny-llama"
    texts = ["Danielle Darrieux speaks French.", "The capital of France is Paris."]
    found = jaxedit_json("perplexity", model, write("texts.json", texts), "--edited", model, "--length", 32)
    expected = perplexity(*tiny("tiny-llama"), texts, length=32)
    assert found["perplexity"]["base"] == found["perplexity"]["edited"]
    assert found["perplexity"]["base"] == pytest.approx({"corpus": expected.corpus, "mean": expected.mean}, rel=1e-6)
    assert (found["texts"], found["tokens"]) == (2, expected.tokens.sum())


def test_benchmarks(goldens, write):
    model = goldens / "tiny-llama"
    found = jaxedit_json("benchmark", "zsre", model, model, write("zsre.json", [FACT]))
    assert found["report"]["edited"]["neighbourhood_agreement"] == 1
    knowedit = {
        **{key: FACT[key] for key in ("prompt", "subject")},
        "target_new": "English",
        "portability": {"Reasoning": [{"prompt": "Danielle Darrieux's parents speak", "ground_truth": "English"}]},
        "locality": {"Forgetfulness": [{"prompt": "Lev Landau speaks", "ground_truth": ["Russian"]}]},
    }
    found = jaxedit_json("benchmark", "knowedit", model, model, write("knowedit.json", [knowedit]))
    assert found["report"]["edited"]["locality"] == 1
    mquake = {
        "requested_rewrite": [{"prompt": "{} speaks", "subject": "Lev Landau", "target_new": {"str": "English"}}],
        "questions": ["What does the author speak?"],
        "answer": "Russian",
        "new_answer": "English",
    }
    question = write("question.txt", None)
    question.write_text("Q: Where is Rome? A: Italy\nQ: {} A:\n")
    arguments = (write("mquake.json", [mquake]), "--question", question, "--max-new-tokens", 3)
    found = jaxedit_json("benchmark", "mquake", model, model, *arguments)
    asked = [m["prompt"] for m in found["report"]["records"][0]["measured"]]
    assert "Q: Where is Rome? A: Italy\nQ: What does the author speak? A:" in asked


def test_fluency_and_consistency(goldens, write):
    model = goldens / "tiny-llama"
    targets = {"target_new": {"str": "Rome", "id": "Q220"}, "target_true": {"str": "Oslo", "id": "Q585"}}
    rewrite = {"prompt": "{} is in", "subject": "Lev Landau", "relation_id": "P17", **targets}
    records = write("counterfact.json", [{"requested_rewrite": rewrite, "generation_prompts": ["Lev Landau is"]}])
    found = jaxedit_json("fluency", model, model, records, "--length", 20)
    assert found["base"] == found["edited"] and found["base"]["fluency"] > 1
    pytest.importorskip("sklearn")
    snippets = [{"relation_id": "P17", "target_id": "Q220", "samples": [{"text": "Lev Landau is old."}]}]
    arguments = (records, "--length", 20, "--references", write("snippets.json", snippets))
    assert 0 < jaxedit_json("fluency", model, model, *arguments)["edited"]["consistency"] <= 1
