"""Perplexity on text: a sensor for what an edit, or thousands of them, did to the model as a whole.

`PerplexityProbe` tokenises and packs texts once; calling it with a model is then one batch of forward passes, cheap
enough to run after every step of a stream of edits.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxedit.data.corpus import Corpus, read_corpus
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.batching import bucket, chunk
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import Context, Decoder, Params, embed, run, unembed
from jaxedit.sharding import data_shards, mesh_of, over_data, place_rows

_TEXTS_AT_ONCE = 64  # tokenised together


@dataclasses.dataclass(frozen=True, eq=False)
class Perplexity:
    """Of one model. nll: summed negative log-likelihood of each text, nats, float64 ``[n]``; tokens: how many, ``[n]``.

    A text's first token has nothing before it and is not counted. Where a model's numbers are not finite, so that it is
    broken, its perplexity is infinite: a comparison with a limit catches it.
    """

    nll: np.ndarray
    tokens: np.ndarray

    @property
    def corpus(self) -> float:
        """exp of the mean over all tokens: longer texts weigh more."""
        return float(_exp(self.nll.sum() / self.tokens.sum()))

    @property
    def texts(self) -> np.ndarray:
        """The perplexity of each text that has a token to count, in order."""
        known = self.tokens > 0
        return _exp(self.nll[known] / self.tokens[known])

    @property
    def mean(self) -> float:
        """The mean of the texts' perplexities, which ME-PPL reports (Yang et al. 2024, "The Butterfly Effect of Model
        Editing"). One text that the model finds impossible decides it."""
        return float(self.texts.mean())


