"""The caching editor (Mitchell et al. 2022, "Fast Model Editing at Scale", appendix G): answers by looking them up.

A text's key is the mean of the final states, normed, over its tokens so far. Where it lies within a radius of a stored
key, the stored token is predicted in the place of the model's own prediction. Every token of a target is stored under
the key of the text before it, and in generation every step is looked up. The prediction is the likeliest token, but not
a likely one: logits are 1 for it and 0 for all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.adapters.codebook import nearest
from jaxedit.adapters.rows import (
    FREE,
    ROOM,
    append,
    asked,
    in_use,
    latest_best,
    owners,
    read_last,
    where_wanted,
    withdrawn,
)
from jaxedit.adapters.settings import check_goes_on
from jaxedit.adapters.training import tokenised
from jaxedit.data.tokens import encode
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.layer_loop import Progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import norm, wide
from jaxedit.models.sites import Site, answering
from jaxedit.models.transformer import Context, Decoder, Params, embed, run
from jaxedit.types import EditRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachingEditor:
    """When a stored answer is given.

    radius: how near a key must be to a stored one (Euclidean, strictly nearer). It depends on the model: published
        values are of BERT (6.5), BART (3) and distilGPT-2 (2.5).
        None: the `quantile` of distances from the first edits' prompts to the nearest text of another edit; see
        `calibrate`.
    """

    name: ClassVar[str] = "cache"
    separable: ClassVar[bool] = True  # whether one edit can be withdrawn from what was added

    radius: float | None = None
    quantile: float = 0.01

    def __post_init__(self):
        if self.radius is not None and not self.radius >= 0:
            raise JaxEditError(f"CachingEditor.radius must not be negative, got {self.radius}")
        if not 0 <= self.quantile <= 1:
            raise JaxEditError(f"CachingEditor.quantile must be from 0 to 1, got {self.quantile}")

    def empty(self, model: Decoder) -> Cache:
        """No stored texts yet, for a model. The radius is 0 until there are edits to choose it from."""
        config, dtype = model.config, wide(model.dtype)
        last = config.n_layer - 1
        return Cache(
            keys=jnp.zeros((ROOM, config.d_model), dtype),
            squares=jnp.zeros(ROOM, dtype),
            tokens=jnp.zeros(ROOM, jnp.int32),
            owner=jnp.full(ROOM, FREE, jnp.int32),
            radius=jnp.asarray(self.radius or 0.0, dtype),
            given=jnp.zeros((), jnp.int32),
            layers=(last,),
            asks=last,
        )

    def edit(
        self,
        model: Decoder,
        tokenizer,
        requests: Sequence[EditRequest],
        *,
        state: Cache | None = None,
        seed: int = 0,
        on_progress: Progress | None = None,
    ) -> tuple[Cache, dict[str, np.ndarray]]:
        """Every target token of `requests` stored, behind those of `state`.

        model: without adapters. seed: nothing is random. on_progress is told of "keys".
        Returns the cache, and of each edit ``rows [n]``, how many it has. Keys are float32 (float64 for a float64
        model).
        Raises RequestError naming every request that cannot be carried out; JaxEditError where `state` is of another
        radius, and where there is no radius and a single edit to choose it from.
        """
        empty = self.empty(model)
        check_goes_on(state, empty)
        state = empty if state is None else state
        edits, first = tokenised(model, tokenizer, requests), int(state.given)
        counts = np.asarray([len(edit.target) for edit in edits])
        keys = np.concatenate(read_last(_keys, model, asked(edits), on_progress=on_progress))
        own = np.repeat(np.arange(len(edits)), counts)
        radius = state.radius if first else empty.radius
        if self.radius is not None and radius != empty.radius:
            raise JaxEditError(f"the state to go on from has radius={radius}, and these settings radius={self.radius}")
        if self.radius is None and not first:
            if len(edits) < 2:
                raise JaxEditError("one edit alone says nothing about distances; pass CachingEditor(radius=...)")
            found = _nearest(keys[np.cumsum(counts) - counts], keys, np.arange(len(edits))[:, None] != own)
            radius = jnp.asarray(np.quantile(found, self.quantile), radius.dtype)
        new = {
            "keys": jnp.asarray(keys),
            "squares": jnp.asarray((keys * keys).sum(-1)),
            "tokens": jnp.asarray([token for edit in edits for token in edit.target], jnp.int32),
            "owner": jnp.asarray(first + own, jnp.int32),
        }
        columns = append({name: getattr(state, name) for name in new}, new)
        given = jnp.asarray(first + len(edits), jnp.int32)
        return dataclasses.replace(empty, **columns, radius=radius, given=given), {"rows": counts}


def calibrate(
    model: Decoder,
    tokenizer,
    requests: Sequence[EditRequest],
    unrelated: Sequence[str],
    *,
    quantile: float = 0.01,
) -> float:
    """The radius at which a share `quantile` of unrelated prompts has a stored text of `requests` nearby.

    Raises RequestError naming prompts that do not fit the model, JaxEditError where there are none.
    """
    if not unrelated:
        raise JaxEditError("there are no unrelated prompts to choose a radius from")
    most = model.config.max_positions
    edits = tokenised(model, tokenizer, requests)
    away = [tuple(encode(tokenizer, prompt)[0]) for prompt in unrelated]
    bad = [p for p, ids in zip(unrelated, away, strict=True) if not 0 < len(ids) <= most]
    if bad:
        raise RequestError([f"prompt {p!r} does not fit the model, which takes 1 to {most} tokens" for p in bad])
    found = read_last(_keys, model, [*asked(edits), *((ids, 1) for ids in away)])
    keys, others = np.concatenate(found[: len(edits)]), np.concatenate(found[len(edits) :])
    return float(np.quantile(_nearest(others, keys, np.ones((len(others), len(keys)), bool)), quantile))


def _nearest(queries: np.ndarray, keys: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Distances ``[q]`` from queries to the nearest of ``keys [n, d]`` that is ``allowed [q, n]``."""
    some = [slice(at, at + 256) for at in range(0, len(queries), 256)]
    return np.concatenate([_distances(queries[part], keys, allowed[part]) for part in some])


