"""Text generation: one compiled program that fills a key-value cache and decodes on the device.

A row's tokens carry their own positions, and what a token sees is decided by positions and segments alone, so
rows of different lengths share a batch: new tokens go to the same cache slot in all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxedit.data.tokens import encode
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.batching import MIN_LENGTH, batches, bucket, pad
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import Context, Decoder, Params, Past, embed, run_and_keep, unembed
from jaxedit.sharding import data_shards, mesh_of, over_data, place_rows

_CACHE_TOKENS = 32768


def generate(
    model: Decoder,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    skip_special_tokens: bool = True,
    return_tokens: bool = False,
) -> list[str] | list[list[int]]:
    """Continue each prompt by up to `max_new_tokens` tokens; returns both, decoded together.

    Greedy at `temperature` 0, otherwise sampled from the `top_k` most likely tokens (None: all). What is
    sampled depends on `seed` and on the prompt's place in the list, not on how prompts are batched. A row
    ends at an end-of-text token, of the tokenizer or of the model's config.json.
    return_tokens: return the token ids instead, end-of-text included.

    Raises JaxEditError where a prompt has no tokens, or prompt and continuation do not fit the context.
    """
    if tokenizer is None:
        raise JaxEditError("this model came without a tokenizer; pass one")
    if isinstance(prompts, str):
        raise JaxEditError("prompts must be a list of texts, not one text")
    rows = [encode(tokenizer, prompt)[0] for prompt in prompts]
    new = continue_rows(
        model.params,
        model.config,
        rows,
        max_new_tokens,
        eos_ids=eos_ids(model, tokenizer),
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    full = [row + more for row, more in zip(rows, new, strict=True)]
    if return_tokens:
        return full
    plain = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(ids, **plain) for ids in full]


def eos_ids(model: Decoder, tokenizer) -> tuple[int, ...]:
    """Every token that ends a text: the tokenizer's, and those in config.json (chat models have several)."""
    found: list[int] = []
    for ids in (tokenizer.eos_token_id, json.loads(model.hf_config).get("eos_token_id")):
        found += [] if ids is None else ids if isinstance(ids, list) else [ids]
    return tuple(sorted(set(found)))


def continue_rows(
    params: Params, config: ModelConfig, rows: Sequence[Sequence[int]], max_new_tokens: int, **options
) -> list[list[int]]:
    """The new tokens of each row of token ids, end-of-text included. Options as in `generate_tokens`.

    Rows are batched by length, so there is one compiled program a length bucket.
    """
    _check_lengths([len(row) for row in rows], max_new_tokens, config)
    out: list[list[int]] = [[] for _ in rows]
    room = bucket(max_new_tokens)
    shapes = [(bucket(len(row), MIN_LENGTH), room) for row in rows]
    for batch in batches(shapes, _CACHE_TOKENS, data_shards(mesh_of(params))):
        tokens, mask = pad(batch.take(rows), batch.shape[0])
        at = batch.take(range(len(rows)))
        new, count = generate_tokens(
            params, config, tokens, mask, max_new_tokens, row_ids=at, live=batch.live, **options
        )
        for i, ids, n in zip(batch.index, np.asarray(new), np.asarray(count), strict=False):
            out[i] = ids[:n].tolist()
    return out


def generate_tokens(
    params: Params,
    config: ModelConfig,
    tokens,
    mask,
    max_new_tokens: int,
    *,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    row_ids=None,
    live=None,
):
    """Continue rows of tokens ``[b, s]``, padded on either side; `mask` is 1 at real tokens.

    Returns ``(new, count)``: int32 ``[b, max_new_tokens]``, and how many of them are meant ``[b]``, the
    end-of-text token included; after it stands filling.
    row_ids: int ``[b]``, what a row's random numbers depend on beside `seed` (default: its index).
    live: boolean ``[b]``, False at rows that need not be continued.

    Attention and logits are summed in float32 (float64 for a float64 model); the cache has the model's dtype.
    Rows are split over the "data" axis of the mesh that the weights are on.
    """
    tokens, mask = np.asarray(tokens, np.int32), np.asarray(mask, np.int32)
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise JaxEditError(f"tokens and mask must both be [batch, length], got {tokens.shape} and {mask.shape}")
    _check_lengths(mask.sum(-1).tolist(), max_new_tokens, config)
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise JaxEditError(f"temperature must be >= 0 and top_k >= 1, got {temperature} and {top_k}")
    b = len(tokens)
    if b == 0 or max_new_tokens == 0:
        return jnp.zeros((b, max_new_tokens), jnp.int32), jnp.zeros(b, jnp.int32)
    mesh = mesh_of(params)
    spare = -b % data_shards(mesh)
    live = np.pad(np.ones(b, bool) if live is None else np.asarray(live, bool), (0, spare))
    ids = np.arange(b, dtype=np.int32) if row_ids is None else np.asarray(row_ids, np.int32)
    rows = (*(np.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1), mode="edge") for x in (tokens, mask, ids)), live)
    new, count = _generate(
        params,
        config,
        (np.int32(max_new_tokens), np.asarray(eos_ids, np.int32), jax.random.key(seed), np.float32(temperature)),
        place_rows(rows, mesh),
        room=bucket(max_new_tokens),
        top_k=None if top_k is None or temperature == 0 else min(top_k, config.vocab),
        sample=temperature > 0,
        mesh=mesh,
    )
    return new[:b, :max_new_tokens], count[:b]


