"""Retrofitting of iReVa's neurons ("+L"): each is optimised by itself, all of some edits at once.

Published, neurons are trained one after another: earlier ones are frozen but take part in the pass, all added up. A
neuron's loss depends on its own key and value and on what earlier neurons add at its prompt, which is mostly nothing.
So all neurons of some edits are trained together, what they add to each other's prompts is computed, and as long as
that is not what they were trained with, they are trained again. A neuron depends on earlier ones alone, so this ends,
with the keys and values that the published order gives.

Only the prompt's last token changes, and only above the layer: everything else is computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxedit.adapters.ireva_neurons import Neurons, standardised
from jaxedit.adapters.training import mlp_entry
from jaxedit.data.tokens import EditTokens, encode
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.batching import MIN_LENGTH, bucket, pad
from jaxedit.evaluation.generation import continue_rows, eos_ids
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import (
    Context,
    Decoder,
    Params,
    Past,
    after_mlp,
    key_of_input,
    layer,
    mlp_output,
    run,
    unembed,
)
from jaxedit.types import EditRequest

if TYPE_CHECKING:
    from jaxedit.adapters.ireva import IReVa
    from jaxedit.layer_loop import Progress

TEXTS, OTHERS = 4, 6  # out of scope, an edit: two texts from nothing and two about the subject; prompts of other edits
_NEW_TOKENS = (2, 10)  # in a text, from and to


class OutOfScope(NamedTuple):
    """What neurons of edit i should not fire at: every token of the rows ``texts[i]``, `TEXTS` of them; and the last
    tokens of the prompts of the edits ``others[i]``."""

    texts: list[list[list[int]]]
    others: list[np.ndarray]


def out_of_scope(model: Decoder, tokenizer, requests: Sequence[EditRequest], seed: int = 0) -> OutOfScope:
    """Per edit two texts sampled after the beginning-of-text token, two that continue its subject, with 2 to 10 new
    tokens at temperature 1, and six other edits of `requests`, fewer where there are not so many (appendix of the
    paper)."""
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
        raise JaxEditError("the tokenizer has no token that begins a text; set tokenizer.bos_token_id")
    heads = [row for r in requests for row in [[begin]] * 2 + [encode(tokenizer, r.subject)[0]] * 2]
    least, most = _NEW_TOKENS
    ends = eos_ids(model, tokenizer)
    new = continue_rows(model.params, model.config, heads, most, eos_ids=ends, temperature=1.0, seed=seed)
    rng = np.random.default_rng(seed)
    sizes = rng.integers(least, most + 1, len(heads))
    rows = [head + more[:size] for head, more, size in zip(heads, new, sizes, strict=True)]
    n = len(requests)
    others = [rng.choice(n - 1, min(OTHERS, n - 1), replace=False) for _ in requests]
    return OutOfScope(
        [rows[at : at + TEXTS] for at in range(0, len(rows), TEXTS)],
        [some + (some >= i) for i, some in enumerate(others)],
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Work:
    """Some edits, padded. tokens, mask ``[b, s]``: prompts and targets; at, targets, rows ``[b, t]``: where a target
    token is predicted, which, and its neuron's row, out of range where there is none. texts, read ``[b · TEXTS, u]``;
    others ``[b, OTHERS]``: rows of neurons whose keys are those of other prompts, out of range where there is none."""

    tokens: np.ndarray
    mask: np.ndarray
    at: np.ndarray
    targets: np.ndarray
    rows: np.ndarray
    texts: np.ndarray
    read: np.ndarray
    others: np.ndarray


def retrofit(
    settings: IReVa,
    model: Decoder,
    tokenizer,
    requests: Sequence[EditRequest],
    edits: Sequence[EditTokens],
    state: Neurons,
    keys: jax.Array,
    seed: int,
    on_progress: Progress | None,
) -> tuple[Neurons, dict[str, np.ndarray]]:
    """Optimise the last neurons of `state`, which are those of `edits`. keys ``[neurons of edits, d_model]``: theirs.

    Returns the neurons and the traces that `IReVa.edit` describes. AdamW and all losses are float32 (float64).
    """
    scope = out_of_scope(model, tokenizer, requests, seed)
    counts = np.asarray([len(edit.target) for edit in edits])
    starts = np.cumsum(counts) - counts
    base = int(np.flatnonzero(np.asarray(state.owner) >= 0)[-1]) + 1 - len(keys)
    losses = np.zeros((len(edits), settings.steps, 3), np.float32)
    crosstalk = np.zeros(len(edits), np.float32)
    kept, frozen = (state.keys, state.values), dataclasses.replace(state, keys=keys[:0], values=keys[:0])
    for begin in range(0, len(edits), settings.together):
        some = range(begin, min(begin + settings.together, len(edits)))
        work = _work(edits, scope, starts, some, min(settings.together, len(edits)))
        kept, log, share = _train(
            model.params, frozen, *kept, keys, work, np.int32(base), config=model.config, settings=settings
        )
        log, share = np.asarray(log), np.asarray(share)
        for i, (steps, most) in zip(some, zip(log, share, strict=True), strict=False):
            losses[i], crosstalk[i] = steps[:, : counts[i]].mean(1), most[: counts[i]].max()
        if on_progress is not None:
            on_progress("retrofit", some[-1] + 1, len(edits))
    made = dataclasses.replace(state, keys=kept[0], values=kept[1])
    return made, {"losses": losses, "crosstalk": crosstalk}


def _work(edits, scope: OutOfScope, starts: np.ndarray, some: range, size: int) -> _Work:
    """Edits `some`, filled up to `size` with the first of them, whose neurons there are out of range."""
    nowhere = np.iinfo(np.int32).max // 2
    filled = [*some] + [some[0]] * (size - len(some))
    rows = [edits[i].contexts[0].tokens for i in filled]
    width = bucket(max(len(edits[i].target) for i in filled))
    at, targets, own = (np.zeros((size, width), np.int32) for _ in range(3))
    own[:] = nowhere
    others = np.full((size, OTHERS), nowhere, np.int32)
    for j, (i, row) in enumerate(zip(filled, rows, strict=True)):
        n = len(edits[i].target)
        at[j] = np.minimum(len(row) - n + np.arange(width), len(row) - 1)
        targets[j, :n] = edits[i].target
        if j < len(some):
            own[j, :n] = starts[i] + np.arange(n)
        others[j, : len(scope.others[i])] = starts[scope.others[i]]
    tokens, mask = pad(rows, bucket(max(map(len, rows)), MIN_LENGTH))
    texts = [row for i in filled for row in scope.texts[i]]
    return _Work(tokens, mask, at, targets, own, *pad(texts, bucket(max(map(len, texts)), MIN_LENGTH)), others)


class _Fixed(NamedTuple):
    """What training does not change, of q neurons: the MLP input, standardised, its output and the stream it is added
    to, ``[q, d_model]``, earlier tokens in the layers above, where the prompt ends ``[q]``, and inputs out of scope
    ``[b, o, d_model]`` with a mask ``[b, o]``."""

    s: jax.Array
    out: jax.Array
    stream: jax.Array
    past: Past
    at: jax.Array
    away: jax.Array
    is_away: jax.Array


@partial(jax.jit, static_argnames=("config", "settings"), donate_argnames=("all_keys", "all_values"))
def _train(params, frozen: Neurons, all_keys, all_values, clean, work: _Work, base, *, config, settings: IReVa):
    """Train the neurons of `work`. clean ``[n, d_model]``: the keys of all edits as they began, the first of which is
    row `base` of `all_keys`.

    Returns the keys and values of all neurons with the new ones put in, losses ``[b, steps, t, 3]``, and the size of
    what earlier neurons add relative to the MLP's output ``[b, t]``.
    """
    state = dataclasses.replace(frozen, keys=all_keys, values=all_values)
    fixed = _prepare(params, config, work, state.layers[0], clean)
    b, t = work.rows.shape
    rows = work.rows.reshape(-1)
    real = rows < len(clean)
    first = jnp.min(rows)
    earlier = (state.owner >= 0) & (jnp.arange(len(state.owner)) < base + first)
    outer = state.alpha * _dot(jnp.where(earlier, state.fired(state.potentials_of(fixed.s)), 0), state.values)
    start = jnp.take(clean, rows, 0, mode="fill", fill_value=0), _rows_of(all_values, base + rows, real)
    biases = jnp.take(state.biases, base + rows, mode="fill", fill_value=0)
    adam = optax.adamw(settings.lr, *settings.betas, eps=1e-8, weight_decay=settings.weight_decay)
    before = (rows[None] < rows[:, None]) & real[None] & real[:, None]

    def loss(own, added):
        key, value = own
        fired = state.fired(jnp.sum(key * fixed.s, -1) - biases)
        add = added + state.alpha * fired[:, None] * value
        logits = _logits(params, config, fixed, add, state.layers[0])
        said = jnp.take_along_axis(logits, work.targets.reshape(-1, 1), -1)[:, 0]
        rec = settings.rec_weight * jnp.sum(start[0] * (key - start[0]), -1) ** 2
        z = jnp.einsum("btd,bod->bto", key.reshape(b, t, -1), fixed.away, precision="highest")
        z = jnp.where(fixed.is_away[:, None], jnp.maximum(z - biases.reshape(b, t, 1), 0), 0)
        away = jnp.sum(z, -1) / jnp.maximum(jnp.sum(fixed.is_away, -1), 1)[:, None]
        terms = jnp.stack([jax.nn.logsumexp(logits, -1) - said, rec, settings.irr_weight * away.reshape(-1)], -1)
        return jnp.sum(jnp.where(real[:, None], terms, 0)), terms

    def train(added):
        def step(carry, _):
            own, moments = carry
            grad, terms = jax.grad(loss, has_aux=True)(own, added)
            change, moments = adam.update(grad, moments, own)
            return (jax.tree.map(jnp.add, own, change), moments), terms

        ((key, value), _), log = lax.scan(step, (start, adam.init(start)), None, length=settings.steps)
        z = _dot(fixed.s, key.T) - biases
        return (key, value), log, outer + state.alpha * _dot(jnp.where(before, state.fired(z), 0), value)

    def moved(was, now):
        return jnp.max(jnp.abs(now - was)) > jnp.finfo(was.dtype).eps * jnp.max(jnp.abs(fixed.out))

    def again(carry):
        _, _, added, _ = carry
        own, log, now = train(added)
        return own, log, now, moved(added, now)

    own, log, added = train(outer)
    own, log, added, _ = lax.while_loop(lambda carry: carry[-1], again, (own, log, added, moved(outer, added)))
    put = jnp.where(real, base + rows, len(all_keys))
    made = (all_keys.at[put].set(own[0], mode="drop"), all_values.at[put].set(own[1], mode="drop"))
    size = jnp.linalg.norm(added, axis=-1) / jnp.linalg.norm(fixed.out.astype(added.dtype), axis=-1)
    return made, jnp.moveaxis(log.reshape(-1, b, t, 3), 0, 1), size.reshape(b, t)


def _dot(x, y):
    return jnp.matmul(x, y, precision="highest")


def _rows_of(x, rows, real):
    return jnp.where(real[:, None], jnp.take(x, rows, 0, mode="clip"), 0)


def _prepare(params: Params, config: ModelConfig, work: _Work, index: int, clean) -> _Fixed:
    b, t = work.at.shape
    context = Context.of_mask(work.mask)
    x, stream = mlp_entry(params, config, work.tokens, context, index)
    p = layer(params, index)
    out = mlp_output(p, key_of_input(p, config, x))
    above = after_mlp(p, config, stream, out)
    _, (k, v) = run(
        params, config, above, context, index + 1, config.n_layer, probe=lambda inside: (inside.k, inside.v)
    )

    def pick(h):
        return jnp.take_along_axis(h, work.at[..., None], 1).reshape(b * t, -1)

    at = jnp.asarray(work.at).reshape(-1, 1)
    item = jnp.arange(work.tokens.shape[1])[None]
    earlier = Context(jnp.broadcast_to(item, (b * t, item.shape[1])), (item < at).astype(jnp.int32))
    past = Past(jnp.repeat(k, t, 1), jnp.repeat(v, t, 1), earlier)
    s = standardised(pick(x).astype(clean.dtype))
    read, _ = mlp_entry(params, config, work.texts, Context.of_mask(work.read), index)
    away = standardised(read.astype(clean.dtype)).reshape(b, -1, read.shape[-1])
    others = jnp.take(clean, work.others, 0, mode="fill", fill_value=0)
    is_away = jnp.concatenate([work.read.reshape(b, -1) > 0, work.others < len(clean)], 1)
    return _Fixed(s, pick(out), pick(stream), past, at, jnp.concatenate([away, others], 1), is_away)


def _logits(params: Params, config: ModelConfig, fixed: _Fixed, add, index: int):
    """Logits ``[q, vocab]`` at the prompts' last tokens with ``add [q, d_model]`` added to the MLP's output."""
    out = (fixed.out.astype(add.dtype) + add).astype(fixed.out.dtype)
    h = after_mlp(layer(params, index), config, fixed.stream, out)[:, None]
    context = Context(fixed.at, jnp.ones_like(fixed.at))
    return unembed(params, config, run(params, config, h, context, index + 1, config.n_layer, past=fixed.past)[:, 0])
