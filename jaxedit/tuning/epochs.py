"""Gradient descent on the targets of edits, in the second projections of some layers' MLPs: rows, loss and epochs.

Layers below the lowest changed one give the same in every epoch: they are run once. All epochs are one program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxedit.adapters.training import KEEP, TOKENS, prompt_length
from jaxedit.data.tokens import CLEAN, EditTokens, round_up, validate
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.batching import MIN_LENGTH, bucket
from jaxedit.layer_loop import Progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import (
    Context,
    Decoder,
    Params,
    after_mlp,
    embed,
    layer,
    run,
    to_key,
    unembed,
    window_of,
)
from jaxedit.types import EditRequest

OBJECTIVES = ("target", "last")
Change = Callable[[Params, Any, jax.Array], jax.Array]  # (block, its part of what is trained, keys) -> MLP output


class Rows(NamedTuple):
    """Edits in the order of their updates; the edits of one update in parts that are run one after the other.

    tokens, positions, segments: int32 ``[updates, parts, rows, s]``, several edits in a row, one a segment.
    asks: int32 ``[updates, parts, t]``, the places among a part's tokens that predict `targets`, and weights, of their
    losses: their sum over an update is the mean over its edits of the mean over each one's target.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    asks: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class Descent(NamedTuple):
    """How to descend: see `jaxedit.tuning.finetune.FineTune`. clamp: infinite for no bound. batch: None for all."""

    objective: str
    lr: float
    clamp: float
    stop: float
    epochs: int
    batch: int | None


class Rates(NamedTuple):
    """Adam's rate, the largest size of an entry of what is trained, and the loss below which it stays as it is."""

    lr: Any
    clamp: Any
    stop: Any


class State(NamedTuple):
    """What goes from epoch to epoch. losses ``[epochs, updates]``: before each update, NaN where there was none yet;
    made: how many updates were; mean: of the last epoch's losses over edits."""

    epoch: jax.Array
    trained: Any
    moments: Any
    losses: jax.Array
    made: jax.Array
    mean: jax.Array


def tokenised(model: Decoder, tokenizer, requests: Sequence[EditRequest]) -> list[EditTokens]:
    """Requests as tokens. Raises RequestError where some cannot be carried out, JaxEditError for a model with
    adapters."""
    if model.params.get("adapters"):
        raise JaxEditError("fine-tuning takes a model without adapters; detach them first")
    return validate(tokenizer, requests, CLEAN, model.config.max_positions)


def checked_layers(layers: Sequence[int], config: ModelConfig) -> tuple[int, ...]:
    """The layers, in order. Raises JaxEditError where the model does not have them, or one is named twice."""
    made = tuple(sorted(layers))
    if not made or len(set(made)) < len(made) or made[0] < 0 or made[-1] >= config.n_layer:
        raise JaxEditError(f"layers must be different ones of 0 to {config.n_layer - 1}, got {tuple(layers)}")
    return made


