"""Fine-tuning of one or more MLPs' second projections on the edits themselves: the baseline of every editing method.

FT-L, as in Meng et al. 2022 ("Locating and Editing Factual Associations in GPT"), keeps every entry of the change
within a bound, and reads all tokens of a target off the prompt's last token, which is their likelihood only where the
target is one token. FT-M, as in Zhang et al. 2024 ("A Comprehensive Study of Knowledge Editing for Large Language
Models"), is the likelihood of the target after the prompt, without a bound. FT is the same in small batches on one of
the last layers with a wide bound, as iReVa (Zhu et al. 2024) compares itself with.

Published settings also have the first projection of the same MLP; here it is the second alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxedit.config import _check, _check_choice
from jaxedit.errors import JaxEditError
from jaxedit.export.patch import Delta, delta_dtype
from jaxedit.layer_loop import Progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import linear
from jaxedit.models.transformer import Decoder
from jaxedit.presets import preset_name
from jaxedit.tuning.epochs import OBJECTIVES, Descent, checked_layers, tokenised, train
from jaxedit.types import EditRequest

_FT_L_ABOVE: dict[str, Any] = {"layers": (21,), "clamp": None}  # as EasyEdit has it: no bound at all

# Of each method, and what differs from it for some models. The bound of "ft" is that of published code.
GENERAL: dict[str, dict[str, Any]] = {
    "ft": {"lr": 1e-4, "steps": 20, "clamp": 5e-2},
    "ft_l": {"layers": (0,), "objective": "last", "clamp": 5e-4},
    "ft_m": {},
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "ft": {
        "gpt2-xl": {"layers": (46,)},
        "smollm2-135m": {"layers": (28,), "lr": 2e-3, "steps": 25},  # chosen on 64 zsRE edits
    },
    "ft_l": {
        "gpt2-xl": {},
        "gpt-j-6b": {"clamp": 5e-5},
        "llama-2-7b": _FT_L_ABOVE,
        "llama-3-8b": _FT_L_ABOVE,
        "mistral-7b": {"layers": (21,), "clamp": 5e-5},
    },
    "ft_m": {name: {"layers": (21,)} for name in ("gpt-j-6b", "llama-2-7b", "llama-3-8b", "mistral-7b")},
}
METHODS = tuple(GENERAL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTune:
    """Settings.

    name: what reports call it.
    layers: those whose MLP's second projection is trained; None: one, 21 parts of 32 up, as published for Llama.
    objective: "target", the loss is the negative log-likelihood of the target's tokens after the prompt, mean over
        them; "last", each of them is predicted at the prompt's last token instead.
    clamp: the largest size of an entry of the change; None for no bound. It holds for each call by itself.
    lr, steps: Adam's rate, and the most epochs. batch: edits that share an update; None: all of them.
    stop: an update whose loss is below it is not made, and the epoch whose mean is, is the last.
    """

    name: str = "ft"
    layers: tuple[int, ...] | None = None
    objective: Literal["target", "last"] = "target"
    clamp: float | None = None
    lr: float = 5e-4
    steps: int = 25
    batch: int | None = 32
    stop: float = 1e-2

    def __post_init__(self):
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        _check_choice(self, "objective", OBJECTIVES)
        _check(self, positive=("lr",) if self.clamp is None else ("lr", "clamp"), not_negative=("stop",))
        if self.steps < 1 or (self.batch is not None and self.batch < 1):
            raise JaxEditError(f"FineTune.steps and batch must be at least 1, got {self.steps} and {self.batch}")

    def layers_in(self, config: ModelConfig) -> tuple[int, ...]:
        """The layers in a model. Raises JaxEditError where it does not have them."""
        return checked_layers((21 * config.n_layer // 32,) if self.layers is None else self.layers, config)

    def edit(
        self,
        model: Decoder,
        tokenizer,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        on_progress: Progress | None = None,
    ) -> tuple[dict[int, Delta], dict[str, np.ndarray]]:
        """The changes of the layers' second projections ``[d_ff, d_model]``; the model stays as it is.

        model: without adapters; it may be edited already. seed: of the order of edits, the same in every epoch.
        on_progress is told of "epochs". Changes are float32 (float64 for a float64 model); the forward pass has them
        added to the weights and rounded to the model's dtype, as the edited model will.

        Returns the changes by layer, and "losses" ``[epochs, updates]``, before each update; "updates", how many were
        made; and of each edit "batch", which of an epoch's updates it is in.
        Raises RequestError naming every request that cannot be carried out, JaxEditError where layers do not fit.
        """
        layers, config, dtype = self.layers_in(model.config), model.config, delta_dtype(model)
        start = np.zeros((len(layers), config.d_ff, config.d_model), dtype)
        clamp = math.inf if self.clamp is None else self.clamp
        how = Descent(self.objective, self.lr, clamp, self.stop, self.steps, self.batch)
        edits = tokenised(model, tokenizer, requests)
        found, traces = train(model, edits, layers, changed, start, how, seed, on_progress)
        return {l: Delta(np.asarray(found[i])) for i, l in enumerate(layers)}, traces


def changed(block, delta, key):
    """The MLP's output of keys ``[…, d_ff]`` with ``delta [d_ff, d_model]`` added to its second projection."""
    w = block["down"]["w"]
    return linear(key, {**block["down"], "w": (w + delta).astype(w.dtype)})


def fine_tune_for(name: str, config: ModelConfig, layers: Sequence[int] | None = None) -> FineTune:
    """The settings of "ft", "ft_l" or "ft_m" published for a model, or general ones; at `layers` where given.

    "ft" without a preset has the last layer but one. Raises JaxEditError on another name.
    """
    if name not in GENERAL:
        raise JaxEditError(f"unknown method {name!r}; the known ones are {', '.join(METHODS)}")
    settings: dict[str, Any] = {"layers": (max(config.n_layer - 2, 0),)} if name == "ft" else {}
    made = FineTune(name=name, **settings | GENERAL[name] | PRESETS[name].get(preset_name(config) or "", {}))
    return made if layers is None else dataclasses.replace(made, layers=tuple(layers))
