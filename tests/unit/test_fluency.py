"""Entropy of n-grams by hand, and generated texts of the right length."""

import math

import pytest
from helpers_metrics import row_logits
from hypothesis import given
from hypothesis import strategies as st

from jaxedit.data.counterfact import read_counterfact, read_references
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.fluency import _continued, fluency, ngram_entropy, words
from jaxedit.evaluation.generation import generate


@pytest.mark.parametrize(
    "text, two, three",
    [
        ("a b a b", -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3)), 1),  # ab ba ab; aba bab
        ("a a a a a", 0, 0),
        ("one two three four five", 2, math.log2(3)),
        ("x y", 0, 0),
        ("x", 0, 0),
        ("", 0, 0),
    ],
)
def test_entropy_by_hand(text, two, three):
    assert ngram_entropy(text) == pytest.approx((2 / 3 * two + 4 / 3 * three) / 2, abs=1e-12)


@given(st.lists(st.sampled_from("abcd"), min_size=3, max_size=40))
def test_entropy_is_bounded_and_blind_to_names(letters):
    h = ngram_entropy(" ".join(letters))
    n = len(letters)
    assert 0 <= h <= math.log2(n - 1) / 3 + 2 * math.log2(n - 2) / 3 + 1e-12
    assert ngram_entropy(" ".join(x.upper() + "x" for x in letters)) == pytest.approx(h, abs=1e-12)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Hello, world!", ["Hello", ",", "world", "!"]),
        ("It's Anna's; don't.", ["It", "'s", "Anna", "'s", ";", "do", "n't", "."]),
        ("a well-known 3.14 of 1,000...", ["a", "well-known", "3.14", "of", "1,000", "..."]),
        ('"Café" (né)', ['"', "Café", '"', "(", "né", ")"]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


PROMPTS = [["The mother tongue of", "I"], ["Max Joseph von Pettenkofer works in the field of"]]


def test_texts_are_prompt_and_continuation(tiny):
    """With one token to choose from, sampling is greedy."""
    model, tokenizer = tiny("tiny-llama")
    found = fluency(model, tokenizer, PROMPTS, length=24, top_k=1)
    assert [len(some) for some in found.texts] == [2, 1]
    for some, texts in zip(PROMPTS, found.texts, strict=True):
        for prompt, text in zip(some, texts, strict=True):
            steps = 24 - len(tokenizer(prompt)["input_ids"])
            assert text == generate(model, tokenizer, [prompt], steps)[0]
    by_hand = [[ngram_entropy(text) for text in texts] for texts in found.texts]
    assert found.entropy == pytest.approx([sum(by_hand[0]) / 2, by_hand[1][0]])
    assert found.mean == pytest.approx(found.entropy.mean())


def test_the_seed_decides(tiny):
    model, tokenizer = tiny("tiny-gpt2")
    one, same, other = (fluency(model, tokenizer, PROMPTS, length=20, seed=s).texts for s in (0, 0, 1))
    assert one == same != other
    assert all(t.startswith(p) for ps, ts in zip(PROMPTS, one, strict=True) for p, t in zip(ps, ts, strict=True))


def test_long_prompts_get_what_room_there_is(decoder):
    """A short row is continued by many steps, for which a long one has no room, and a longer one needs none."""
    model = decoder("tiny-llama")
    rows = [[5, 6, 7], [8] * 60, [9] * 122]
    out = _continued(model, rows, 120, 1, 0)
    assert [len(row) for row in out] == [120, 120, 122]
    for row, full in zip(rows, out, strict=True):
        greedy = row_logits(model, full, 128).argmax(-1)
        assert full == row + greedy[len(row) - 1 : -1].tolist()


@pytest.mark.parametrize("prompts", [[], ["a text"], [["a"], []]])
def test_prompts_are_lists_by_record(tiny, prompts):
    with pytest.raises(JaxEditError, match="one list of texts for each record"):
        fluency(*tiny("tiny-llama"), prompts)


def test_generation_prompts_and_references_are_read():
    targets = {"target_new": {"str": "Rome", "id": "Q220"}, "target_true": {"str": "Oslo", "id": "Q585"}}
    rewrite = {"prompt": "{} is in", "subject": "It", "relation_id": "P17", **targets}
    record = {"case_id": 1, "requested_rewrite": rewrite, "generation_prompts": ["Near It are", "It has"]}
    (read,) = read_counterfact([record])
    assert (read.generation_prompts, read.relation, read.target_id) == (("Near It are", "It has"), "P17", "Q220")
    with pytest.raises(RequestError, match="record 0: .*no generation prompts"):
        read_counterfact([record | {"generation_prompts": []}])
    snippets = {"relation_id": "P17", "target_id": "Q220", "samples": [{"name": "x", "text": "Rome is old."}]}
    assert read_references([snippets, snippets]) == {("P17", "Q220"): ("Rome is old.",) * 2}
    with pytest.raises(RequestError, match="record 0"):
        read_references([{"relation_id": "P17"}])
