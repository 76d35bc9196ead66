"""The geometry of keys: which prompts look alike to an edited layer (REP, §4 and §5).

An MLP's second projection is a linear memory, ``v = Wᵀk``. The key k of a prompt is the projection's input at the
subject's last token. An edit at key k* moves the value at another key k in proportion to ``kᵀC⁻¹k*``, with C the
second moment of all keys: their whitening similarity. So an edit is heard where this is large, whether or not the
prompt is about its subject.

REP: Yan et al. 2025, "Keys to Robust Edits: from Theoretical Insights to Practical Advances".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.config import Ridge
from jaxedit.data.subject_forms import SubjectPrompt
from jaxedit.data.tokens import encode, token_at
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.batching import MIN_LENGTH, batches, bucket, pad
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import Context, Decoder, Params, embed, layer, mlp_output, run, to_key, window_of
from jaxedit.solvers.blas import quiet_blas
from jaxedit.solvers.factors import Factor, factorise
from jaxedit.solvers.ridge import padded, rows_of
from jaxedit.solvers.triangle import Triangle, backward, forward
from jaxedit.statistics import SecondMoments

_SINGULAR = 1e-10  # singular values of stored keys below this part of the largest are taken to be 0


def subject_keys(
    model: Decoder, tokenizer, prompts: Sequence[Any], layers: Sequence[int], *, batch_tokens: int = 8192
) -> dict[int, np.ndarray]:
    """Keys ``{layer: [n, d_ff]}`` at the last token of the subject of each prompt, float32 (float64).

    prompts: what `SubjectPrompt.of` takes: EditRequests, Facts, (text, subject) pairs. They are cut at the subject's
    end, as nothing after it matters. batch_tokens: tokens, padding included, in one pass.
    Raises JaxEditError where a subject is not in its prompt or a layer not in the model, RequestError naming every
    prompt that is longer than the model's context.
    """
    layers, config = checked_layers(layers, model.config), model.config
    if tokenizer is None:
        raise JaxEditError("this model came without a tokenizer; pass one")
    rows = [subject_tokens(tokenizer, SubjectPrompt.of(p)) for p in prompts]
    limit = config.max_positions
    problems = [
        f"prompt {i} has {len(r)} tokens; the model takes {limit}" for i, r in enumerate(rows) if len(r) > limit
    ]
    if problems:
        raise RequestError(problems)
    unique = list(dict.fromkeys(rows))
    found = np.zeros((len(layers), len(unique), config.d_ff), wide(model.dtype))
    for batch in batches([(bucket(len(r), MIN_LENGTH),) for r in unique], batch_tokens):
        tokens, mask = pad(batch.take(unique), batch.shape[0])
        keys = _last_keys(model.params, config, tokens, mask, layers)
        found[:, batch.index] = np.asarray(keys)[:, : len(batch.index)]
    place = {row: i for i, row in enumerate(unique)}
    order = [place[row] for row in rows]
    return {l: keys[order] for l, keys in zip(layers, found, strict=True)}


def checked_layers(layers: Sequence[int], config: ModelConfig) -> tuple[int, ...]:
    """The layers in rising order. Raises JaxEditError where there are none or the model has not got them."""
    wrong = [l for l in layers if not 0 <= l < config.n_layer]
    if wrong or not len(layers):
        raise JaxEditError(f"layers {list(layers)}: name at least one of 0 … {config.n_layer - 1}")
    return tuple(sorted({int(l) for l in layers}))


def subject_tokens(tokenizer, prompt: SubjectPrompt) -> tuple[int, ...]:
    """The prompt's tokens up to its decisive token, the last one of the subject."""
    ids, offsets = encode(tokenizer, prompt.prompt)
    return tuple(ids[: token_at(tokenizer, prompt.prompt, ids, offsets, prompt.end) + 1])


@partial(jax.jit, static_argnames=("config", "layers"))
def _last_keys(params: Params, config: ModelConfig, tokens, mask, layers: tuple[int, ...]):
    """Keys ``[layers, b, d_ff]`` at each row's last token, of rows ``[b, s]`` padded on the right."""
    context, last = Context.of_mask(mask), layers[-1]
    where = jnp.arange(len(tokens)), mask.sum(-1) - 1
    h = embed(params, config, tokens, context)
    h, seen = run(params, config, h, context, 0, last, probe=lambda inside: inside.key[where])
    _, key, _, _ = to_key(layer(params, last), config, h, context, window_of(config, last))
    return jnp.stack([key[where] if l == last else seen[l] for l in layers]).astype(wide(key.dtype))


