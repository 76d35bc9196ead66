"""LoRA (Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models") as an editor: fine-tuning on the edits
themselves in which the change of a matrix is a product of two thin ones.

Published baselines train the queries' and values' projections; here it is the MLP's second one, so that the change is
one that patches hold. There is no dropout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from jaxedit.config import _check
from jaxedit.errors import JaxEditError
from jaxedit.export.patch import Delta, delta_dtype
from jaxedit.layer_loop import Progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import Decoder, mlp_output
from jaxedit.presets import preset_name
from jaxedit.tuning.epochs import Descent, checked_layers, tokenised, train
from jaxedit.types import EditRequest

# Epochs as published, with other matrices
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-xl": {"steps": 30},
    "gpt-j-6b": {"steps": 50},
    "llama-2-7b": {"steps": 70},
    "llama-3-8b": {"steps": 70},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraEditor:
    """Settings.

    layers: those whose MLP's second projection gets a change ``alpha / rank · A B``; None: all of them.
    rank, alpha: A is ``[d_ff, rank]``, drawn from ±1/√d_ff evenly, and B ``[rank, d_model]`` begins at 0.
    lr, steps: Adam's rate, and the most epochs. batch: edits that share an update; None: all of them.
    stop: an update whose loss is below it is not made, and the epoch whose mean is, is the last; 0 for never, as
        published.
    """

    name: ClassVar[str] = "lora"

    layers: tuple[int, ...] | None = None
    rank: int = 8
    alpha: float = 32.0
    lr: float = 5e-3
    steps: int = 50
    batch: int | None = 32
    stop: float = 0.0

    def __post_init__(self):
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        _check(self, positive=("lr", "alpha"), not_negative=("stop",))
        if self.rank < 1 or self.steps < 1 or (self.batch is not None and self.batch < 1):
            raise JaxEditError(
                f"LoraEditor.rank, steps and batch must be at least 1, got {self.rank}, {self.steps} and {self.batch}"
            )

    def layers_in(self, config: ModelConfig) -> tuple[int, ...]:
        """The layers in a model. Raises JaxEditError where it does not have them."""
        return checked_layers(range(config.n_layer) if self.layers is None else self.layers, config)

    def edit(
        self,
        model: Decoder,
        tokenizer,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        on_progress: Progress | None = None,
    ) -> tuple[dict[int, Delta], dict[str, np.ndarray]]:
        """The changes of the layers' second projections, as factors ``[d_ff, rank]`` and ``[rank, d_model]``; the model
        stays as it is.

        model: without adapters; it may be edited already. seed: of A, and of the order of edits, the same in every
        epoch. on_progress is told of "epochs". Factors and what they add are float32 (float64 for a float64 model).

        Returns the changes by layer, and traces as `FineTune.edit` does.
        Raises RequestError naming every request that cannot be carried out, JaxEditError where layers do not fit.
        """
        layers, config, dtype = self.layers_in(model.config), model.config, delta_dtype(model)
        bound, scale = config.d_ff**-0.5, self.alpha / self.rank
        shape = (len(layers), config.d_ff, self.rank)
        start = {
            "a": jax.random.uniform(jax.random.key(seed), shape, dtype, -bound, bound),
            "b": np.zeros((len(layers), self.rank, config.d_model), dtype),
        }
        how = Descent("target", self.lr, math.inf, self.stop, self.steps, self.batch)
        edits = tokenised(model, tokenizer, requests)
        found, traces = train(model, edits, layers, LowRank(scale), start, how, seed, on_progress)
        a, b = np.asarray(found["a"]) * dtype.type(scale), np.asarray(found["b"])
        return {l: Delta.of(a[i], b[i], dtype) for i, l in enumerate(layers)}, traces


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The MLP's output with ``scale · A B`` beside its second projection."""

    scale: float

    def __call__(self, block, factors, key):
        out, dtype = mlp_output(block, key), wide(key.dtype)
        more = (key.astype(dtype) @ factors["a"]) @ factors["b"]
        return (out + self.scale * more).astype(out.dtype)


def lora_for(config: ModelConfig, layers: Sequence[int] | None = None) -> LoraEditor:
    """The settings published for a model, or general ones; at `layers` where given."""
    made = LoraEditor(**PRESETS.get(preset_name(config) or "", {}))
    return made if layers is None else dataclasses.replace(made, layers=tuple(layers))