@dataclasses.dataclass(frozen=True, eq=False)
class PerplexityProbe:
    """Texts, tokenised and packed into rows: int32 ``[n, length]``, segment 0 is padding (`pack_documents`).

    text: which text the *next* token of each place belongs to, -1 where that is not counted. tokens_of: counted tokens
    of each text.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    text: np.ndarray
    tokens_of: np.ndarray
    batch_tokens: int = 8192

    @classmethod
    def of(
        cls,
        tokenizer,
        texts: Corpus = None,
        *,
        max_tokens: int = 100_000,
        length: int = 512,
        stride: int | None = None,
        batch_tokens: int = 8192,
    ) -> PerplexityProbe:
        """Tokenise texts, with the special tokens that the tokenizer adds.

        texts: a list of texts or any other corpus of `read_corpus`; by default the packaged one.
        max_tokens: how much of them to use; the text at which it is reached is cut there.
        length: tokens a row. A longer text is cut into windows of it; each begins `stride` tokens after the one before,
            and what it has in common with that is context only. By default stride = length: windows share nothing, and
            the first token of each is not counted.
        batch_tokens: tokens in one pass of a device.

        Raises JaxEditError where a size makes no sense or there is nothing to count.
        """
        stride = length if stride is None else stride
        if length < 2 or not 1 <= stride <= length or max_tokens < 2 or batch_tokens < 1:
            sizes = f"length {length}, stride {stride}, max_tokens {max_tokens} and batch_tokens {batch_tokens}"
            raise JaxEditError(f"{sizes} make no sense: length and max_tokens start at 2, stride is 1 to length")
        if tokenizer is None:
            raise JaxEditError("this model came without a tokenizer; pass one")
        documents = list(_tokenised(tokenizer, read_corpus(texts), max_tokens))
        windows = [window for i, ids in enumerate(documents) for window in _windows(i, ids, length, stride)]
        if not windows:
            raise JaxEditError("no text has two tokens, so there is nothing to measure; give longer texts")
        packed = _pack(windows, min(length, bucket(sum(len(ids) for _, ids, _ in windows))))
        owner = packed[3]
        return cls(*packed, np.bincount(owner[owner >= 0], minlength=len(documents)), batch_tokens)

    def __call__(self, model: Decoder) -> float:
        """The perplexity over all tokens, `Perplexity.corpus`."""
        return self.measure(model).corpus

    def measure(self, model: Decoder) -> Perplexity:
        """Log-likelihoods are float32 (float64 for float64 models), their sums float64.

        Raises JaxEditError where rows are longer than the model's context.
        """
        n, length = self.tokens.shape
        if length > model.config.max_positions:
            raise JaxEditError(
                f"rows of {length} tokens do not fit the model's context of {model.config.max_positions}"
            )
        params, mesh = model.params, mesh_of(model.params)
        shards = data_shards(mesh)
        parts = -(-n // max(1, self.batch_tokens * shards // length))
        size = -(-n // (parts * shards)) * shards
        rows = self.tokens, self.positions, self.segments
        padded = [np.pad(x, [(0, -n % size), (0, 0)]) for x in rows]  # spare rows are all padding
        queued = []
        for at in range(0, n, size):
            placed = place_rows(tuple(x[at : at + size] for x in padded), mesh)
            queued.append(_next_nll(params, model.config, *placed, mesh))
        nll = np.concatenate(jax.device_get(queued))[:n].astype(np.float64)
        counted = self.text >= 0
        sums = np.bincount(self.text[counted], weights=nll[counted], minlength=len(self.tokens_of))
        return Perplexity(np.where(np.isfinite(sums), sums, np.inf), self.tokens_of)


def perplexity(model: Decoder, tokenizer, texts: Corpus = None, **options) -> Perplexity:
    """The perplexity of a model on texts: `PerplexityProbe.of` with these options, measured once.

    Rows are no longer than the model's context, whatever `length` is.
    """
    options["length"] = min(options.get("length", 512), model.config.max_positions)
    return PerplexityProbe.of(tokenizer, texts, **options).measure(model)


def _exp(x):
    with np.errstate(over="ignore"):
        return np.exp(x)


def _tokenised(tokenizer, texts: Iterator[str], left: int) -> Iterator[list[int]]:
    while some := list(itertools.islice(texts, _TEXTS_AT_ONCE)):
        # `verbose` would log a warning for texts longer than the model's context, which are cut anyway
        for ids in tokenizer(some, return_token_type_ids=False, verbose=False)["input_ids"]:
            yield ids[:left]
            left -= len(ids)
            if left <= 0:
                return


def _windows(text: int, ids: list[int], length: int, stride: int) -> Iterator[tuple[int, list[int], int]]:
    """(text, tokens, first token that counts) of each window that has any to count."""
    for start in range(0, max(1, len(ids) - length + stride), stride):
        first = max(1, length - stride) if start else 1
        if len(ids) - start > first:
            yield text, ids[start : start + length], first


def _pack(windows: list[tuple[int, list[int], int]], length: int):
    """Windows into rows, the longest first, each where there is room: tokens, positions, segments and text."""
    rows: list[list[tuple[int, list[int], int]]] = []
    room: list[int] = []
    for window in sorted(windows, key=lambda w: -len(w[1])):
        at = next((i for i, left in enumerate(room) if left >= len(window[1])), None)
        if at is None:
            at = len(rows)
            rows.append([])
            room.append(length)
        rows[at].append(window)
        room[at] -= len(window[1])
    shape = (len(rows), length)
    tokens, positions, segments, owner = (np.full(shape, fill, np.int32) for fill in (0, 0, 0, -1))
    for i, row in enumerate(rows):
        at = 0
        for number, (text, ids, first) in enumerate(row, 1):
            end = at + len(ids)
            tokens[i, at:end], positions[i, at:end], segments[i, at:end] = ids, np.arange(len(ids)), number
            owner[i, at + first - 1 : end - 1] = text
            at = end
    return tokens, positions, segments, owner


@partial(jax.jit, static_argnames=("config", "mesh"))
def _next_nll(params: Params, config: ModelConfig, tokens, positions, segments, mesh: Mesh | None = None):
    """Rows ``[b, s]`` to the negative log-likelihood ``[b, s]`` of the token behind each place; at the last it means
    nothing."""

    def one(row):
        logits = unembed(params, config, row[0])
        return jax.nn.logsumexp(logits) - logits[row[1]]

    def share(params, tokens, positions, segments):
        context = Context(positions, segments)
        h = run(params, config, embed(params, config, tokens, context), context, 0, config.n_layer)
        rows = h.reshape(-1, h.shape[-1]), jnp.roll(tokens, -1, 1).reshape(-1)
        return lax.map(one, rows, batch_size=chunk(len(rows[0]))).reshape(tokens.shape)

    return over_data(share, mesh)(params, tokens, positions, segments)
