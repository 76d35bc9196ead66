"""iReVa (Zhu et al. 2024, "Initializing and Retrofitting Key-Value Adaptors for Traceable Model Editing"): one neuron
for each token of each target, beside the MLP of one layer.

A neuron's key is what the MLP reads at the last token before its target token, standardised; its value is the target
token's row of the output embedding, or what is solved for with all rows. It fires where what the MLP reads correlates
with its key by more than θ:

    z = k · s(x) - b,   b = θ ‖k₀‖² = θ (d - 1),   out = MLP(x) + α g(z) v,

g is the model's own activation. Without retrofitting nothing is optimised: one pass over the prompts and their targets
gives all neurons at once, and their order does not matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from jaxedit.adapters.ireva_neurons import SETTINGS, Neurons, standardised
from jaxedit.adapters.ireva_retrofit import retrofit
from jaxedit.adapters.ireva_values import rows_of, solved_values
from jaxedit.adapters.rows import FREE, ROOM, append, asked, read_last
from jaxedit.adapters.settings import check_goes_on, check_one_layer, chosen_layer
from jaxedit.adapters.training import mlp_entry, tokenised
from jaxedit.config import _check, _check_choice
from jaxedit.errors import JaxEditError
from jaxedit.layer_loop import Progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import Context, Decoder, Params
from jaxedit.types import EditRequest

# Published values; PARAREL was edited with θ = 0.65. The layers of GPT-J and Llama are not published. SmolLM2's are
# chosen on 256 zsRE edits that are not among those of the benchmark.
PRESETS: dict[str, dict] = {
    "gpt2-xl": {"layers": (46,)},
    "gpt2-large": {"layers": (34,), "irr_weight": 0.0},
    "gpt-neo-2.7b": {"layers": (30,), "alpha": 0.1},
    "gpt-j-6b": {"layers": (26,), "lr": 5e-3},
    "llama-3-8b": {"layers": (30,)},
    "smollm2-135m": {"layers": (29,), "values": "solved", "alpha": 5.0, "theta": 0.97},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IReVa:
    """How neurons are made and when they fire.

    layers: the one layer that they stand beside; None for the last but one (46 of 48 in GPT-2-XL, as published).
    values: "rows", the target tokens' rows of the output embedding, as published; or "solved", see
        `jaxedit.adapters.ireva_values`, for models where many tokens are not the likeliest one by their own rows.
    alpha: weight of their output. theta: the correlation at which they begin to fire, between 0 and 1.
    pool: "max", only the neuron that fires most adds its value (published for inference), or "sum", all do.
    gate: "activation", g itself, which is slightly negative just below θ; or "hard", zero wherever z <= 0.
    positions: "answer", every token from the last of the prompt on, as published for generation; or "last", that
        token alone, as published where each token of a target is scored in a row of its own.
    retrofit: optimise keys and values too ("+L"), with three losses: the target token's cross-entropy,
        ``rec_weight (k₀ · (k - k₀))²``, and `irr_weight` times the mean over texts out of scope of ``max(z, 0)``.
    steps, lr, betas, weight_decay: AdamW's. Published code has its library's weight decay, 0.01, where the paper says
        Adam. together: edits optimised at once; bounds memory, and changes results by rounding only.
    """

    name: ClassVar[str] = "ireva"
    separable: ClassVar[bool] = True  # whether one edit can be withdrawn from what was added

    layers: tuple[int, ...] | None = None
    values: Literal["rows", "solved"] = "rows"
    alpha: float = 0.2
    theta: float = 0.75
    pool: Literal["max", "sum"] = "max"
    gate: Literal["activation", "hard"] = "activation"
    positions: Literal["answer", "last"] = "answer"
    retrofit: bool = False
    rec_weight: float = 1e-3
    irr_weight: float = 1e-3
    steps: int = 5
    lr: float = 5e-2
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    together: int = 32

    def __post_init__(self):
        check_one_layer(self)
        object.__setattr__(self, "betas", tuple(self.betas))
        _check_choice(self, "values", ("rows", "solved"))
        _check_choice(self, "pool", ("max", "sum"))
        _check_choice(self, "gate", ("activation", "hard"))
        _check_choice(self, "positions", ("answer", "last"))
        _check(self, not_negative=("alpha", "rec_weight", "irr_weight", "lr", "weight_decay"))
        if not 0 < self.theta < 1:
            raise JaxEditError(f"IReVa.theta is a correlation between 0 and 1, got {self.theta}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise JaxEditError(f"IReVa.betas must be two numbers from 0 to below 1, got {self.betas}")
        if self.steps < 1 or self.together < 1:
            raise JaxEditError("IReVa.steps and together must be at least 1")

    def layer_in(self, config: ModelConfig) -> int:
        """The layer that neurons stand beside. Raises JaxEditError where the model does not have it."""
        return chosen_layer(self, config, max(config.n_layer - 2, 0))

    def empty(self, model: Decoder) -> Neurons:
        """No neurons yet, for a model."""
        dtype, d = wide(model.dtype), model.config.d_model
        return Neurons(
            keys=jnp.zeros((ROOM, d), dtype),
            values=jnp.zeros((ROOM, d), dtype),
            biases=jnp.zeros(ROOM, dtype),
            owner=jnp.full(ROOM, FREE, jnp.int32),
            given=jnp.zeros((), jnp.int32),
            layers=(self.layer_in(model.config),),
            act=model.config.act,
            **{name: getattr(self, name) for name in SETTINGS[2:]},
        )

    def edit(
        self,
        model: Decoder,
        tokenizer,
        requests: Sequence[EditRequest],
        *,
        state: Neurons | None = None,
        seed: int = 0,
        on_progress: Progress | None = None,
    ) -> tuple[Neurons, dict[str, np.ndarray]]:
        """Neurons for every target token of `requests`, behind those of `state`.

        model: without adapters. seed: of the texts out of scope. on_progress is told of "keys" and "retrofit".
        Returns the neurons, and of each edit ``rows [n]``, how many it has; where retrofitted also ``losses [n,
        steps, 3]``, the terms before each update, mean over its neurons, and ``crosstalk [n]``, the largest part of the
        MLP's output that earlier neurons add at its prompts, relative to it.

        Keys and values are float32 (float64 for a float64 model), whatever the dtype of the weights.
        Raises RequestError naming every request that cannot be carried out, JaxEditError where `state` is of another
        configuration.
        """
        config, empty = model.config, self.empty(model)
        check_goes_on(state, empty)
        state = empty if state is None else state
        edits, first = tokenised(model, tokenizer, requests), int(state.given)
        found = read_last(_keys, model, asked(edits), self.layer_in(config), on_progress=on_progress)
        keys = jnp.asarray(np.concatenate(found))
        ids = np.asarray([token for edit in edits for token in edit.target], np.int32)
        counts = np.asarray([len(edit.target) for edit in edits])
        valued = rows_of if self.values == "rows" else solved_values
        new = {
            "keys": keys,
            "values": valued(model.params, config, ids).astype(keys.dtype),
            "biases": self.theta * jnp.sum(keys * keys, -1),
            "owner": jnp.asarray(first + np.repeat(np.arange(len(edits)), counts), jnp.int32),
        }
        columns = append({name: getattr(state, name) for name in new}, new)
        made = dataclasses.replace(empty, **columns, given=jnp.asarray(first + len(edits), jnp.int32))
        trace: dict[str, np.ndarray] = {"rows": counts}
        if self.retrofit:
            made, more = retrofit(self, model, tokenizer, requests, edits, made, keys, seed, on_progress)
            trace |= more
        return made, trace


def _keys(params: Params, config: ModelConfig, tokens, context: Context, index: int):
    x = mlp_entry(params, config, tokens, context, index)[0]
    return standardised(x.astype(wide(x.dtype)))
