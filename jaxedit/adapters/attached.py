"""Models with adapters: attaching them, taking them off, and adapters as plain data and arrays for files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.errors import PatchError
from jaxedit.models.sites import Adapter
from jaxedit.models.transformer import Decoder

# Where each kind lives; imported when a file holds one.
_HOMES = {
    "Neurons": "ireva_neurons",
    "Cache": "caching",
    "GraceState": "grace",
    "MeloState": "melo",
    "WiseState": "wise",
}


def adapters_of(model: Decoder) -> tuple[Adapter, ...]:
    """The adapters of a model, in the order in which they act at a site."""
    return tuple(model.params.get("adapters", ()))


def attach(model: Decoder, *adapters: Adapter) -> Decoder:
    """The model with more adapters, behind those it has. Weights are shared, not copied."""
    every = (*adapters_of(model), *adapters)
    return model.with_params({**model.params, "adapters": every}) if every else model


def detach(model: Decoder) -> Decoder:
    """The model without adapters: bit for bit the one that they were attached to."""
    return model.with_params({name: x for name, x in model.params.items() if name != "adapters"})


def to_plain(adapter: Adapter) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """An adapter as JSON (its kind and what is static) and as arrays by field."""
    plain: dict[str, Any] = {"kind": type(adapter).__name__}
    arrays = {}
    for field in dataclasses.fields(adapter):  # type: ignore[arg-type]
        value = getattr(adapter, field.name)
        if isinstance(value, jax.Array | np.ndarray):
            arrays[field.name] = np.asarray(value)
        elif value is not None:
            plain[field.name] = value
    return plain, arrays


def from_plain(plain: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Adapter:
    """What `to_plain` gave. Raises PatchError on a kind or a field that is not known."""
    name = plain.get("kind")
    if name not in _HOMES:
        raise PatchError(f"adapter of kind {name!r} is not known here; the known ones are {sorted(_HOMES)}")
    kind = getattr(import_module(f"jaxedit.adapters.{_HOMES[name]}"), name)
    names = {f.name for f in dataclasses.fields(kind)}
    static = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items() if k != "kind"}
    unknown = sorted((set(static) | set(arrays)) - names)
    if unknown:
        raise PatchError(f"adapter of kind {plain['kind']!r}: unknown fields {unknown}; a newer version may have them")
    return kind(**static, **{name: jnp.asarray(x) for name, x in arrays.items()})


def same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters are the same to the last bit."""
    (mine, a), (theirs, b) = to_plain(one), to_plain(other)
    return mine == theirs and a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
