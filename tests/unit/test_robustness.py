"""Robustness: queries in other forms of a subject, and what edits say at them."""

from __future__ import annotations

import json

import pytest
from conftest import load_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxedit.data.queries import HALVES, KINDS, read_rephrases, robust_queries
from jaxedit.data.subject_forms import rephrased_forms
from jaxedit.errors import JaxEditError
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
        assert len({*inside, *outside, *((subject,) if kind != "long" else ())}) == len(inside) + len(outside) + (
            kind != "long"
        )
        assert len(inside) + len(outside) <= n and len(inside) - len(outside) in (0, 1)
        for half in HALVES:
            for text, found in zip(queries[0].texts(kind, half), queries[0].prompts(request, kind, half), strict=True):
                wanted = f"{text} {request.prompt}" if kind == "long" else f"{before} {text} is in"
                assert found.prompt == wanted and found.prompt[found.start : found.end + 1] == found.subject
                assert found.subject == (subject if kind == "long" else text)
                assert "the the " not in wanted.lower() or subject.startswith("The") or "the the" in subject.lower()
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
