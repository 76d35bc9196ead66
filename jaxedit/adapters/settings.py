"""What the configurations of adapters share: a layer of choice, and a state to go on from."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxedit.errors import JaxEditError
from jaxedit.models.config import ModelConfig


def check_one_layer(of: Any):
    """Make `layers` of a configuration a tuple. Raises JaxEditError unless it is None or one layer."""
    if of.layers is None:
        return
    object.__setattr__(of, "layers", tuple(of.layers))
    if len(of.layers) != 1:
        raise JaxEditError(f"{type(of).__name__}.layers must be one layer, got {of.layers}")


def chosen_layer(of: Any, config: ModelConfig, otherwise: int) -> int:
    """The one layer of a configuration, `otherwise` where that leaves it open. Raises JaxEditError where a model does
    not have it."""
    index = otherwise if of.layers is None else of.layers[0]
    if not 0 <= index < config.n_layer:
        raise JaxEditError(f"layer {index} is out of range: the model has layers 0 to {config.n_layer - 1}")
    return index


def check_goes_on(state: Any, empty: Any):
    """Raise JaxEditError where edits of the configuration and model that `empty` is of cannot join those of `state`."""
    if state is None:
        return
    if type(state) is not type(empty):
        raise JaxEditError(f"the state to go on from is a {type(state).__name__}, not a {type(empty).__name__}")
    pairs = {f.name: (getattr(empty, f.name), getattr(state, f.name)) for f in dataclasses.fields(empty)}
    for name, (mine, its) in pairs.items():
        if mine is not None and not isinstance(mine, jax.Array) and mine != its:
            raise JaxEditError(f"the state to go on from has {name}={its!r}, and these settings {name}={mine!r}")
    for name, (mine, its) in pairs.items():
        if isinstance(mine, jax.Array) and name != "labels" and mine.shape[1:] != its.shape[1:]:
            raise JaxEditError(
                f"the state to go on from has {name} of shape {its.shape[1:]}; these settings, or this model, need "
                f"{mine.shape[1:]}"
            )
