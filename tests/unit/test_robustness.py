"""Robustness: queries in other forms of a subject, and what edits say at them."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import load_tiny
from helpers_adapters import logits, prompts_of, same_bits, with_adapters
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxedit as je
from jaxedit.adapters.apart import Apart
from jaxedit.adapters.rows import NOTHING
from jaxedit.data.queries import HALVES, KINDS, read_rephrases, robust_queries
from jaxedit.data.subject_forms import rephrased_forms
from jaxedit.errors import JaxEditError
from jaxedit.export.patch import Delta, apply_patch, make_patch
from jaxedit.types import EditRequest

CORPUS = [" ".join(f"word{i} number {i * i}," for i in range(400))]
WORDS = st.sampled_from(["Ada", "Lovelace", "of", "Zoë", "Smith-Jones", "&", "and", "The", "(band)", "iPod", "Oslo,"])


def made(subject: str, before: str = "The home of", after: str = "is in") -> EditRequest:
    return EditRequest(f"{before} {subject} {after}", subject, "Oslo")


@settings(max_examples=40, deadline=None)
@given(
    subject=st.lists(WORDS, min_size=1, max_size=4).map(" ".join),
    before=st.sampled_from(["The home of", "See the", "A"]),
    n=st.integers(1, 7),
    seed=st.integers(0, 3),
)
def test_queries(subject, before, n, seed):
    """Halves are disjoint, the first is the larger by at most one, and every prompt holds its form and nothing else."""
    tokenizer, request = load_tiny("tiny-llama")[1], made(subject, before)
    other = made("Paul of Tarsus")
    queries = robust_queries(tokenizer, [request, other], n=n, context_tokens=8, corpus=CORPUS, seed=seed)
    assert queries[0] == robust_queries(tokenizer, [request], n=n, context_tokens=8, corpus=CORPUS, seed=seed)[0]
    for kind in KINDS:
        inside, outside = (queries[0].texts(kind, half) for half in HALVES)
        assert len({*inside, *outside}) == len([*inside, *outside])
        assert kind == "long" or subject not in (*inside, *outside)
        assert len(inside) + len(outside) <= n and len(inside) - len(outside) in (0, 1)
        for half in HALVES:
            for text, found in zip(queries[0].texts(kind, half), queries[0].prompts(request, kind, half), strict=True):
                wanted = f"{text} {request.prompt}" if kind == "long" else f"{before} {text} is in"
                assert found.prompt == wanted and found.prompt[found.start : found.end + 1] == found.subject
                assert found.subject == (subject if kind == "long" else text)
                if kind == "rephrase" and before == "See the" and not subject.startswith("The"):
                    assert not text.startswith("the ")
                if kind == "shuffle":
                    assert sorted(text.replace(" ", "")) == sorted(subject.replace(" ", ""))
    assert sum(len(queries[0].texts("long", half)) for half in HALVES) == n
    used = [{x for q in queries for x in q.texts("long", half)} for half in HALVES]
    assert not used[0] & used[1]


def test_forms():
    assert rephrased_forms("Ada Lovelace") == {
        "possessive": "Ada Lovelace's",
        "article": "the Ada Lovelace",
        "initials": "A. Lovelace",
        "title": "Dr. Ada Lovelace",
        "last name": "Lovelace",
        "last name first": "Lovelace, Ada",
        "first name": "Ada L.",
        "professor": "Professor Ada Lovelace",
        "quoted": '"Ada Lovelace"',
        "capitals": "ADA LOVELACE",
        "lower case": "ada lovelace",
    }
    assert rephrased_forms("Universidad Autónoma de Madrid")["abbreviation"] == "UAM"
    found = rephrased_forms("Zoë & the Smith-Joneses (band)")
    assert (found["and"], found["spaced"]) == ("Zoë and the Smith-Joneses (band)", "Zoë & the Smith Joneses (band)")
    assert (found["plain"], found["short"]) == ("Zoe & the Smith-Joneses (band)", "Zoë & the Smith-Joneses")
    assert rephrased_forms("iPod").keys() == {"possessive", "article", "quoted", "capitals", "lower case"}


def test_given_rephrases(tiny, tmp_path):
    tokenizer = tiny("tiny-llama")[1]
    request = EditRequest("Ada Lovelace's husband is in", "Ada Lovelace", "Oslo")
    (path := tmp_path / "names.json").write_text(
        json.dumps({"Ada Lovelace": ["Ada", "Ada ", "", "Ada Lovelace", "AL"]})
    )
    names = read_rephrases(path)
    queries = robust_queries(tokenizer, [request], rephrases=names, n=4, context_tokens=8, corpus=CORPUS)[0]
    assert queries.texts("rephrase", "in_domain") == ("Ada",) and queries.texts("rephrase", "out_of_domain") == ("AL",)
    ruled = robust_queries(tokenizer, [request], n=20, context_tokens=8, corpus=CORPUS)[0].rephrase
    assert "Ada Lovelace's" not in (*ruled.in_domain, *ruled.out_of_domain) and len(ruled.in_domain) == 5
    with pytest.raises(JaxEditError, match="no rephrases of 1 subjects.*Paul"):
        robust_queries(tokenizer, [made("Paul")], rephrases=names, context_tokens=8, corpus=CORPUS)
    with pytest.raises(JaxEditError, match="10 contexts need 10"):
        robust_queries(tokenizer, [request], context_tokens=800, corpus=CORPUS)
    for text in ("[1]", '{"Ada": "Countess"}', "{"):
        path.write_text(text)
        with pytest.raises(JaxEditError, match="rephrases"):
            read_rephrases(path)


EDITS = 3


@pytest.fixture(scope="module")
def alone(goldens):
    """A float64 tiny-llama, edits of it that were each made alone, and all of them apart in one model."""
    with jax.enable_x64(True):
        model, tokenizer = je.load(goldens / "tiny-llama", dtype="float64")
        requests = je.read_requests(goldens / "tiny-llama" / "facts.json")[:EDITS]
        rng, patches = np.random.default_rng(0), []
        weights = model.params["blocks"]["down"]["w"]
        for i, request in enumerate(requests):
            rank, layers = 1 + i % 2, (1, 2)[i % 2 :]
            deltas = {
                l: Delta(rng.normal(size=(weights.shape[1], rank)), rng.normal(size=(rank, weights.shape[2])) * 0.1)
                for l in layers
            }
            patches.append(make_patch({}, [request], {l: np.asarray(weights[l]) for l in layers}, deltas)[0])
        yield model, tokenizer, requests, patches


def test_apart_equals_models_edited_alone(alone):
    """Every row of one batch says what the model with its edit alone does."""
    model, tokenizer, requests, patches = alone
    rows, ends = prompts_of(tokenizer, [*requests, *requests[:2]])
    own = [0, 1, 2, 2, NOTHING]
    apart = Apart.of(patches)
    assert apart.left.shape[:2] == (EDITS, 2) and apart.left.shape[-1] == 2
    found = logits(with_adapters(model, apart.for_rows(own)), rows, ends)
    models = {i: apply_patch(model, patch) for i, patch in enumerate(patches)} | {NOTHING: model}
    for row, end, i, out in zip(rows, ends, own, found, strict=True):
        (wanted,) = logits(models[i], [row], [end], max(map(len, rows)))
        np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-11)
        assert i == NOTHING or np.abs(out - logits(model, [row], [end])[0]).max() > 1e-3
    others = logits(with_adapters(model, apart.for_rows([NOTHING] * len(rows))), rows, ends)
    assert same_bits(
        others, logits(with_adapters(model, Apart.of(patches[:1]).for_rows([NOTHING] * len(rows))), rows, ends)
    )
    with pytest.raises(JaxEditError, match="for_rows"):
        logits(with_adapters(model, apart), rows, ends)
    dense = dataclasses.replace(patches[0], deltas={1: Delta(patches[0].deltas[1].dense())})
    with pytest.raises(JaxEditError, match="patch 1 .* layers .1. are not in factors"):
        Apart.of([patches[0], dense])
    with pytest.raises(JaxEditError, match="no updates"):
        Apart.of([])
