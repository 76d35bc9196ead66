"""Editors that add parameters, by name, with their published settings."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxedit.adapters import grace, ireva, melo, wise
from jaxedit.adapters.caching import Cache, CachingEditor
from jaxedit.adapters.grace import Grace, GraceState
from jaxedit.adapters.ireva import IReVa
from jaxedit.adapters.ireva_neurons import Neurons
from jaxedit.adapters.melo import Melo, MeloState
from jaxedit.adapters.wise import Wise, WiseState
from jaxedit.errors import JaxEditError
from jaxedit.models.config import ModelConfig
from jaxedit.plain import built, plain_fields
from jaxedit.presets import EDITORS, preset_name

Editor = IReVa | CachingEditor | Grace | Melo | Wise

_EDITORS: dict[str, tuple[type, type, dict[str, dict]]] = {  # settings, state, presets
    "ireva": (IReVa, Neurons, ireva.PRESETS),
    "cache": (CachingEditor, Cache, {}),
    "grace": (Grace, GraceState, grace.PRESETS),
    "melo": (Melo, MeloState, melo.PRESETS),
    "wise": (Wise, WiseState, wise.PRESETS),
}


def editor_for(name: str, config: ModelConfig, layers: Sequence[int] | None = None) -> Editor:
    """The editor of this name with the settings published for a model, or its general ones.

    layers: instead of the editor's. Raises JaxEditError on an unknown name, and on layers for one that has none.
    """
    if name not in _EDITORS:
        near = difflib.get_close_matches(name, EDITORS, 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise JaxEditError(f"unknown editor {name!r}{meant}\nknown: {', '.join(EDITORS)}")
    kind, _, presets = _EDITORS[name]
    made = kind(**presets.get(preset_name(config) or "", {}))
    return made if layers is None else at_layers(made, layers)


def editor_of(method: Any, config: ModelConfig, layers: Sequence[int] | None = None) -> Editor | None:
    """The editor that a name or settings stand for, at `layers` where given; None for anything else."""
    if isinstance(method, str):
        return editor_for(method, config, layers) if method in EDITORS else None
    if not isinstance(method, Editor):
        return None
    return method if layers is None else at_layers(method, layers)


def state_of(editor: Editor) -> type:
    """What it attaches."""
    return _EDITORS[editor.name][1]


def describe_editor(editor: Editor) -> dict[str, Any]:
    """The editor as plain data, for patches, ledgers and reports."""
    return {"name": editor.name, **plain_fields(editor)}


def editor_from_plain(plain: Mapping[str, Any]) -> Editor | None:
    """The editor that `describe_editor` described; None where the name is not an editor's. Raises JaxEditError on
    fields or values that are not known."""
    if plain.get("name") not in EDITORS:
        return None
    kind, *_ = _EDITORS[plain["name"]]
    return built(kind, {k: v for k, v in plain.items() if k != "name"}, plain["name"])


def at_layers(editor: Editor, layers: Sequence[int]) -> Editor:
    """The editor at other layers. Raises JaxEditError where it stands at no layer of choice."""
    if isinstance(editor, CachingEditor):
        raise JaxEditError(f"CachingEditor stands behind the last layer; got layers {tuple(layers)}")
    return dataclasses.replace(editor, layers=tuple(layers))
