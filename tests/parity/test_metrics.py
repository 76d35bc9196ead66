"""`evaluate` against the numbers of MEMIT's published evaluation code (float64) on trained tiny models."""

import json

import numpy as np
import pytest

from jaxedit.data.requests import read_requests
from jaxedit.evaluation.metrics import evaluate

MODELS = ("tiny-llama", "tiny-gpt2", "tiny-gptj")
PUBLISHED = {"efficacy": "rewrite", "paraphrase": "paraphrase", "neighbourhood": "neighborhood"}


def with_deltas(model, path, tag):
    """The model with the published updates, stored (out, in), added to its ``[d_ff, d_model]`` matrices."""
    params = model.params
    down = params["blocks"]["down"]
    w = np.array(down["w"])
    with np.load(path) as deltas:
        for name in deltas.files:
            if name.startswith(f"{tag}/delta_L"):
                w[int(name.rpartition("L")[2])] += deltas[name].T.astype(w.dtype)
    blocks = params["blocks"] | {"down": down | {"w": w}}
    return model.with_params(params | {"blocks": blocks})


def compare(records, summary, side, published):
    for record, row in zip(records, published["rows"], strict=True):
        for kind, name in PUBLISHED.items():
            scores = [getattr(p, side) for p in record.prompts if p.kind == kind]
            ours = [(s.nll_new, s.nll_true) for s in scores]
            theirs = [(x["target_new"], x["target_true"]) for x in row[f"{name}_prompts_probs"]]
            np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
            hits = [s.correct_true if kind == "neighbourhood" else s.correct_new for s in scores]
            assert hits == row[f"{name}_prompts_correct"]
    for name, value in published["summary"].items():
        assert summary[name.replace("neighborhood", "neighbourhood")] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("name", MODELS)
def test_base_and_edited_match_the_published_code(tiny, goldens, name):
    model, tokenizer = tiny(name)
    published = json.loads((goldens / name / "metrics.json").read_text())
    requests = read_requests(goldens / name / "facts.json")[:8]
    for tag in ("memit", "fe"):
        edited = with_deltas(model, goldens / name / "deltas_memit_fe.npz", tag)
        report = evaluate(model, edited, tokenizer, requests)
        compare(report.records, report.base, "base", published["base"])
        compare(report.records, report.edited, "edited", published[tag])


def test_generation_agrees_with_teacher_forcing(tiny, goldens):
    """Every token of a target is the likeliest one exactly where greedy generation spells the target."""
    model, tokenizer = tiny("tiny-llama")
    edited = with_deltas(model, goldens / "tiny-llama" / "deltas_memit_fe.npz", "fe")
    requests = read_requests(goldens / "tiny-llama" / "facts.json")[:12]
    report = evaluate(model, edited, tokenizer, requests, generate=True)
    for summary in (report.base, report.edited):
        for kind in ("efficacy", "paraphrase"):
            assert summary[f"{kind}_generation_accuracy"] == summary[f"{kind}_accuracy"]
    assert 0.5 < report.edited["efficacy_generation_accuracy"] < 1
