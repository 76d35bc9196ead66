"""Unrelated text whose keys are close to those of subjects (REP, §5.2 and figure 4).

A stream of text runs once through the layers up to the one that is asked about. Each block of it is compared with all
subjects at once, and only the closest prefixes so far are kept, so memory does not grow with the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxedit.analysis.keys import checked_layers, solved, subject_keys
from jaxedit.data.corpus import Corpus, Row, pack_documents, read_corpus
from jaxedit.data.subject_forms import SubjectPrompt
from jaxedit.errors import JaxEditError
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import Context, Decoder, Params, embed, layer, run, to_key, window_of
from jaxedit.solvers.factors import Factor
from jaxedit.statistics import rows_a_step

_NONE = -1  # in the place of a token that is not there


class Prefix(NamedTuple):
    """A prefix of some document: its whitening similarity with a subject's key, the text of its last tokens, and of
    the very last one, which is the one that the key is of."""

    similarity: float
    text: str
    token: str


class Best(NamedTuple):
    """The k closest prefixes of n subjects so far: scores ``[n, k]``, falling, and their last tokens
    ``[n, k, window]``, `_NONE` before a document's first."""

    scores: jax.Array
    windows: jax.Array


def nearest_prefixes(
    model: Decoder,
    tokenizer,
    prompts: Sequence[Any],
    layer: int,
    factor: Factor,
    corpus: Corpus = None,
    *,
    k: int = 10,
    max_tokens: int = 1_000_000,
    length: int = 512,
    window: int = 24,
    batch: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[Prefix]]:
    """For each prompt the k prefixes of a corpus whose keys have the largest ``k*ᵀC⁻¹k`` with its own, the closest
    first. Prefixes that end with the prompt's subject are left out.

    prompts: see `jaxedit.analysis.keys.subject_keys`; layer: whose keys. factor: from `whitening`, of the same module.
    corpus: see `jaxedit.data.corpus.read_corpus`; its first `max_tokens` tokens, in rows of `length`, of which every
    token ends a prefix: the document, or the piece of it that fits a row, up to there.
    window: tokens of a prefix that are returned as text. batch: rows a step, by default a few thousand tokens' worth.
    on_progress: told (tokens done, max_tokens).
    Similarities are float32 (float64), ``C⁻¹k*`` in the factor's precision. Fewer than k come out where the corpus is
    smaller.

    Raises JaxEditError where arguments are out of range and where the corpus cannot be read.
    """
    (layer,), config = checked_layers([layer], model.config), model.config
    if k < 1 or window < 1 or not prompts:
        raise JaxEditError(f"k and window must be at least 1 and there must be prompts, got {k}, {window}")
    length = min(length, config.max_positions)
    size = batch or rows_a_step(model.params, length)
    asked = [SubjectPrompt.of(p) for p in prompts]
    keys = subject_keys(model, tokenizer, asked, [layer])[layer]
    queries = solved(factor, layer, keys, both_ways=True).astype(keys.dtype)
    own = _own_tokens(tokenizer, asked)
    n = len(asked)
    best = Best(jnp.full((n, k), -jnp.inf, keys.dtype), jnp.full((n, k, window), _NONE, jnp.int32))
    rows, done = pack_documents(tokenizer, read_corpus(corpus), length, max_tokens), 0
    for block in _blocks(rows, size, length):
        before, best = best, _closer(model.params, config, block, queries, own, best, layer)
        jax.block_until_ready(before)  # no more than two blocks are on the device
        done += int(np.count_nonzero(block[2]))
        if on_progress is not None:
            on_progress(done, max_tokens)
    scores, windows = jax.device_get(best)
    return [
        [_prefix(tokenizer, s, w) for s, w in zip(mine, theirs, strict=True) if np.isfinite(s)]
        for mine, theirs in zip(scores, windows, strict=True)
    ]


def _prefix(tokenizer, similarity, window: np.ndarray) -> Prefix:
    ids = [int(t) for t in window if t != _NONE]
    return Prefix(float(similarity), tokenizer.decode(ids), tokenizer.decode(ids[-1:]))


def _blocks(rows: Iterator[Row], size: int, length: int) -> Iterator[tuple[np.ndarray, ...]]:
    """``(tokens, positions, segments)`` of `size` rows each; the last ones may be all padding."""
    spare = (np.zeros(length, np.int32),) * 3
    while some := list(itertools.islice(rows, size)):
        yield tuple(np.stack(column) for column in zip(*some, *[spare] * (size - len(some)), strict=True))


def _own_tokens(tokenizer, prompts: Sequence[SubjectPrompt]) -> np.ndarray:
    """Each subject's tokens, with and without a space before it, the last one first: ``[2, n, longest]``, filled up
    with `_NONE`."""
    forms = [
        [tokenizer(before + p.subject, add_special_tokens=False)["input_ids"][::-1] for p in prompts]
        for before in ("", " ")
    ]
    ids = np.full((2, len(prompts), max(len(x) for form in forms for x in form)), _NONE, np.int32)
    for f, form in enumerate(forms):
        for i, x in enumerate(form):
            ids[f, i, : len(x)] = x
    return ids


@partial(jax.jit, static_argnames=("config", "index"))
def _closer(params: Params, config: ModelConfig, block, queries, own, best: Best, index: int) -> Best:
    """The closest of those so far and of a block ``(tokens, positions, segments)``, int32 ``[b, s]``.

    queries ``[n, d_ff]``; own: see `_own_tokens`. Of equally close ones the earlier stays.
    """
    tokens, positions, segments = (jnp.asarray(x) for x in block)
    context = Context(positions, segments)
    h = run(params, config, embed(params, config, tokens, context), context, 0, index)
    _, key, _, _ = to_key(layer(params, index), config, h, context, window_of(config, index))
    exact = lax.Precision.HIGHEST
    scores = jnp.einsum("bsf,nf->nbs", key.astype(queries.dtype), queries, precision=exact)
    allowed = (segments > 0) & ~_ends_with(tokens, positions, own)
    scores = jnp.where(allowed, scores, -jnp.inf).reshape(len(queries), -1)
    k, window = best.windows.shape[1:]
    found, at = lax.top_k(scores, min(k, scores.shape[1]))
    back = jnp.arange(window - 1, -1, -1)
    there = jnp.where(positions.reshape(-1)[at][..., None] >= back, at[..., None] - back, -1)
    windows = jnp.where(there >= 0, tokens.reshape(-1)[there], _NONE)
    found, order = lax.top_k(jnp.concatenate([best.scores, found], 1), k)
    windows = jnp.take_along_axis(jnp.concatenate([best.windows, windows], 1), order[..., None], 1)
    return Best(found, windows)


def _ends_with(tokens, positions, own):
    """Boolean ``[n, b, s]``: the prefix that ends here ends with the subject's tokens."""
    ends = False
    for form in own:
        same = jnp.ones((len(form), *tokens.shape), bool)
        for i in range(form.shape[1]):
            wanted = form[:, i][:, None, None]
            matches = (jnp.roll(tokens, i, 1) == wanted) & (positions >= i)
            same &= (wanted == _NONE) | matches
        ends |= same
    return ends
