"""Jacobians between layers at the decisive token: what a small change in one layer becomes in a later one (Liu et al.
2026, "From Backward Spreading to Forward Replay", §4.1, eq. 7).

A `Stretch` is that map for n prompts, on a model as it is, base or edited. It can be followed (`passive`), multiplied
with (`push`, `pull`), or written out (`jacobian`); `jaxedit.analysis.krylov` finds eigenvalues of either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.data.tokens import chunks, pack, prompt_row
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.models.config import ModelConfig
from jaxedit.models.sites import refuse_adapters
from jaxedit.models.stretch import Stretch, batched, between, make_stretch
from jaxedit.models.transformer import Context, Decoder, Params, embed, layer, run, to_key, window_of
from jaxedit.types import EditRequest

SITES = ("block_out", "mlp_out")
MEMORY = 1 << 29  # bytes of tangents that a chunk of columns may take


def stretch(
    model: Decoder,
    tokenizer,
    requests: Sequence[EditRequest],
    source: int,
    target: int,
    *,
    site: str = "block_out",
    to: str | None = None,
) -> Stretch:
    """The layers from `source` to `target` as a function of the decisive token of each request's prompt.

    site: what is added to in layer `source`, "block_out" (the layer's output, where MEMIT's and FE's targets are) or
    "mlp_out" (its MLP's). to: what is looked at in layer `target`, by default the same. With `target` the same layer
    and the same sites the map is the identity.

    Raises JaxEditError on layers and sites that are not there, RequestError on prompts that do not fit the model.
    """
    refuse_adapters(model, "take its Jacobians")
    to = site if to is None else to
    _check(model.config, source, target, site, to)
    if not requests:
        raise JaxEditError("there are no prompts")
    if tokenizer is None:
        raise JaxEditError("this model came without a tokenizer; pass one")
    rows = [prompt_row(tokenizer, r) for r in requests]
    most = model.config.max_positions
    long = [f"request {i}: its prompt has {len(r.tokens)} tokens" for i, r in enumerate(rows) if r.lookup >= most]
    if long:
        raise RequestError([f"{text}; the model takes {most}" for text in long])
    packed = pack([(row,) for row in rows], until_lookup=True)
    parts = [
        _enter(model.params, model.config, *part, source, target, site, to)
        for part in chunks(packed.as_tuple(), packed.tokens.shape[1])
    ]
    return _join(parts, len(requests))


def _check(config: ModelConfig, source: int, target: int, site: str, to: str):
    if not 0 <= source <= target < config.n_layer:
        raise JaxEditError(
            f"layers {source} to {target} are no stretch of a model with layers 0 to {config.n_layer - 1}: "
            "the source must not lie above the target"
        )
    for given in (site, to):
        if given not in SITES:
            raise JaxEditError(f"a site must be one of {', '.join(map(repr, SITES))}; got {given!r}")
    if source == target and (site, to) == ("block_out", "mlp_out"):
        raise JaxEditError("a layer's MLP output is made before its block output: nothing reaches it from there")


@partial(jax.jit, static_argnames=("config", "source", "target", "site", "to"))
def _enter(
    params: Params, config: ModelConfig, tokens, positions, segments, lookup, source: int, target: int, site, to
):
    context = Context(positions, segments)
    h = run(params, config, embed(params, config, tokens, context), context, 0, source)
    stream, key, _, _ = to_key(layer(params, source), config, h, context, window_of(config, source))
    band = {"blocks": jax.tree.map(lambda x: x[source : target + 1], params["blocks"])}
    return make_stretch(band, between(config, source, target), stream, key, context, lookup[:, 0], site, to)


def _join(parts: Sequence[Stretch], n: int) -> Stretch:
    """Parts of one shape as one stretch of n prompts."""

    def joined(*xs, axis=0):
        return jnp.concatenate(xs, axis)[(slice(None),) * axis + (slice(n),)]

    def together(pick, axis=0):
        return jax.tree.map(partial(joined, axis=axis), *(pick(p) for p in parts))

    first = parts[0]
    past = dataclasses.replace(
        first.past,
        k=together(lambda p: p.past.k, 1),
        v=together(lambda p: p.past.v, 1),
        context=together(lambda p: p.past.context),
    )
    return dataclasses.replace(
        first,
        stream=together(lambda p: p.stream),
        out=together(lambda p: p.out),
        past=past,
        here=together(lambda p: p.here),
    )


def passive(of: Stretch, delta):
    """What the last layer makes of `delta` ``[…, n, d_model]``, less what it makes of nothing: the passive change
    δ_{m_L}^l of eq. 7 without the linearisation. A difference of two states: where δ is small against them it holds
    only so many of their digits. Raises JaxEditError on another shape."""
    return _passive(of, batched(of, delta)).reshape(jnp.shape(delta))


@jax.jit
def _passive(of: Stretch, flat):
    at_rest = of.reach(jnp.zeros_like(of.stream))
    return jax.lax.map(lambda x: of.reach(x) - at_rest, flat)


def jacobian(of: Stretch, *, columns: int | None = None) -> np.ndarray:
    """The Jacobians ``[n, d_model, d_model]`` at δ = 0, row i of column j: how output i moves with input j.

    By `jax.jacfwd` in chunks of `columns`, by default as many as fit `MEMORY` bytes; all prompts at once.
    """
    n, d = of.shape
    if columns is None:
        config, size = of.config, of.stream.dtype.itemsize
        width = 3 * config.d_ff + 2 * (config.n_head + 2 * config.n_kv_head) * config.head_dim + 4 * d
        columns = max(1, MEMORY // (n * width * size))
    if columns < 1:
        raise JaxEditError(f"columns must be at least 1, got {columns}")
    pieces = -(-d // min(columns, d))
    width = -(-d // pieces)
    made = np.empty((n, d, d), of.stream.dtype)
    for start in range(0, d, width):
        start = min(start, d - width)  # the last chunk has the others' shape
        made[:, :, start : start + width] = _columns(of, start, width)
    return made


@partial(jax.jit, static_argnames="width")
def _columns(of: Stretch, start, width: int):
    n, d = of.shape

    def moved(step):
        delta = jax.lax.dynamic_update_slice(jnp.zeros(d, step.dtype), step, (start,))
        return of.reach(jnp.broadcast_to(delta, (n, d)))

    return jax.jacfwd(moved)(jnp.zeros(width, of.stream.dtype))


class Average(NamedTuple):
    """Over prompts: the mean Jacobian and the standard deviation of each entry ``[d_model, d_model]``, float64, and
    per prompt ``[n]`` the Frobenius norm and the cosine between the prompt's Jacobian and the mean."""

    mean: np.ndarray
    spread: np.ndarray
    norm: np.ndarray
    cosine: np.ndarray


def average_jacobian(
    model: Decoder,
    tokenizer,
    requests: Sequence[EditRequest],
    source: int,
    target: int,
    *,
    site: str = "block_out",
    to: str | None = None,
    at_once: int = 16,
) -> Average:
    """The average Jacobian over many prompts, and how far single ones are from it; at most `at_once` of them are held
    at a time. Sums are float64. See `stretch` for the rest."""
    refuse_adapters(model, "take its Jacobians")
    if not requests:
        raise JaxEditError("there are no prompts")
    total = squares = 0.0
    count = len(requests)
    for some in _batches(model, tokenizer, requests, source, target, site, to, at_once):
        found = jacobian(some).astype(np.float64)
        total, squares = total + found.sum(0), squares + np.square(found).sum(0)
    mean = np.asarray(total) / count
    spread = np.sqrt(np.maximum(np.asarray(squares) / count - mean**2, 0))
    norms, cosines = [], []
    for some in _batches(model, tokenizer, requests, source, target, site, to, at_once):
        found = jacobian(some).astype(np.float64)
        norms.append(np.linalg.norm(found, axis=(1, 2)))
        cosines.append(np.einsum("nij,ij->n", found, mean) / np.maximum(norms[-1] * np.linalg.norm(mean), 1e-300))
    return Average(mean, spread, np.concatenate(norms), np.concatenate(cosines))


def _batches(model, tokenizer, requests, source, target, site, to, at_once: int) -> Iterator[Stretch]:
    if at_once < 1:
        raise JaxEditError(f"at_once must be at least 1, got {at_once}")
    for start in range(0, len(requests), at_once):
        yield stretch(model, tokenizer, requests[start : start + at_once], source, target, site=site, to=to)
