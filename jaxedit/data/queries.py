"""Queries that an edit should be heard in: its prompt with the subject rephrased or shuffled, and after a long text.

As Yan et al. 2024 ("Keys to Robust Edits: from Theoretical Insights to Practical Advances", appendix B.1) make them:
about ten of each kind, the first half in domain, which may be trained on (without the target), the rest out of it.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxedit.data.corpus import Corpus
from jaxedit.data.subject_forms import SubjectPrompt, rephrased_forms, separate_contexts, shuffled_forms
from jaxedit.errors import JaxEditError
from jaxedit.types import EditRequest

Kind = Literal["rephrase", "shuffle", "long"]
Half = Literal["in_domain", "out_of_domain"]
KINDS: tuple[Kind, ...] = ("rephrase", "shuffle", "long")
HALVES: tuple[Half, ...] = ("in_domain", "out_of_domain")
_ARTICLES = ("the", "a", "an")


@dataclasses.dataclass(frozen=True)
class Halves:
    """Texts of one kind, in domain and out of it; no text is in both."""

    in_domain: tuple[str, ...] = ()
    out_of_domain: tuple[str, ...] = ()

    @classmethod
    def of(cls, texts: Sequence[str]) -> Halves:
        """The first half in domain, the middle one of an odd number with it."""
        middle = -(-len(texts) // 2)
        return cls(tuple(texts[:middle]), tuple(texts[middle:]))


@dataclasses.dataclass(frozen=True)
class RobustQueries:
    """The queries of one request, as plain text.

    rephrase, shuffle: what stands in the subject's place. long: what stands before the prompt. A kind may be empty.
    """

    rephrase: Halves = Halves()
    shuffle: Halves = Halves()
    long: Halves = Halves()

    def texts(self, kind: Kind, half: Half) -> tuple[str, ...]:
        """Subjects, or for "long" the texts before the prompt."""
        return getattr(getattr(self, kind), half)

    def prompts(self, source: Any, kind: Kind, half: Half) -> list[SubjectPrompt]:
        """A prompt about the same subject, given as `SubjectPrompt.of` takes it, in each of these texts."""
        prompt = SubjectPrompt.of(source)
        put = prompt.after if kind == "long" else prompt.with_subject
        return [put(text) for text in self.texts(kind, half)]


def robust_queries(
    tokenizer,
    requests: Sequence[EditRequest],
    *,
    rephrases: Mapping[str, Sequence[str]] | None = None,
    n: int = 10,
    context_tokens: int = 512,
    corpus: Corpus = None,
    seed: int = 0,
) -> list[RobustQueries]:
    """The queries of each request, at most `n` of each kind. They do not depend on the other requests.

    rephrases: other names by subject, of which the first n are taken in their order. None: forms by rules
        (`jaxedit.data.subject_forms.rephrased_forms`) in an order that `seed` draws, without those that do not stand
        well in the prompt: an article after an article, or a possessive before one.
    Shuffled are a subject's tokens (`shuffled_forms`): a subject of one token has none.
    Long contexts are `context_tokens` tokens of `corpus` (see `jaxedit.data.corpus.read_corpus`), which is cut into
        texts that do not overlap; half of them is in domain for every request and half for none.

    Raises JaxEditError where a subject has no rephrases, or the corpus is too short for n contexts of which no half is
    in the other.
    """
    if n < 1 or context_tokens < 1:
        raise JaxEditError(f"n and context_tokens must be at least 1, got {n} and {context_tokens}")
    if rephrases is not None and (missing := sorted({r.subject for r in requests} - set(rephrases))):
        raise JaxEditError(f"there are no rephrases of {len(missing)} subjects, such as {missing[:5]}")
    pieces = separate_contexts(tokenizer, context_tokens, corpus)
    random.Random(f"{seed} contexts").shuffle(pieces)
    pools, most = Halves.of(list(dict.fromkeys(pieces))), -(-n // 2)
    if len(pools.out_of_domain) < n - most or len(pools.in_domain) < most:
        raise JaxEditError(
            f"the corpus has {len(pieces)} texts of {context_tokens} tokens; {n} contexts need {2 * most}"
        )
    made = []
    for request in requests:
        if rephrases is None:
            names = _by_rules(request, seed)
        else:
            given = dict.fromkeys(name.strip() for name in rephrases[request.subject])
            names = [name for name in given if name not in ("", request.subject)]
        draw = random.Random(f"{seed} {request.prompt}")
        inside, outside = draw.sample(pools.in_domain, most), draw.sample(pools.out_of_domain, n - most)
        shuffled = shuffled_forms(tokenizer, request.subject, n, seed)
        long = Halves(tuple(inside), tuple(outside))
        made.append(RobustQueries(Halves.of(names[:n]), Halves.of(shuffled), long))
    return made


def read_rephrases(path) -> dict[str, tuple[str, ...]]:
    """Other names by subject from a JSON file ``{subject: [name, …]}``. Raises JaxEditError on anything else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JaxEditError(f"rephrases {path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise JaxEditError(f"rephrases {path} must be an object {{subject: [name, …]}}, got {type(found).__name__}")
    bad = [s for s, names in found.items() if not isinstance(names, list) or any(not isinstance(x, str) for x in names)]
    if bad:
        raise JaxEditError(f"rephrases {path}: the names of {len(bad)} subjects are not a list of texts: {bad[:5]}")
    return {subject: tuple(names) for subject, names in found.items()}


def _by_rules(request: EditRequest, seed: int) -> list[str]:
    prompt = SubjectPrompt.of(request)
    before, after = prompt.prompt[: prompt.start].split(), prompt.prompt[prompt.end + 1 :]
    forms = rephrased_forms(request.subject)
    if before and before[-1].lower() in _ARTICLES and forms["article"].lower().startswith("the "):
        del forms["article"]
    if after.startswith(("'", "’")):
        del forms["possessive"]
    names = list(dict.fromkeys(forms.values()))
    random.Random(f"{seed} {request.subject}").shuffle(names)
    return names
