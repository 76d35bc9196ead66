"""Context templates: their form, that they are the model's own text, and what becomes of special tokens."""

import numpy as np
import pytest

from jaxedit.data.templates import WORDS, sample_templates
from jaxedit.data.tokens import check_templates
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.generation import continue_rows
from jaxedit.models.transformer import logits


def test_form(tiny):
    model, tokenizer = tiny("tiny-llama")
    groups = sample_templates(model, tokenizer)
    assert groups == check_templates(groups)
    clean, sampled = groups
    assert clean == ("{}",) and len(sampled) == 5
    for word, text in zip(WORDS, sampled, strict=True):
        assert text.startswith(word) and text.endswith(". {}")
        assert not any(token in text for token in tokenizer.all_special_tokens)


def test_the_seed_decides(tiny):
    model, tokenizer = tiny("tiny-llama")
    assert sample_templates(model, tokenizer, seed=3) == sample_templates(model, tokenizer, seed=3)
    assert sample_templates(model, tokenizer, seed=3) != sample_templates(model, tokenizer, seed=4)


def test_texts_are_sampled_from_the_five_likeliest_tokens(tiny):
    model, tokenizer = tiny("tiny-gptj")
    texts = sample_templates(model, tokenizer, seed=1)[1]
    rows = [tokenizer(word)["input_ids"] for word in WORDS]
    options = {"temperature": 1.0, "top_k": 5, "seed": 1}
    new = continue_rows(model.params, model.config, rows, 10 - min(map(len, rows)), **options)
    full = [(row + more)[:10] for row, more in zip(rows, new, strict=True)]
    assert [tokenizer.decode(ids).strip() + ". {}" for ids in full] == list(texts)
    ranks = np.argsort(-np.asarray(logits(model, full)), -1)[:, :, :5]
    for row, ids, likely in zip(rows, full, ranks, strict=True):
        assert all(ids[i] in likely[i - 1] for i in range(len(row), 10))


def test_number_and_length(tiny):
    model, tokenizer = tiny("tiny-llama")
    assert sample_templates(model, tokenizer, n=0) == (("{}",),)
    assert len(sample_templates(model, tokenizer, n=7)[1]) == 7
    words = sample_templates(model, tokenizer, length=1)[1]
    assert words == tuple(f"{word}. {{}}" for word in WORDS)
    for bad in ({"n": -1}, {"length": 0}, {"length": model.config.max_positions + 1}):
        with pytest.raises(JaxEditError):
            sample_templates(model, tokenizer, **bad)


class Beginning:
    """A tokenizer that puts a beginning-of-text token first and spells everything else with braces."""

    is_fast = False
    eos_token_id = 0
    all_special_tokens = ["<s>"]

    def __call__(self, text, **_):
        return {"input_ids": [1, 7]}

    def decode(self, ids, skip_special_tokens, **_):
        special = [] if skip_special_tokens else ["<s>"] * ids.count(1)
        return "".join(special) + "The {odd}\n\n{}<s>" + "x" * len(ids)


def test_braces_and_special_tokens(tiny):
    model, _ = tiny("tiny-llama")
    plain = sample_templates(model, Beginning(), n=1, length=6)
    assert plain[1] == ("The  odd    xxxxxx. {}",)
    kept = sample_templates(model, Beginning(), n=1, length=6, keep_special_tokens=True)
    assert kept[1][0].startswith("<s>The ") and kept[1][0].count("{}") == 1
