"""What iReVa's neurons say: for each target token, a direction that raises its logit."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve

from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import Params

_DAMPING = 1e-4  # of the mean of the vocabulary's second moments


def rows_of(params: Params, config: ModelConfig, ids) -> jax.Array:
    """The tokens' rows of the output embedding ``[n, d_model]``, as published; float32 (float64)."""
    table = _table(params, config)
    return jnp.take(table, jnp.asarray(ids), axis=0).astype(wide(table.dtype))


@partial(jax.jit, static_argnames=("config",))
def solved_values(params: Params, config: ModelConfig, ids) -> jax.Array:
    """Directions ``[n, d_model]`` that raise the tokens' logits and, in least squares, no others.

    With the rows E ``[vocab, d_model]`` of the output embedding as the final norm lets them be read, token i has
    ``(EᵀE/V + ε)⁻¹ eᵢ``, where ε is 1e-4 of the mean diagonal, at the root mean square length of the embedding's rows.
    A token's own row often raises others more: those with longer rows in much the same direction. Nothing depends on
    the other tokens asked for. Float32 (float64) at the highest precision.
    """
    table = _table(params, config)
    dtype = wide(table.dtype)
    scale = params["final_norm"]["scale"].astype(dtype)
    scale = scale + 1 if config.norm == "rms_plus_one" else scale
    moments = jnp.einsum("vi,vj->ij", table, table, preferred_element_type=dtype, precision="highest") / len(table)
    length = jnp.sqrt(jnp.trace(moments))
    moments, wanted = moments * scale * scale[:, None], table[ids].astype(dtype) * scale
    if config.norm == "layer":  # which cannot read what all channels share
        moments, wanted = _centred(_centred(moments).T), _centred(wanted)
    damping = _DAMPING * jnp.trace(moments) / len(moments)
    found = solve(moments + damping * jnp.eye(len(moments), dtype=dtype), wanted.T, assume_a="pos").T
    return length * found / jnp.linalg.norm(found, axis=-1, keepdims=True)


def _table(params: Params, config: ModelConfig):
    return params["embed"]["tokens"] if config.tied else params["unembed"]["w"]


def _centred(x):
    return x - x.mean(-1, keepdims=True)
