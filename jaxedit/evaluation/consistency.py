"""Consistency, also called reference score: does generated text speak of the subject as the new target implies?

As in ROME and MEMIT (Meng et al. 2022, 2023): the cosine of the TF-IDF vectors of what the model says, all texts of a
record joined, and of reference texts about other things that have the new target, joined as well. Needs scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxedit.data.corpus import Corpus, read_corpus
from jaxedit.errors import JaxEditError


def fit_vectoriser(corpus: Corpus = None) -> Any:
    """A scikit-learn TfidfVectorizer with its default settings, fitted on the documents of a corpus (`read_corpus`).

    The published one was fitted on all reference texts of CounterFact, snippets of Wikipedia.
    Raises JaxEditError where scikit-learn is missing or the corpus is empty.
    """
    documents = list(read_corpus(corpus))
    if not documents:
        raise JaxEditError("the corpus is empty; TF-IDF weights need documents")
    return _vectoriser().fit(documents)


def reference_scores(
    texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]], vectoriser: Any = None
) -> np.ndarray:
    """One score ``[n]`` a record, float64 between 0 and 1; their mean is the published reference score.

    texts: what the model said, by record (`Fluency.texts`). references: each record's reference texts.
    vectoriser: from `fit_vectoriser`, needed to compare scores between sets of records; by default one is fitted on the
        references given, each text once, which for all of CounterFact is the published one.
    A text without a word that the vectoriser knows scores 0 (published: not a number).

    Raises JaxEditError where scikit-learn is missing, the lists differ in length, or a record has no reference texts.
    """
    if len(texts) != len(references) or not texts:
        raise JaxEditError(f"texts and references must be lists of one length, got {len(texts)} and {len(references)}")
    missing = [i for i, some in enumerate(references) if isinstance(some, str) or not any(map(str.strip, some))]
    if missing:
        raise JaxEditError(f"records {missing} have no list of reference texts; leave them out")
    if vectoriser is None:
        vectoriser = _vectoriser().fit(list(dict.fromkeys(text for some in references for text in some)))
    ours, theirs = (vectoriser.transform([" ".join(some) for some in side]) for side in (texts, references))
    return np.asarray(ours.multiply(theirs).sum(1), np.float64).ravel()  # rows have norm 1


def _vectoriser():
    try:
        from sklearn.feature_extraction.text import (  # pyright: ignore[reportMissingImports] (an optional extra)
            TfidfVectorizer,
        )
    except ImportError:
        raise JaxEditError("reference scores need the package scikit-learn: pip install 'jaxedit[metrics]'") from None
    return TfidfVectorizer()