def arrange(edits: Sequence[EditTokens], order: np.ndarray, batch: int, objective: str, most: int):
    """Edits, taken in `order`, as `Rows` of updates of `batch` edits, and each update's share of the edits.

    objective: "target", each token of the target is predicted from the prompt and those before it; "last", all of them
    at the prompt's last token. most: tokens of a part, which bounds memory.
    """
    texts, asks = [], []
    for edit in edits:
        n, tokens = prompt_length(edit), edit.contexts[0].tokens
        texts.append(tokens if objective == "target" else tokens[:n])
        asks.append([n - 1 + (i if objective == "target" else 0) for i in range(len(edit.target))])
    updates = [order[at : at + batch] for at in range(0, len(order), batch)]
    needed = max(sum(len(texts[i]) for i in some) for some in updates)
    parts = min(-(-needed // most), len(updates[0]))
    length = bucket(max(map(len, texts)), MIN_LENGTH)
    split = [[(_fitted(part, texts, length), part) for part in np.array_split(some, parts)] for some in updates]
    rows = _rounded(max(len(fitted) for some in split for fitted, _ in some))
    asked = _rounded(max(sum(len(edits[i].target) for i in part) for some in split for _, part in some))
    shape = (len(updates), parts)
    tokens, positions, segments = (np.zeros((*shape, rows, length), np.int32) for _ in range(3))
    at, targets = (np.zeros((*shape, asked), np.int32) for _ in range(2))
    weights = np.zeros((*shape, asked))
    for u, some in enumerate(split):
        for k, (fitted, _) in enumerate(some):
            done = 0
            for r, members in enumerate(fitted):
                start = 0
                for number, i in enumerate(members):
                    n, t = len(texts[i]), len(asks[i])
                    here, there = (u, k, r, slice(start, start + n)), (u, k, slice(done, done + t))
                    tokens[here], positions[here], segments[here] = texts[i], np.arange(n), number + 1
                    at[there] = r * length + start + np.asarray(asks[i])
                    targets[there], weights[there] = edits[i].target, 1 / (t * len(updates[u]))
                    start, done = start + n, done + t
    shares = np.asarray([len(some) / len(order) for some in updates])
    return Rows(tokens, positions, segments, at, targets, weights), shares


def _fitted(part, texts, length: int) -> list[list[int]]:
    """Edits into rows of `length` tokens, the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(part, key=lambda i: -len(texts[i])):
        r = next((r for r, left in enumerate(room) if left >= len(texts[i])), len(rows))
        if r == len(rows):
            rows.append([])
            room.append(length)
        rows[r].append(i)
        room[r] -= len(texts[i])
    return rows


def _rounded(n: int) -> int:
    """Up, by an eighth at most, so that few programs serve many sets of edits."""
    return round_up(n, max(1, 2 ** (n.bit_length() - 1) // 8))


def train(
    model: Decoder,
    edits: Sequence[EditTokens],
    layers: tuple[int, ...],
    change: Change,
    start: Any,
    how: Descent,
    seed: int,
    on_progress: Progress | None = None,
    most: int = TOKENS,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Adam on `start`, whose leaves lead with `layers`; each epoch goes through all updates, in the order of `seed`.

    change: what makes a block's MLP output of its keys and of its part of what is trained; compared by value, one
    program for each. An update whose loss is below `how.stop` is not made, and the epoch whose mean loss is, is the
    last. on_progress is told of "epochs". most: tokens at a time, which bounds memory. Gradients of the parts of an
    update are summed in float32 (float64 for a float64 model), as are losses.

    Returns what was trained, and "losses" ``[epochs, updates]``, before each update, of the epochs that there were;
    "updates", how many were made; and of each edit "batch", which of an epoch's updates it is in.
    """
    params, config, dtype = model.params, model.config, wide(model.dtype)
    order = np.random.default_rng(seed).permutation(len(edits))
    batch = min(how.batch or len(edits), len(edits))
    rows, shares = arrange(edits, order, batch, how.objective, most)
    rows, shares = rows._replace(weights=rows.weights.astype(dtype)), shares.astype(dtype)
    h = _enter(params, config, rows, layers[0])
    start = jax.tree.map(partial(jnp.array, dtype=dtype), start)  # a copy: it is given away
    state = State(
        epoch=jnp.zeros((), jnp.int32),
        trained=start,
        moments=optax.adam(1.0).init(start),
        losses=jnp.full((bucket(how.epochs), len(shares)), jnp.nan, dtype),
        made=jnp.zeros((), jnp.int32),
        mean=jnp.full((), jnp.inf, dtype),
    )
    rates = Rates(*(np.asarray(x, dtype) for x in (how.lr, how.clamp, how.stop)))
    for until in range(1, how.epochs + 1) if on_progress is not None else (how.epochs,):
        state = _go_on(params, config, layers, change, h, rows, shares, state, np.int32(until), rates)
        if int(state.epoch) < until:
            break
        if on_progress is not None:
            on_progress("epochs", until, how.epochs)
    losses = np.asarray(state.losses)[: int(state.epoch)]
    return state.trained, {"losses": losses, "updates": np.asarray(state.made), "batch": np.argsort(order) // batch}


@partial(jax.jit, static_argnames=("config", "first"))
def _enter(params, config: ModelConfig, rows: Rows, first: int):
    """What enters layer `first`, ``[updates, parts, rows, s, d_model]``."""

    def part(columns):
        tokens, *where = columns
        context = Context(*where)
        return run(params, config, embed(params, config, tokens, context), context, 0, first)

    columns = (rows.tokens, rows.positions, rows.segments)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), columns)
    made = lax.map(part, flat)
    return made.reshape(*rows.tokens.shape[:2], *made.shape[1:])


@partial(jax.jit, static_argnames=("config", "layers", "change"), donate_argnames=("state",))
def _go_on(
    params, config: ModelConfig, layers, change: Change, h, rows: Rows, shares, state: State, until, rates: Rates
):
    """More epochs, until there are `until` or the loss is small."""
    adam = optax.adam(rates.lr)
    differentiate = jax.value_and_grad(partial(loss, params=params, config=config, layers=layers, change=change))

    def update(carry, one):
        trained, moments, made = carry

        def add(total, part):
            return jax.tree.map(jnp.add, total, differentiate(trained, *part)), None

        none = (jnp.zeros((), state.mean.dtype), jax.tree.map(jnp.zeros_like, trained))
        (now, grad), _ = lax.scan(add, none, one)

        def step(_):
            steps, new = adam.update(grad, moments, trained)
            moved = jax.tree.map(lambda x: jnp.clip(x, -rates.clamp, rates.clamp), optax.apply_updates(trained, steps))
            return moved, new, made + 1

        return lax.cond(now < rates.stop, lambda _: carry, step, None), now

    def going(state: State):
        return (state.epoch < until) & (state.mean >= rates.stop)

    def epoch(state: State):
        (trained, moments, made), losses = lax.scan(update, (state.trained, state.moments, state.made), (h, rows))
        log = state.losses.at[state.epoch].set(losses)
        return State(state.epoch + 1, trained, moments, log, made, jnp.sum(losses * shares))

    return lax.while_loop(going, epoch, state)


def loss(trained, h, rows: Rows, *, params: Params, config: ModelConfig, layers: tuple[int, ...], change: Change):
    """The weighted sum of the asks' negative log-likelihoods, of one part: ``h [rows, s, d_model]`` enters the first of
    `layers`."""
    context = Context(jnp.asarray(rows.positions), jnp.asarray(rows.segments))

    def block(h, own):
        index, mine = own
        p = layer(params, index)
        stream, key, _, _ = to_key(p, config, h, context, window_of(config, index))
        return after_mlp(p, config, stream, change(p, mine, key)), None

    block = jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names(*KEEP))
    at = layers[0]
    for first, some in _stretches(layers):
        h = run(params, config, h, context, at, first, keep=KEEP)
        at = first + len(some)
        mine = jax.tree.map(lambda x, some=some: x[some[0] : some[-1] + 1], trained)
        h, _ = lax.scan(block, h, (jnp.arange(first, at), mine))
    h = run(params, config, h, context, at, config.n_layer, keep=KEEP)
    log_p = jax.nn.log_softmax(unembed(params, config, h.reshape(-1, config.d_model)[rows.asks]))
    return -jnp.sum(jnp.take_along_axis(log_p, rows.targets[:, None], 1)[:, 0] * rows.weights)


def _stretches(layers: tuple[int, ...]) -> list[tuple[int, list[int]]]:
    """Runs of neighbouring layers: the first layer of each, and their places in `layers`."""
    made: list[tuple[int, list[int]]] = []
    for i, l in enumerate(layers):
        if made and l == made[-1][0] + len(made[-1][1]):
            made[-1][1].append(i)
        else:
            made.append((l, [i]))
    return made
