"""Fine-tuning baselines by name, with their published settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxedit.errors import JaxEditError
from jaxedit.models.config import ModelConfig
from jaxedit.presets import TUNERS
from jaxedit.tuning.finetune import FineTune, fine_tune_for
from jaxedit.tuning.lora import LoraEditor, lora_for

Tuner = FineTune | LoraEditor


def tuner_for(name: str, config: ModelConfig, layers: Sequence[int] | None = None) -> Tuner:
    """The settings of "ft", "ft_l", "ft_m" or "lora" published for a model, or general ones; at `layers` where given.

    Raises JaxEditError on another name.
    """
    if name not in TUNERS:
        raise JaxEditError(f"unknown fine-tuning {name!r}; the known ones are {', '.join(TUNERS)}")
    return lora_for(config, layers) if name == "lora" else fine_tune_for(name, config, layers)


def tuner_of(method: Any, config: ModelConfig, layers: Sequence[int] | None = None) -> Tuner | None:
    """The fine-tuning that a name or settings stand for, at `layers` where given; None for anything else."""
    if isinstance(method, str):
        return tuner_for(method, config, layers) if method in TUNERS else None
    if not isinstance(method, Tuner):
        return None
    return method if layers is None else dataclasses.replace(method, layers=tuple(layers))