def _check_lengths(lengths: Sequence[int], max_new_tokens: int, config: ModelConfig):
    if max_new_tokens < 0:
        raise JaxEditError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    for i, n in enumerate(lengths):
        if n == 0:
            raise JaxEditError(f"prompt {i} has no tokens; there is nothing to continue")
        if n + max_new_tokens > config.max_positions:
            raise JaxEditError(
                f"prompt {i} has {n} tokens; with {max_new_tokens} new ones that is more than the "
                f"{config.max_positions} the model takes"
            )


@partial(jax.jit, static_argnames=("config", "room", "top_k", "sample", "mesh"))
def _generate(params, config, options, rows, room: int, top_k, sample: bool, mesh: Mesh | None):
    share = partial(_continue, config=config, room=room, top_k=top_k, sample=sample)
    return over_data(share, mesh, 2)(params, options, rows)


def _continue(params, options, rows, *, config, room: int, top_k, sample: bool):
    """Prefill, then one token a step until `limit` (traced, at most `room`) or until every row has ended."""
    (limit, eos, key, temperature), (tokens, mask, row_ids, live) = options, rows
    b, s = tokens.shape
    context = Context.of_mask(mask).as_prompts()
    lengths = mask.sum(-1, dtype=jnp.int32)
    fill = eos[0] if eos.size else jnp.int32(0)

    def advance(tokens, context, past=None):
        h = embed(params, config, tokens, context)
        return run_and_keep(params, config, h, context, 0, config.n_layer, past)

    def choose(h, step):
        logits = unembed(params, config, h)
        if not sample:
            return logits.argmax(-1).astype(jnp.int32)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(row_ids)
        values, ids = (logits, None) if top_k is None else lax.top_k(logits, top_k)
        at = jax.vmap(jax.random.categorical)(keys, values / temperature)
        return (at if ids is None else jnp.take_along_axis(ids, at[:, None], -1)[:, 0]).astype(jnp.int32)

    def emit(step, token, done, count, out):
        token = jnp.where(done, fill, token)
        out = lax.dynamic_update_slice_in_dim(out, token[:, None], step, 1)
        return token, done | (token[:, None] == eos).any(-1), count + ~done, out

    slots = jnp.arange(s + room, dtype=jnp.int32)[None]
    spare = [(0, 0), (0, room)]
    positions = jnp.where(slots < s, jnp.pad(context.positions, spare), lengths[:, None] + slots - s)
    prompt = jnp.pad(mask, spare)

    def more(state):
        step, _, done, *_ = state
        return (step < limit) & ~done.all()

    def decode(state):
        step, token, done, count, out, k, v, carried = state
        at = s + step - 1  # the slot of `token`, which is not yet in the cache
        here = Context((lengths + step - 1)[:, None], jnp.ones((b, 1), jnp.int32)).ending(jnp.full(b, -1))
        written = jnp.where((slots >= s) & (slots < at), 1, prompt)
        h, new = advance(token[:, None], here, Past(k, v, Context(positions, written), carried))
        k, v = (lax.dynamic_update_slice_in_dim(old, one, at, 2) for old, one in ((k, new.k), (v, new.v)))
        return step + 1, *emit(step, choose(h[:, 0], step), done, count, out), k, v, new.carried

    h, cache = advance(tokens, context)
    k, v = (jnp.pad(x, [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]) for x in (cache.k, cache.v))
    last = jnp.where(mask > 0, jnp.arange(s, dtype=jnp.int32), 0).max(-1)
    first = choose(h[jnp.arange(b), last], jnp.int32(0))
    none = jnp.zeros(b, jnp.int32)
    started = emit(jnp.int32(0), first, ~live, none, jnp.full((b, room), fill, jnp.int32))
    _, _, _, count, out, *_ = lax.while_loop(more, decode, (jnp.int32(1), *started, k, v, cache.carried))
    return out, count
