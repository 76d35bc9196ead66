"""Reference scores against TF-IDF written out."""

import math
import re
import sys
from collections import Counter

import numpy as np
import pytest

from jaxedit.errors import JaxEditError
from jaxedit.evaluation.consistency import fit_vectoriser, reference_scores

CORPUS = ["Rome is an old city in Italy.", "The city of Oslo", "A dog is not a cat; the dog barks", "Italy and Norway"]
TEXTS = [["Rome lies in Italy", "an old city"], ["dogs and a dog"], ["zzz"]]
REFERENCES = [["Rome, the old city of Italy"], ["The dog", "is a cat"], ["Oslo"]]


def needs_sklearn():
    pytest.importorskip("sklearn")


def tfidf(corpus, text):
    """Smoothed: idf = ln((1 + n) / (1 + df)) + 1; words of two letters and more, in small letters; norm 1."""
    documents = [set(re.findall(r"\b\w\w+\b", t.lower())) for t in corpus]
    vocabulary = sorted(set().union(*documents))
    idf = {w: math.log((1 + len(corpus)) / (1 + sum(w in d for d in documents))) + 1 for w in vocabulary}
    counts = Counter(re.findall(r"\b\w\w+\b", text.lower()))
    x = np.array([counts[w] * idf[w] for w in vocabulary])
    return x / (np.linalg.norm(x) or 1)


@pytest.mark.parametrize("fitted", [True, False])
def test_against_tfidf_by_hand(fitted):
    needs_sklearn()
    corpus = CORPUS if fitted else [text for some in REFERENCES for text in some]
    found = reference_scores(TEXTS, REFERENCES, fit_vectoriser(CORPUS) if fitted else None)
    pairs = zip(TEXTS, REFERENCES, strict=True)
    expected = [tfidf(corpus, " ".join(t)) @ tfidf(corpus, " ".join(r)) for t, r in pairs]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found[2] == 0 < found[0] < 1


def test_equal_texts_score_one():
    needs_sklearn()
    np.testing.assert_allclose(reference_scores(REFERENCES, REFERENCES), 1)


def test_what_cannot_be_scored_is_named():
    with pytest.raises(JaxEditError, match="of one length, got 3 and 1"):
        reference_scores(TEXTS, REFERENCES[:1])
    with pytest.raises(JaxEditError, match=r"records \[1, 2\]"):
        reference_scores(TEXTS, [REFERENCES[0], [], ["  "]])


def test_without_sklearn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(JaxEditError, match=r"jaxedit\[metrics\]"):
        reference_scores(TEXTS, REFERENCES)
