"""The compiled part of the metrics: likelihood of two targets after a prompt, by teacher forcing."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jaxedit.evaluation.batching import chunk
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import Context, Params, Past, embed, run, run_and_keep, unembed
from jaxedit.sharding import over_data


@partial(jax.jit, static_argnames=("config", "mesh"))
def score(params: Params, config: ModelConfig, tokens, mask, targets, real, mesh: Mesh | None = None):
    """Two targets after each prompt.

    tokens, mask ``[b, s]``: prompts, right-padded; targets, real ``[2 b, t]``: targets and their mask, rows
    2 i and 2 i + 1 follow prompt i.
    Returns ``(last [b, d_model], nll [b, 2], hit [b, 2])``: the hidden state at the prompt's last token, the
    mean negative log-likelihood of each target in nats (0 where it has no tokens), float32 (float64 for
    float64 models), and whether each of its tokens is the likeliest one.
    mesh: split the rows over its "data" axis, of which b is a multiple.
    """
    return over_data(partial(_score, config=config), mesh)(params, tokens, mask, targets, real)


def _score(params, tokens, mask, targets, real, *, config: ModelConfig):
    b, n = len(tokens), targets.shape[1]
    context = Context.of_mask(mask).as_prompts()
    sizes = mask.sum(-1, dtype=jnp.int32)
    h = embed(params, config, tokens, context)
    h, past = run_and_keep(params, config, h, context, 0, config.n_layer)
    last = h[jnp.arange(b), sizes - 1]
    nll, hit = (x.reshape(2 * b, 1) for x in _token_scores(params, config, last, targets[:, 0].reshape(b, 2)))
    if n > 1:
        twice = partial(jnp.repeat, repeats=2)
        by_row = jax.tree.map(partial(twice, axis=0), (context, past.carried))
        past = Past(twice(past.k, axis=1), twice(past.v, axis=1), *by_row)
        here = Context(twice(sizes)[:, None] + jnp.arange(n - 1, dtype=jnp.int32), real[:, 1:])
        here = here.ending(jnp.full(2 * b, -1))
        h = run(params, config, embed(params, config, targets[:, :-1], here), here, 0, config.n_layer, past=past)
        rest = _token_scores(params, config, h.reshape(-1, h.shape[-1]), targets[:, 1:].reshape(-1, 1))
        nll, hit = (
            jnp.concatenate([first, x.reshape(2 * b, -1)], 1) for first, x in zip((nll, hit), rest, strict=True)
        )
    nll = jnp.sum(nll * real, -1) / jnp.maximum(real.sum(-1), 1)
    return last, nll.reshape(b, 2), (hit | (real == 0)).all(-1).reshape(b, 2)


def _token_scores(params: Params, config: ModelConfig, h, ids):
    """``h [n, d_model], ids [n, m]`` to nll and hit ``[n, m]``; logits exist for a few rows at a time."""

    def one(row):
        logits = unembed(params, config, row[0])
        return jax.nn.logsumexp(logits) - logits[row[1]], logits.argmax() == row[1]

    return lax.map(one, (h, ids), batch_size=chunk(len(h)))
