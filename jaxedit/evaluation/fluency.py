"""Fluency: the entropy of the n-grams of generated text, which falls where an edited model repeats itself.

As in ROME and MEMIT (Meng et al. 2022, 2023): prompts are continued to 100 tokens by sampling from the 5 likeliest
tokens, and the entropy is that of the prompt and its continuation together.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxedit.data.tokens import encode
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.generation import continue_rows
from jaxedit.models.transformer import Decoder

_WORDS = re.compile(
    r"\w+?(?=n['’]t\b)|n['’]t\b|['’](?:s|m|d|re|ve|ll)\b|\.{3}|\w+(?:[-.,/]\w+)*|[^\w\s]", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True, eq=False)
class Fluency:
    """`texts`: prompt and continuation, by record; `entropy` ``[n]``: mean of each record's texts, in bits."""

    texts: tuple[tuple[str, ...], ...]
    entropy: np.ndarray

    @property
    def mean(self) -> float:
        """Mean over records in bits; papers print it times 100."""
        return float(self.entropy.mean())


def fluency(
    model: Decoder,
    tokenizer,
    prompts: Sequence[Sequence[str]],
    *,
    length: int = 100,
    top_k: int = 5,
    seed: int = 0,
) -> Fluency:
    """Continue each record's generation prompts (`prompts`: a list of texts a record) and measure the texts.

    length: tokens of a text, prompt included; a longer prompt is measured as it stands. As published, an end-of-text
    token ends nothing; it is left out of the text. Texts are Unicode-normalised (NFKD). The same seed gives the same
    texts on the same device.
    For `jaxedit.evaluation.consistency`, use the result's `texts`.

    Raises JaxEditError where there are no prompts, or a text does not fit the model's context.
    """
    if tokenizer is None:
        raise JaxEditError("this model came without a tokenizer; pass one")
    if any(isinstance(some, str) for some in prompts) or not all(prompts) or not prompts:
        raise JaxEditError("prompts must be one list of texts for each record, none of them empty")
    rows = [encode(tokenizer, prompt)[0] for some in prompts for prompt in some]
    ids = _continued(model, rows, length, top_k, seed)
    decoded = iter(_text(tokenizer, row) for row in ids)
    texts = tuple(tuple(next(decoded) for _ in some) for some in prompts)
    return Fluency(texts, np.array([np.mean([ngram_entropy(text) for text in some]) for some in texts]))


def ngram_entropy(text: str) -> float:
    """``(2/3 H₂ + 4/3 H₃) / 2``, where Hₙ is the entropy in bits of the frequencies of the text's n-grams of words.

    The published code takes the *mean* of the two weighted entropies, hence the half: the weights are 1/3 and 2/3.
    A text without n-grams has entropy 0. Words are `words`.
    """
    found = words(text)
    return (2 / 3 * _entropy(found, 2) + 4 / 3 * _entropy(found, 3)) / 2


def words(text: str) -> list[str]:
    """Words and punctuation marks by a regular expression: hyphenated words, numbers and abbreviations stay whole, and
    contractions are cut as in "do|n't" and "it|'s".

    Published code uses nltk, which also keeps the full stop of an abbreviation and tells opening from closing quotation
    marks. On paragraphs of Wikipedia (75 words) one word in a hundred differs, and entropies of 6.3 bits by 0.005.
    """
    return _WORDS.findall(text)


def _entropy(tokens: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    p = np.array(list(counts.values()), np.float64) / max(1, counts.total())
    return float(-(p * np.log2(p)).sum()) + 0.0


def _continued(model: Decoder, rows: Sequence[list[int]], length: int, top_k: int, seed: int) -> list[list[int]]:
    """Rows continued to `length` tokens: all by as many steps and then cut, but those that leave no room for that."""
    steps = max(0, length - min(map(len, rows)))
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        fits = len(row) + steps <= model.config.max_positions
        groups.setdefault(steps if fits else max(0, length - len(row)), []).append(i)
    out: list[list[int]] = [[] for _ in rows]
    for n, index in groups.items():
        some = [rows[i] for i in index]
        new = continue_rows(model.params, model.config, some, n, temperature=1.0, top_k=top_k, seed=seed)
        for i, row, more in zip(index, some, new, strict=True):
            out[i] = (row + more)[: max(length, len(row))]
    return out


def _text(tokenizer, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ")
