"""An independent fine-tuning: whole models, one edit a row, gradients of everything, and Adam in NumPy, all float64."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers_adapters import adapted_logits

from jaxedit.data.tokens import EditTokens, Row
from jaxedit.export.patch import make_patch, with_matrices
from jaxedit.models.transformer import Decoder


def edit_of(prompt, target) -> EditTokens:
    row = Row((*prompt, *target[:-1]), 0, len(target) - 1)
    return EditTokens((row,), row, tuple(target))


def as_float64(model: Decoder) -> Decoder:
    return model.with_params(jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model.params))


def nlls(params, config, pairs, objective="target"):
    """Of each edit, ``(prompt, target)`` token ids, the mean over the target's tokens ``[n]``."""
    length = max(len(p) + len(t) for p, t in pairs)
    tokens, mask = np.zeros((2, len(pairs), length), np.int32)
    for i, (prompt, target) in enumerate(pairs):
        row = [*prompt, *target]
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
    log_p = jax.nn.log_softmax(adapted_logits(params, config, tokens, mask, np.zeros(len(pairs), np.int32)))
    each = []
    for i, (prompt, target) in enumerate(pairs):
        last = len(prompt) - 1
        places = [last] * len(target) if objective == "last" else range(last, last + len(target))
        each.append(-sum(log_p[i, at, token] for at, token in zip(places, target, strict=True)) / len(target))
    return jnp.stack(each)


def with_change(params, change):
    """Parameters with ``change`` (layer: ``[d_ff, d_model]``) added to second projections."""
    down = params["blocks"]["down"]
    w = down["w"]
    for l, delta in change.items():
        w = w.at[l].add(delta)
    return {**params, "blocks": {**params["blocks"], "down": {**down, "w": w}}}


def adam(losses_of, start: dict, batch, lr, epochs, clamp=None):
    """Arrays after `epochs` rounds of updates, and the losses before each.

    losses_of: arrays to the losses of edits ``[n]``; batch ``[n]``: which of an epoch's updates each edit is in.
    """
    x = {k: np.asarray(v, np.float64) for k, v in start.items()}
    m = {k: np.zeros_like(v) for k, v in x.items()}
    v = {k: np.zeros_like(v) for k, v in x.items()}
    value_and_grad = jax.jit(jax.value_and_grad(lambda x, share: jnp.sum(losses_of(x) * share)))
    t, losses = 0, []
    for _ in range(epochs):
        for update in range(batch.max() + 1):
            now, grad = value_and_grad(x, (batch == update) / np.sum(batch == update))
            losses.append(float(now))
            t += 1
            for k in x:
                g = np.asarray(grad[k])
                m[k] = 0.9 * m[k] + 0.1 * g
                v[k] = 0.999 * v[k] + 0.001 * g * g
                x[k] = x[k] - lr * (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
                if clamp is not None:
                    x[k] = np.clip(x[k], -clamp, clamp)
    return x, np.asarray(losses).reshape(epochs, -1)


def patched(model: Decoder, requests, deltas):
    """The patch of some changes, and the edited model."""
    down = model.params["blocks"]["down"]["w"]
    patch, matrices = make_patch({"name": "test"}, requests, {l: np.asarray(down[l]) for l in deltas}, deltas)
    return patch, with_matrices(model, matrices)
