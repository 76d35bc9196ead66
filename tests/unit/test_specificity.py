"""Specificity and the report against numpy on full logits."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers_metrics import shaken
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxedit.data.requests import read_requests
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.batching import pad
from jaxedit.evaluation.metrics import evaluate
from jaxedit.evaluation.report import harmonic_mean
from jaxedit.evaluation.specificity import divergence, specificity
from jaxedit.models.transformer import logits
from jaxedit.types import EditRequest


def padded_logits(model, ids):
    """Logits of one row at its real positions; one shape, so that it is compiled once."""
    tokens, mask = pad([ids], 40)
    return logits(model, tokens, mask)[0, : len(ids)]


def oracle(base, edited, tokenizer, prompt):
    """D_KL(base || edited) and overlaps at the last token, in float64 from full logits."""
    ids = tokenizer(prompt)["input_ids"]
    x, y = (np.asarray(padded_logits(m, ids)[-1], np.float64) for m in (base, edited))
    p, q = (z - z.max() - np.log(np.exp(z - z.max()).sum()) for z in (x, y))
    tops = [len(set(np.argsort(-x)[:k]) & set(np.argsort(-y)[:k])) / k for k in (1, 5, 10)]
    return (np.exp(p) * (p - q)).sum(), *tops


@pytest.fixture(scope="module")
def facts(goldens):
    return read_requests(goldens / "tiny-gpt2" / "facts.json")


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-gptj"])
def test_against_full_logits(tiny, facts, name):
    model, tokenizer = tiny(name)
    edited = shaken(model)
    prompts = [p for r in facts[:6] for p in r.neighbourhood]
    found = specificity(model, edited, tokenizer, prompts)
    expected = np.array([oracle(model, edited, tokenizer, p) for p in prompts])
    np.testing.assert_allclose(found.kl, expected[:, 0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.overlap, expected[:, 1:], atol=1e-6)
    assert expected[:, 0].mean() > 0.01 and expected[:, 3].min() < 1
    report = evaluate(model, edited, tokenizer, facts[:6])
    assert report.specificity == pytest.approx(found.summary(), rel=1e-3)


def test_a_model_and_itself(tiny, facts):
    model, tokenizer = tiny("tiny-gpt2")
    report = evaluate(model, model, tokenizer, facts[:6])
    assert report.specificity == {"kl": 0.0, "top1": 1.0, "top5": 1.0, "top10": 1.0}
    assert report.base == report.edited
    assert all(p.base == p.edited for r in report.records for p in r.prompts)


@given(st.integers(0, 2**31), st.floats(0.01, 20))
@settings(max_examples=20, deadline=None)
def test_divergence_is_not_negative_and_vanishes_at_equality(decoder, seed, scale):
    model = decoder("tiny-gpt2")
    h = np.random.default_rng(seed).normal(size=(2, 4, model.config.d_model)).astype(np.float32) * scale
    kl, overlap = divergence(model.params, model.params, model.config, h[0], h[1])
    same_kl, same = divergence(model.params, model.params, model.config, h[0], h[0])
    assert (kl > -1e-5).all() and (overlap >= 0).all() and (overlap <= 1).all()
    assert (same_kl == 0).all() and (same == 1).all()


def test_likelihoods_against_full_logits(tiny, facts):
    """Teacher forcing over the joined text, in several batches."""
    model, tokenizer = tiny("tiny-gpt2")
    report = evaluate(model, model, tokenizer, facts[:10], batch_tokens=400, max_neighbours=1)
    assert [len([p for p in r.prompts if p.kind == "neighbourhood"]) for r in report.records] == [1] * 10
    for p in (p for r in report.records for p in r.prompts[:2]):
        head, tail = tokenizer(p.prompt)["input_ids"], tokenizer(" " + p.target_new)["input_ids"]
        out = np.asarray(padded_logits(model, head + tail)[len(head) - 1 : -1])
        expected = -np.asarray(jax.nn.log_softmax(out))[np.arange(len(tail)), tail].mean()
        assert p.base.nll_new == pytest.approx(float(expected), abs=1e-4)
        assert len(out) == len(tail)
        assert p.base.correct_new == bool((out.argmax(-1) == np.array(tail)).all())


def test_report_without_true_targets(tiny, facts):
    model, tokenizer = tiny("tiny-gpt2")
    bare = [dataclasses.replace(r, target_true=None) for r in facts[:3]]
    report = evaluate(model, model, tokenizer, bare, generate=True)
    assert report.base["efficacy_success"] is report.base["score"] is report.base["neighbourhood_accuracy"] is None
    assert report.base["efficacy_accuracy"] == report.base["efficacy_generation_accuracy"] == 0
    assert report.counts["efficacy_success"] == 0 and report.counts["efficacy_accuracy"] == 3
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["records"][0]["prompts"][0]["base"]["nll_true"] is None
    lines = report.table().splitlines()
    assert lines[0].split() == ["base", "edited", "prompts"] and "KL(base || edited)" in report.table()


def test_neighbourhood_answers_are_the_true_targets_there(tiny, facts):
    model, tokenizer = tiny("tiny-gpt2")
    one = facts[0]
    answers = ("sociology", *(one.target_true,) * (len(one.neighbourhood) - 1))
    report = evaluate(model, model, tokenizer, [dataclasses.replace(one, neighbourhood_answers=answers)])
    near = [p for p in report.records[0].prompts if p.kind == "neighbourhood"]
    assert [p.target_true for p in near] == list(answers)
    assert [p.base.correct_true for p in near] == [False, True, True]
    wrong = dataclasses.replace(one, neighbourhood_answers=("one",))
    with pytest.raises(RequestError, match="neighbourhood_answers"):
        evaluate(model, model, tokenizer, [wrong])


def test_records_without_such_prompts_are_left_out(tiny, facts):
    model, tokenizer = tiny("tiny-gpt2")
    bare = dataclasses.replace(facts[1], paraphrases=(), neighbourhood=())
    both, alone = (evaluate(model, model, tokenizer, r) for r in ([facts[0], bare], [facts[0]]))
    assert both.base["paraphrase_magnitude"] == pytest.approx(alone.base["paraphrase_magnitude"])
    assert both.specificity == alone.specificity
    none = evaluate(model, model, tokenizer, [bare])
    assert none.specificity["kl"] is None and none.base["score"] is None


def test_errors(tiny, facts):
    model, tokenizer = tiny("tiny-gpt2")
    with pytest.raises(JaxEditError, match="no requests"):
        evaluate(model, model, tokenizer, [])
    with pytest.raises(JaxEditError, match="different architectures"):
        evaluate(model, tiny("tiny-llama")[0], tokenizer, facts)
    with pytest.raises(JaxEditError, match="tokenizer"):
        evaluate(model, model, None, facts)
    with pytest.raises(JaxEditError, match="Decoder"):
        evaluate(model, model.params, tokenizer, facts)
    long = EditRequest("word " * model.config.max_positions + "Paris", "Paris", "Rome", id="long one")
    with pytest.raises(RequestError, match="request 1 .id long one.") as caught:
        evaluate(model, model, tokenizer, [facts[0], long])
    assert len(caught.value.problems) == 1
    with pytest.raises(RequestError, match="takes 1 to"):
        specificity(model, model, tokenizer, [long.prompt])


def test_harmonic_mean():
    assert harmonic_mean([1.0, 0.5, 0.5]) == pytest.approx(0.6)
    assert harmonic_mean([1.0, 0.0, 1.0]) == 0
    assert harmonic_mean([1.0, None, 0.0]) is None
