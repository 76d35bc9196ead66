"""Small models with random weights, for tests of what happens to matrices and not of what they say."""

import jax.numpy as jnp
import numpy as np

from jaxedit.models.config import ModelConfig, parameter_shapes
from jaxedit.models.conversion import nest
from jaxedit.models.transformer import Decoder


def small_llama(n_layer: int, d_model: int, d_ff: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab=11,
        d_model=d_model,
        d_ff=d_ff,
        n_layer=n_layer,
        n_head=2,
        n_kv_head=2,
        head_dim=4,
        max_positions=16,
        norm="rms",
        norm_eps=1e-5,
        act="silu",
        gated=True,
        windows=(0,) * n_layer,
    )


def random_weights(config: ModelConfig, dtype, seed: int) -> Decoder:
    rng = np.random.default_rng(seed)
    flat = {path: jnp.asarray(rng.normal(size=shape), dtype) for path, (shape, _) in parameter_shapes(config).items()}
    return Decoder(config, nest(flat))
