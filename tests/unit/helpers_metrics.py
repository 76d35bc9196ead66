"""Shared by the tests of metrics: another model to compare with, and logits of single rows."""

import jax.numpy as jnp
import numpy as np

from jaxedit.evaluation.batching import pad
from jaxedit.models.transformer import Decoder, logits


def shaken(model: Decoder, scale=0.05, seed=0) -> Decoder:
    """The model with noise on its last MLP matrices."""
    params = model.params
    down = params["blocks"]["down"]
    noise = np.random.default_rng(seed).normal(size=down["w"].shape) * scale
    blocks = params["blocks"] | {"down": down | {"w": down["w"] + jnp.asarray(noise, down["w"].dtype)}}
    return model.with_params(params | {"blocks": blocks})


def row_logits(model: Decoder, ids, length=40) -> np.ndarray:
    """Float64 logits ``[tokens, vocab]`` of one row by itself; one shape, so that it is compiled once."""
    tokens, mask = pad([ids], length)
    return np.asarray(logits(model, tokens, mask)[0, : len(ids)], np.float64)
