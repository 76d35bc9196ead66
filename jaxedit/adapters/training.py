"""What the adapters train on and with: rows of prompt and target, their loss, and one loop of gradient steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxedit.data.tokens import CLEAN, EditTokens, validate
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.batching import MIN_LENGTH, Batch, batches, bucket, pad
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import (
    Context,
    Decoder,
    Params,
    Past,
    attention,
    attention_added,
    embed,
    layer,
    mlp_input,
    run,
    run_and_keep,
    unembed,
    window_of,
)
from jaxedit.types import EditRequest

TOKENS = 4096  # of a program
KEEP = ("q", "k", "v", "o", "gate", "up")  # of each layer, for the backward pass


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """Rows of prompt and target, right-padded: tokens and mask ``[n, s]``; ends ``[n]``, the prompt's last token.

    asks, targets ``[n, t]``: places that predict the target's tokens, and these; real ``[n, t]``: 0 where there is
    none.
    """

    tokens: jax.Array
    mask: jax.Array
    ends: jax.Array
    asks: jax.Array
    targets: jax.Array
    real: jax.Array

    @property
    def context(self) -> Context:
        return Context.of_mask(self.mask).ending(self.ends)


def tokenised(model: Decoder, tokenizer, requests: Sequence[EditRequest], templates=CLEAN) -> list[EditTokens]:
    """Requests as tokens. Raises RequestError where one cannot be carried out, JaxEditError for a model with
    adapters."""
    if model.params.get("adapters"):
        raise JaxEditError("pass the model without adapters, and earlier edits as state=")
    return validate(tokenizer, requests, templates, model.config.max_positions)


def prompt_length(edit: EditTokens) -> int:
    return len(edit.contexts[0].tokens) - len(edit.target) + 1


def answer_batches(edits: Sequence[EditTokens], tokens: int = TOKENS) -> list[tuple[Batch, Answers]]:
    """Batches of few shapes; spare rows repeat the first one."""
    shapes = [(bucket(len(e.contexts[0].tokens), MIN_LENGTH), bucket(len(e.target))) for e in edits]
    return [(batch, answers(batch.take(edits), *batch.shape)) for batch in batches(shapes, tokens)]


def answers(edits: Sequence[EditTokens], length: int, most: int) -> Answers:
    """Rows of `length` tokens with room for `most` target tokens."""
    tokens, mask = pad([e.contexts[0].tokens for e in edits], length)
    targets, real = pad([e.target for e in edits], most)
    ends = np.asarray([prompt_length(e) - 1 for e in edits], np.int32)
    asks = np.minimum(ends[:, None] + np.arange(most, dtype=np.int32), length - 1)
    return Answers(*map(jnp.asarray, (tokens, mask, ends, asks, targets, real)))


def mlp_entry(params: Params, config: ModelConfig, tokens, context: Context, index: int):
    """What the MLP of layer `index` reads, and the stream that its output is added to, ``[b, s, d_model]``."""
    h = run(params, config, embed(params, config, tokens, context), context, 0, index)
    p = layer(params, index)
    attended = attention(p, config, h, context, window_of(config, index))[0]
    stream = h + attention_added(p, config, attended)
    return mlp_input(p, config, h, stream), stream


def at_ends(x, rows: Answers):
    """What stands at the prompts' last tokens, of ``x [n, s, d]``."""
    return jnp.take_along_axis(x, rows.ends[:, None, None], 1)[:, 0]


def nll(params: Params, config: ModelConfig, h, rows: Answers):
    """Mean negative log-likelihood of each row's target ``[n]``, given the last layer's states at the asks
    ``[n, t, d_model]``; in float32 (float64)."""
    log_p = jax.nn.log_softmax(unembed(params, config, h))
    chosen = jnp.take_along_axis(log_p, rows.targets[..., None], -1)[..., 0]
    return -jnp.sum(chosen * rows.real, -1) / jnp.maximum(rows.real.sum(-1), 1)


def at_asks(h, rows: Answers):
    return jnp.take_along_axis(h, rows.asks[..., None], 1)


def nll_above(params: Params, config: ModelConfig, h, rows: Answers, start: int):
    """`nll` of states ``[n, s, d_model]`` that enter layer `start`."""
    h = run(params, config, h, rows.context, start, config.n_layer, keep=KEEP)
    return nll(params, config, at_asks(h, rows), rows)


def answers_above(params: Params, config: ModelConfig, h, rows: Answers, start: int):
    """`nll` as a function of the states at the asks ``[n, t, d_model]``, for changes of ``h [n, s, d_model]`` that
    begin at the prompts' last tokens: what comes before them is run once."""
    _, past = run_and_keep(params, config, h, rows.context, start, config.n_layer)
    before = jnp.where(jnp.arange(h.shape[1]) < rows.ends[:, None], rows.mask, 0)
    past = Past(past.k, past.v, Context(past.context.positions, before))
    here = Context(rows.asks, rows.real)

    def loss(tail):
        return nll(params, config, run(params, config, tail, here, start, config.n_layer, past=past, keep=KEEP), rows)

    return loss


def descend(
    loss: Callable[[Any], jax.Array],
    start: Any,
    steps: int,
    optimiser: optax.GradientTransformation,
    *,
    stop: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    project: Callable[[Any], Any] | None = None,
) -> tuple[Any, jax.Array, jax.Array]:
    """Gradient steps for many independent lanes at once: each leaf of `start`, and the losses, lead with the lanes.

    stop: (loss, loss before it) -> whether a lane is done; such a lane changes no more, and the loop ends with the
    last one. project: applied to the parameters after each step.
    Returns the parameters, the loss before each step ``[lanes, steps]`` (NaN where a lane was done), and the updates
    made ``[lanes]``.
    """

    def total(x):
        each = loss(x)
        return each.sum(), each

    lanes = len(jax.tree.leaves(start)[0])
    shape = jax.eval_shape(loss, start)

    def going(state):
        step, _, _, done, *_ = state
        return (step < steps) & ~done.all()

    def body(state):
        step, x, moments, done, before, log, count = state
        (_, now), grad = jax.value_and_grad(total, has_aux=True)(x)
        if stop is not None:
            done = done | ((step > 0) & stop(now, before))
        change, moments = optimiser.update(grad, moments, x)
        new = optax.apply_updates(x, change)
        new = new if project is None else project(new)
        if stop is not None:
            new = jax.tree.map(lambda a, b: jnp.where(done.reshape(-1, *[1] * (a.ndim - 1)), a, b), x, new)
        log = log.at[:, step].set(jnp.where(state[3], jnp.nan, now))
        return step + 1, new, moments, done, now, log, count + ~done

    zeros = jnp.zeros(shape.shape, shape.dtype)
    log = jnp.full((lanes, steps), jnp.nan, shape.dtype)
    state = (0, start, optimiser.init(start), jnp.zeros(lanes, bool), zeros, log, jnp.zeros(lanes, jnp.int32))
    _, x, _, _, _, log, count = lax.while_loop(going, body, state)
    return x, log, count