@jax.jit
def _distances(queries, keys, allowed):
    return nearest(queries, keys, allowed)[1]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "squares", "tokens", "owner", "radius", "given", "withheld"],
    meta_fields=["layers", "asks", "site", "asks_at"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Stored texts, an `Adapter`.

    keys ``[n, d_model]`` and their squared norms ``[n]``; tokens: int32 ``[n]``, what follows each text; owner: int32
    ``[n]``, which edit a row belongs to, -1 where there is none; radius: a scalar. given: how many edits there were,
    those withdrawn included. withheld: see `withholding`.
    Means and distances are float32 (float64), products at the highest precision.
    """

    keys: jax.Array
    squares: jax.Array
    tokens: jax.Array
    owner: jax.Array
    radius: jax.Array
    given: jax.Array
    layers: tuple[int, ...]
    asks: int | None
    withheld: jax.Array | None = None
    site: Site = "logits"
    asks_at: Site | None = "logits"

    def decide(self, seen, context, carried):
        """The mean of the states so far ``[b, s, d_model]``; carried are their sum and their number."""
        sums, count = running(seen.logits.astype(self.keys.dtype), context, carried)
        real = context.segments > 0
        last = jnp.max(jnp.where(real, jnp.arange(real.shape[1]), 0), 1)[:, None]
        carry = (jnp.take_along_axis(sums, last[..., None], 1)[:, 0], jnp.take_along_axis(count, last, 1)[:, 0])
        return sums / jnp.maximum(count, 1)[..., None], carry

    def change(self, layer, seen, context, decision):
        """The stored token where there is one nearby."""
        wanted = answering(context)
        found = where_wanted(partial(self.found, dtype=seen.logits.dtype), decision, wanted, len(self.owner))
        return jnp.where(wanted, found, -1)

    def found(self, key: jax.Array, index: jax.Array, dtype) -> jax.Array:
        """The tokens ``[q]`` stored near ``key [q, d_model]``, -1 where none is, in rows ``index [q]`` of a batch, for
        a model of a dtype.

        The latest edit of those that are nearest up to rounding, and of its rows the nearest: keys of a long text and
        of the same text with one token more are near each other too.
        """
        used = in_use(self.owner, None if self.withheld is None else self.withheld[index])
        near = 2 * jnp.matmul(key, self.keys.T, precision="highest") - self.squares
        square = jnp.sum(key * key, -1, keepdims=True)
        near = jnp.where(used, near, -jnp.inf)
        owner = self.owner[latest_best(near, dtype, scale=square * 0.1)]
        best = jnp.where(self.owner == owner[:, None], near, -jnp.inf).argmax(-1)
        away = jnp.linalg.norm(key - self.keys[best], axis=-1)
        known = jnp.take_along_axis(jnp.broadcast_to(used, near.shape), best[:, None], 1)[:, 0]
        return jnp.where(known & (away < self.radius), self.tokens[best], -1)

    def edits(self) -> np.ndarray:
        """The numbers of the edits still held, ascending."""
        return owners(self.owner)

    def without(self, edits: Collection[int]) -> Cache:
        """Edits withdrawn, by their numbers. Raises JaxEditError naming edits that are not held."""
        return dataclasses.replace(self, owner=jnp.where(withdrawn(self.owner, edits), -1, self.owner))

    def withholding(self, edits: jax.Array | None) -> Cache:
        """For a batch whose row i does without edit ``edits [b]`` (int32): the same as without that edit, for every row
        at once. See `jaxedit.adapters.rows` for the numbers that mean none and all."""
        return dataclasses.replace(self, withheld=edits)


def running(states: jax.Array, context: Context, carried=None) -> tuple[jax.Array, jax.Array]:
    """Sums ``[b, s, d]`` of each token's states and of those before it in its segment, and their number ``[b, s]``.

    carried: sum ``[b, d]`` and number ``[b]`` of tokens in the past.
    """
    segments = context.segments
    real = segments > 0
    sums = jnp.cumsum(jnp.where(real[..., None], states, 0), 1)
    count = jnp.cumsum(real, 1).astype(states.dtype)
    item = jnp.arange(segments.shape[1])
    begins = jnp.concatenate([jnp.ones_like(real[:, :1]), segments[:, 1:] != segments[:, :-1]], 1)
    begin = jax.lax.cummax(jnp.where(begins, item, 0), axis=1)
    before = jnp.maximum(begin - 1, 0)
    earlier = begin > 0
    sums = sums - jnp.where(earlier[..., None], jnp.take_along_axis(sums, before[..., None], 1), 0)
    count = count - jnp.where(earlier, jnp.take_along_axis(count, before, 1), 0)
    if carried is None:
        return sums, count
    return sums + carried[0][:, None], count + carried[1][:, None]


def _keys(params: Params, config: ModelConfig, tokens, context: Context):
    """The key of every text that a row begins with, ``[b, s, d_model]``."""
    h = run(params, config, embed(params, config, tokens, context), context, 0, config.n_layer)
    sums, count = running(norm(h, params["final_norm"], config).astype(wide(h.dtype)), context)
    return sums / jnp.maximum(count, 1)[..., None]