def subject_values(model: Decoder, keys: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Values ``{layer: [n, d_model]}``, what each layer's MLP makes of keys ``{layer: [n, d_ff]}``."""
    params = {"blocks": {"down": model.params["blocks"]["down"]}}
    return {l: np.asarray(_values(params, k, l)) for l, k in keys.items()}


@jax.jit
def _values(params, keys, index):
    return mlp_output(layer(params, index), keys)


class ValueNorms(NamedTuple):
    """‖v‖ at the decisive token before and after an edit, ``{layer: [n]}``."""

    before: dict[int, np.ndarray]
    after: dict[int, np.ndarray]


def value_norms(base: Decoder, edited: Decoder, tokenizer, prompts: Sequence[Any], layers: Sequence[int]) -> ValueNorms:
    """How loud the MLPs of `layers` speak at the decisive token, before and after an edit (REP, figure 5).

    Each model's value is of its own key, which at a layer above another edited one has changed too.
    """
    sides = []
    for model in (base, edited):
        values = subject_values(model, subject_keys(model, tokenizer, prompts, layers))
        sides.append({l: np.linalg.norm(v, axis=1) for l, v in values.items()})
    return ValueNorms(*sides)


def whitening(stats: SecondMoments, layers: Sequence[int] | None = None) -> Factor:
    """Cholesky factors ``LLᵀ = C`` of second moments, by default of all their layers.

    C is the mean of ``k kᵀ`` over the tokens of a corpus, so that over these tokens ``kᵀC⁻¹k`` is d_ff on average. The
    numbers of REP (§5.2) are on this scale; with its ``C = KKᵀ``, a sum, they would be smaller by the number of
    tokens, `SecondMoment.count`.
    Raises StatisticsError where there were fewer tokens than d_ff.
    """
    return factorise(Ridge(cov_weight=1.0), stats, tuple(stats.layers if layers is None else layers))


def whiten(factor: Factor, layer: int, keys) -> np.ndarray:
    """``L⁻¹k`` of keys ``[n, d_ff]``, in the factor's precision (float64 but on a TPU): their scalar products are
    whitening similarities, and their second moment over the corpus is the identity."""
    return solved(factor, layer, keys, both_ways=False)


def solved(factor: Factor, layer: int, keys, both_ways: bool) -> np.ndarray:
    """``L⁻¹k`` of keys ``[n, d_ff]``, or both ways ``L⁻ᵀL⁻¹k = C⁻¹k``, in the factor's precision."""
    triangle = factor[layer].triangle
    rows = rows_of(keys, triangle.size, layer)
    with jax.enable_x64(True), quiet_blas(len(rows)):
        return np.asarray(_solved(triangle, padded(rows), both_ways))[: len(rows)]


@partial(jax.jit, static_argnames="both_ways")
def _solved(t: Triangle, rows, both_ways: bool):
    half = forward(t, rows.astype(t.diagonal[0].dtype).T)
    return (backward(t, half) if both_ways else half).T


def key_similarity(factor: Factor, layer: int, keys, others=None) -> np.ndarray:
    """Whitening similarities ``kᵀC⁻¹k'`` ``[n, m]`` of keys ``[n, d_ff]`` with others ``[m, d_ff]``, or each other.

    factor: from `whitening`. (With another factor, of A, it is ``kᵀA⁻¹k'``.) The square root of the diagonal is the
    length of a whitened key; divided by two such lengths a similarity is a cosine.
    """
    a = whiten(factor, layer, keys)
    return a @ (a if others is None else whiten(factor, layer, others)).T


class Retrieval(NamedTuple):
    """weights ``[m, n]``, of n stored keys for m queries; unexplained ``[m]``, ``‖Kα − k‖ / ‖k‖``."""

    weights: np.ndarray
    unexplained: np.ndarray


def retrieval_weights(stored, queries, ridge: float = 0.0) -> Retrieval:
    """With what weights stored keys answer a query: ``α = Kᵀ(KKᵀ + ridge·I)⁻¹k`` (REP, lemma 4.1), in float64.

    stored ``[n, d_ff]``, the columns of K; queries ``[m, d_ff]``. The memory that holds n values at these keys answers
    ``Σ α_i v_i``. The lemma has n ≫ d_ff and keys of full rank. With fewer, KKᵀ has no inverse: the pseudoinverse is
    taken, which gives the α of least squares (the smallest of them where there are many), and what of the query the
    stored keys do not span gets no answer: `unexplained` says how much that is. ridge > 0 is defined for every n and
    does not follow keys that are nearly dependent.
    Raises JaxEditError on shapes that do not fit.
    """
    k, q = (np.atleast_2d(np.asarray(x, np.float64)) for x in (stored, queries))
    if k.ndim != 2 or q.ndim != 2 or k.shape[1] != q.shape[1] or ridge < 0:
        raise JaxEditError(
            f"stored keys {k.shape} and queries {q.shape} must have the same number of channels, and ridge={ridge} "
            "must not be negative"
        )
    u, s, vt = np.linalg.svd(k, full_matrices=False)
    kept = s > _SINGULAR * s.max(initial=0.0)
    gain = np.where(kept, s / np.where(kept, s * s + ridge, 1.0), 0.0)
    weights = ((q @ vt.T) * gain) @ u.T
    size = np.linalg.norm(q, axis=1)
    return Retrieval(weights, np.linalg.norm(weights @ k - q, axis=1) / np.where(size == 0, 1.0, size))
