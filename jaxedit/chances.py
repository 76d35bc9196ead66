"""How likely a model is to say the targets of edits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.data.tokens import EditTokens, chunks, pack
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import Context, Params, embed, run, unembed


def probabilities(params: Params, config: ModelConfig, edits: Sequence[EditTokens]) -> np.ndarray:
    """Probability ``[n]`` of each whole target after its clean prompt (float32 log-probabilities)."""
    packed = pack([e.contexts[:1] for e in edits])
    n, width = len(edits), max(len(e.target) for e in edits)
    at, answers, weights = np.zeros((n, width), np.int32), np.zeros((n, width), np.int32), np.zeros((n, width))
    for i, e in enumerate(edits):
        t = len(e.target)
        at[i, :t] = len(e.contexts[0].tokens) - t + np.arange(t)
        answers[i, :t], weights[i, :t] = e.target, 1
    columns = (*packed.as_tuple()[:3], at, answers, weights)
    parts = [_chances(params, config, *part) for part in chunks(columns, packed.tokens.shape[1])]
    return np.concatenate([np.asarray(p) for p in parts])[:n]


@partial(jax.jit, static_argnames=("config",))
def _chances(params, config: ModelConfig, tokens, positions, segments, at, answers, weights):
    context = Context(positions, segments).ending(at[:, 0])
    h = run(params, config, embed(params, config, tokens, context), context, 0, config.n_layer)
    log_probs = jax.nn.log_softmax(unembed(params, config, jnp.take_along_axis(h, at[..., None], 1)), -1)
    chosen = jnp.take_along_axis(log_probs, answers[..., None], 2)[..., 0]
    return jnp.exp(jnp.sum(chosen * weights.astype(chosen.dtype), -1))
