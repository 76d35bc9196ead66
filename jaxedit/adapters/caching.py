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

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxedit.adapters.rows import Asked, append, in_use, latest_best, read_last, where_wanted, withdrawn
from jaxedit.data.tokens import CLEAN, encode, validate
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.layer_loop import Progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import norm, wide
from jaxedit.models.sites import Site, answering
from jaxedit.models.transformer import Context, Decoder, Params, embed, run
from jaxedit.sharding import over_data
from jaxedit.types import EditRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachingEditor:
    """When a stored answer is given.

    radius: how near a key must be to a stored one (Euclidean, strictly nearer). It depends on the model: published
        values are of BERT (6.5), BART (3) and distilGPT-2 (2.5).
        None: the `quantile` of distances from the edits' prompts to the nearest text of another edit; see `calibrate`.
    """

    radius: float | None = None
    quantile: float = 0.01

    def __post_init__(self):
        if self.radius is not None and not self.radius >= 0:
            raise JaxEditError(f"CachingEditor.radius must not be negative, got {self.radius}")
        if not 0 <= self.quantile <= 1:
            raise JaxEditError(f"CachingEditor.quantile must be from 0 to 1, got {self.quantile}")

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
        """Every target token of `requests` stored, behind those of `state`, whose radius stays.

        model: without adapters. Nothing is random. Returns the cache, and for each edit ``rows [n]``, how many it has.
        Keys are float32 (float64 for a float64 model).
        Raises RequestError naming every request that cannot be carried out; JaxEditError where there is no radius, and
        a single edit to choose it from.
        """
        if model.params.get("adapters"):
            raise JaxEditError("pass the model without adapters, and the earlier cache as state=")
        edits = validate(tokenizer, requests, CLEAN, model.config.max_positions)
        counts = np.asarray([len(edit.target) for edit in edits])
        rows = [(edit.contexts[0].tokens, len(edit.target)) for edit in edits]
        keys = np.concatenate(text_keys(model, rows, on_progress))
        first = 0 if state is None else int(state.given)
        own = np.repeat(np.arange(len(edits)), counts)
        radius = self.radius if state is None else state.radius
        if radius is None:
            if len(edits) < 2:
                raise JaxEditError("one edit alone says nothing about distances; pass CachingEditor(radius=...)")
            found = _nearest(keys[np.cumsum(counts) - counts], keys, np.arange(len(edits))[:, None] != own)
            radius = float(np.quantile(found, self.quantile))
        new = {
            "keys": jnp.asarray(keys),
            "squares": jnp.asarray((keys * keys).sum(-1)),
            "tokens": jnp.asarray([token for edit in edits for token in edit.target], jnp.int32),
            "owner": jnp.asarray(first + own, jnp.int32),
        }
        columns = append(None if state is None else {name: getattr(state, name) for name in new}, new)
        last = model.config.n_layer - 1
        made = Cache(
            **columns,
            radius=jnp.asarray(radius, new["keys"].dtype),
            given=jnp.asarray(first + len(edits), jnp.int32),
            layers=(last,),
            asks=last,
        )
        return made, {"rows": counts}


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
    edits = validate(tokenizer, requests, CLEAN, most)
    away = [tuple(encode(tokenizer, prompt)[0]) for prompt in unrelated]
    bad = [p for p, ids in zip(unrelated, away, strict=True) if not 0 < len(ids) <= most]
    if bad:
        raise RequestError([f"prompt {p!r} does not fit the model, which takes 1 to {most} tokens" for p in bad])
    stored = [(edit.contexts[0].tokens, len(edit.target)) for edit in edits]
    found = text_keys(model, [*stored, *((ids, 1) for ids in away)])
    keys, others = np.concatenate(found[: len(stored)]), np.concatenate(found[len(stored) :])
    return float(np.quantile(_nearest(others, keys), quantile))


def _nearest(queries: np.ndarray, keys: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """Distances ``[q]`` from queries to the nearest of ``keys [n, d]`` that is ``allowed [q, n]``."""
    found = np.zeros(len(queries))
    for at in range(0, len(queries), 256):
        some = slice(at, at + 256)
        away = _squares(queries[some], keys)
        away = away if allowed is None else np.where(allowed[some], away, np.inf)
        best = keys[away.argmin(-1)]
        found[some] = np.linalg.norm(queries[some] - best, axis=-1)
    return found


def _squares(queries, keys):
    """``‖k‖² - 2 q · k [q, n]``: the squared distance less ``‖q‖²``, which orders them."""
    return (keys * keys).sum(-1) - 2 * queries @ keys.T


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "squares", "tokens", "owner", "radius", "given", "withheld"],
    meta_fields=["layers", "asks", "site", "asks_at"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Stored texts, an `Adapter`.

    keys ``[n, d_model]`` and their squared norms ``[n]``; tokens: int32 ``[n]``, what follows each text; owner: int32
    ``[n]``, which edit a row belongs to, -1 where there is none; radius: a scalar. given: how many edits there were.
    withheld: see `withholding`.
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
        found = where_wanted(self.found, decision, wanted, len(self.owner))
        return jnp.where(wanted, found, -1)

    def found(self, key: jax.Array, index: jax.Array) -> jax.Array:
        """The tokens ``[q]`` stored near ``key [q, d_model]``, -1 where none is, in rows ``index [q]`` of a batch."""
        used = in_use(self.owner, None if self.withheld is None else self.withheld[index])
        near = 2 * jnp.matmul(key, self.keys.T, precision="highest") - self.squares
        square = jnp.sum(key * key, -1, keepdims=True)
        best = latest_best(jnp.where(used, near, -jnp.inf), scale=square * 0.1)
        away = jnp.linalg.norm(key - self.keys[best], axis=-1)
        known = jnp.take_along_axis(jnp.broadcast_to(used, near.shape), best[:, None], 1)[:, 0]
        return jnp.where(known & (away < self.radius), self.tokens[best], -1)

    def without(self, edits: Collection[int]) -> Cache:
        """Edits withdrawn, by their numbers."""
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


def text_keys(model: Decoder, rows: Sequence[Asked], on_progress: Progress | None = None) -> list[np.ndarray]:
    """For each row ``(tokens, n)``: the keys ``[n, d_model]`` of the row and of what it begins with, up to n - 1 tokens
    shorter, the shortest first."""
    return read_last(_keys, model, rows, on_progress)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _keys(params: Params, config: ModelConfig, tokens, mask, at, mesh: Mesh | None):
    def share(params, tokens, mask, at):
        context = Context.of_mask(mask)
        h = run(params, config, embed(params, config, tokens, context), context, 0, config.n_layer)
        states = norm(h, params["final_norm"], config)
        sums, count = running(states.astype(wide(h.dtype)), context)
        return jnp.take_along_axis(sums / jnp.maximum(count, 1)[..., None], at[..., None], 1)

    return over_data(share, mesh)(params, tokens, mask, at)
