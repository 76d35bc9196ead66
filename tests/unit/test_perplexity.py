"""Perplexity of packed rows against each text by itself on full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_metrics import row_logits, shaken
from hypothesis import given
from hypothesis import strategies as st

from jaxedit.errors import JaxEditError
from jaxedit.evaluation.perplexity import Perplexity, PerplexityProbe, _windows, perplexity

TEXTS = [
    "The mother tongue of Danielle Darrieux is French.",
    "Rome",
    "Max Joseph von Pettenkofer works in the field of chemistry, and so does his brother.",
    "The capital of France is Paris.",
    "I",
]


def nll(model, ids, first=1):
    """Of the tokens from `first` on, float64, by itself."""
    x = row_logits(model, ids)
    x = x - x.max(-1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return -log_p[np.arange(first - 1, len(ids) - 1), ids[first:]].sum()


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_packed_is_alone(tiny, name):
    model, tokenizer = tiny(name)
    probe = PerplexityProbe.of(tokenizer, TEXTS, length=64)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    for one in (model, shaken(model)):
        found = probe.measure(one)
        expected = np.array([nll(one, ids) for ids in rows])
        counts = np.array([len(ids) - 1 for ids in rows])
        np.testing.assert_allclose(found.nll, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.tokens, counts)
        assert found.corpus == pytest.approx(np.exp(expected.sum() / counts.sum()), rel=1e-5)
        known = counts > 0
        assert found.mean == pytest.approx(np.exp(expected[known] / counts[known]).mean(), rel=1e-5)
        assert probe(one) == found.corpus


def test_batches_do_not_matter(tiny):
    model, tokenizer = tiny("tiny-gpt2")
    whole = PerplexityProbe.of(tokenizer, TEXTS * 3, length=32)
    parts = PerplexityProbe.of(tokenizer, TEXTS * 3, length=32, batch_tokens=64)
    assert len(whole.tokens) > 3 and len(whole.tokens) % 2
    np.testing.assert_allclose(whole.measure(model).nll, parts.measure(model).nll, rtol=1e-5)


@pytest.mark.parametrize("stride", [None, 16, 5])
def test_windows_of_long_texts(tiny, stride):
    """What a window has in common with the one before is context only."""
    model, tokenizer = tiny("tiny-llama")
    text = " ".join(TEXTS)
    ids, length = tokenizer(text)["input_ids"], 16
    step, expected, count = stride or length, nll(model, ids[:length]), length - 1
    for start in range(step, len(ids), step):
        first, end = max(1, length - step), start + length
        if start + first < len(ids) and start - step + length < len(ids):
            expected += nll(model, ids[start:end], first)
            count += len(ids[start:end]) - first
    found = perplexity(model, tokenizer, [text], length=length, stride=stride)
    np.testing.assert_allclose(found.nll, [expected], rtol=1e-5)
    assert found.tokens.tolist() == [count]
    assert count == len(ids) - 1 or stride in (None, 16)


@given(st.integers(0, 60), st.integers(2, 12), st.data())
def test_every_token_counts_once(size, length, data):
    stride = data.draw(st.integers(1, length))
    counted = []
    for _, ids, first in _windows(0, list(range(size)), length, stride):
        assert len(ids) <= length and 1 <= first < len(ids)
        counted += ids[first:]
    uncounted = set(range(0, size, length)) if stride == length else {0}
    assert counted == [i for i in range(size) if i not in uncounted]


def test_a_budget_of_tokens_cuts_the_last_text(tiny):
    _, tokenizer = tiny("tiny-llama")
    sizes = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    probe = PerplexityProbe.of(tokenizer, TEXTS, max_tokens=sizes[0] + sizes[1] + 3)
    assert probe.tokens_of.tolist() == [sizes[0] - 1, sizes[1] - 1, 2]
    assert probe.tokens.shape[1] < 512  # no longer than there is text for


def test_a_broken_model_has_infinite_perplexity(tiny):
    model, tokenizer = tiny("tiny-llama")
    probe = PerplexityProbe.of(tokenizer, TEXTS, length=64)
    for value in (np.nan, np.inf):
        broken = model.with_params(jax.tree.map(lambda x, v=value: jnp.full_like(x, v), model.params))
        assert probe(broken) == np.inf == probe.measure(broken).mean
    assert Perplexity(np.array([1e9]), np.array([2])).corpus == np.inf


def test_sizes_that_make_no_sense(tiny):
    model, tokenizer = tiny("tiny-llama")
    for options in ({"length": 1}, {"stride": 0}, {"length": 8, "stride": 9}, {"max_tokens": 1}):
        with pytest.raises(JaxEditError, match="make no sense"):
            PerplexityProbe.of(tokenizer, TEXTS, **options)
    with pytest.raises(JaxEditError, match="no text has two tokens"):
        PerplexityProbe.of(tokenizer, [])
    with pytest.raises(JaxEditError, match="do not fit the model's context of 128"):
        PerplexityProbe.of(tokenizer, TEXTS * 8, length=256)(model)
    with pytest.raises(JaxEditError, match="came without a tokenizer"):
        perplexity(model, None)
