"""Per-token predictions against one row for each prefix, as published, on full logits."""

import dataclasses

import numpy as np
import pytest
from helpers_metrics import row_logits, shaken
from hypothesis import given
from hypothesis import strategies as st

from jaxedit.data.requests import read_requests
from jaxedit.data.tokens import target_ids
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.predictions import _merged, likeliest, predict
from jaxedit.evaluation.zsre import evaluate_zsre
from jaxedit.types import EditRequest

SOME = [
    EditRequest(
        prompt="The mother tongue of Danielle Darrieux is",
        subject="Danielle Darrieux",
        target="English and Chinese",
        paraphrases=("Danielle Darrieux speaks", "The native language of Danielle Darrieux is"),
        neighbourhood=("The mother tongue of Lev Landau is",),
        neighbourhood_answers=("Russian of course",),
    ),
    EditRequest("Max Weber works in the field of", "Max Weber", "chemistry", id="x"),
]


def prefix_rows(model, tokenizer, prompt, answer):
    """The likeliest token at the end of one row for each proper prefix of the answer."""
    head, target = tokenizer(prompt)["input_ids"], target_ids(tokenizer, prompt, answer)
    return [int(row_logits(model, head + target[:i])[-1].argmax()) for i in range(len(target))], target


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_one_pass_is_a_row_for_each_prefix(tiny, name):
    model, tokenizer = tiny(name)
    edited = shaken(model)
    pairs = [(SOME[0].prompt, "English and Chinese"), (SOME[0].prompt, "English"), (SOME[1].prompt, "chemistry")]
    for pair, found in zip(pairs, predict(model, edited, tokenizer, pairs), strict=True):
        for one, side in ((model, found.base), (edited, found.edited)):
            rows, target = prefix_rows(one, tokenizer, *pair)
            np.testing.assert_array_equal(side, rows)
            np.testing.assert_array_equal(found.answer, target)


def test_rows_that_others_begin_with_are_predicted_alike(decoder):
    model = decoder("tiny-gptj")
    long = tuple(np.random.default_rng(0).integers(1, model.config.vocab, 20).tolist())
    rows = [(long[:5], 2), (long, 3), ((7, 8), 1), (long[:5], 4), (long[:20], 15)]
    (together,) = likeliest([model], rows)
    for row, found in zip(rows, together, strict=True):
        np.testing.assert_array_equal(found, row_logits(model, row[0]).argmax(-1)[-row[1] :])


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=5).map(tuple), min_size=1, max_size=12), st.data())
def test_merged_rows_cover_all_and_none_begins_another(texts, data):
    rows = [(ids, data.draw(st.integers(1, len(ids)))) for ids in texts]
    kept, home, _ = _merged(rows)
    for at, (ids, n) in zip(home, rows, strict=True):
        longest, asked = kept[at]
        assert longest[: len(ids)] == ids and 0 <= len(longest) - asked <= len(ids) - n
    for ids, _ in kept:
        assert sum(longest[: len(ids)] == ids for longest, _ in kept) == 1


def test_shares_of_tokens_against_prefix_rows(tiny):
    model, tokenizer = tiny("tiny-gpt2")
    edited = shaken(model, 0.02)
    report = evaluate_zsre(model, edited, tokenizer, SOME)

    def share(one, prompt, answer):
        rows, target = prefix_rows(one, tokenizer, prompt, answer)
        return np.mean(np.equal(rows, target))

    for one, side in ((model, report.base), (edited, report.edited)):
        first = share(one, SOME[0].prompt, SOME[0].target), share(one, SOME[1].prompt, SOME[1].target)
        assert side["efficacy"] == pytest.approx(np.mean(first))
        assert side["paraphrase"] == pytest.approx(
            np.mean([share(one, p, SOME[0].target) for p in SOME[0].paraphrases])
        )
        near = share(one, SOME[0].neighbourhood[0], SOME[0].neighbourhood_answers[0])
        assert side["neighbourhood"] == pytest.approx(near)
        parts = [side[m] for m in ("efficacy", "paraphrase", "neighbourhood")]
        assert side["score"] == pytest.approx(3 / sum(1 / x for x in parts) if all(parts) else 0)
    ours, theirs = (
        prefix_rows(m, tokenizer, SOME[0].neighbourhood[0], "Russian of course")[0] for m in (model, edited)
    )
    assert report.edited["neighbourhood_agreement"] == pytest.approx(np.mean(np.equal(ours, theirs)))
    assert report.base["neighbourhood_agreement"] is None
    assert report.counts == dict(efficacy=2, paraphrase=2, neighbourhood=1, neighbourhood_agreement=1, score=2)
    assert [r.id for r in report.records] == [None, "x"]
    assert "neighbourhood agreement" in report.table()


def test_a_model_agrees_with_itself(tiny, goldens):
    model, tokenizer = tiny("tiny-llama")
    report = evaluate_zsre(model, model, tokenizer, read_requests(goldens / "tiny-llama" / "facts.json")[:4])
    assert report.edited["neighbourhood_agreement"] == 1
    assert {k: v for k, v in report.base.items() if v is not None}.items() <= report.edited.items()


def test_what_cannot_be_evaluated_is_named(tiny):
    model, tokenizer = tiny("tiny-llama")
    with pytest.raises(JaxEditError, match="no requests"):
        evaluate_zsre(model, model, tokenizer, [])
    lacking = dataclasses.replace(SOME[0], neighbourhood_answers=(), id=9)
    with pytest.raises(RequestError, match=r"request 1 \(id 9\)"):
        evaluate_zsre(model, model, tokenizer, [SOME[1], lacking])
    long = EditRequest("word " * 200 + "Rome is", "Rome", "big")
    with pytest.raises(RequestError, match="the model takes 128"):
        evaluate_zsre(model, model, tokenizer, [long])
