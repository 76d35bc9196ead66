"""Editors that add parameters, by name, with their published settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxedit.adapters import caching, grace, ireva, melo, wise
from jaxedit.adapters.caching import CachingEditor
from jaxedit.adapters.grace import Grace
from jaxedit.adapters.ireva import IReVa
from jaxedit.adapters.melo import Melo
from jaxedit.adapters.wise import Wise
from jaxedit.errors import JaxEditError
from jaxedit.models.config import ModelConfig
from jaxedit.presets import preset_name

Editor = IReVa | CachingEditor | Grace | Melo | Wise

_EDITORS: dict[str, tuple[type, Any]] = {
    "ireva": (IReVa, ireva),
    "cache": (CachingEditor, caching),
    "grace": (Grace, grace),
    "melo": (Melo, melo),
    "wise": (Wise, wise),
}
EDITORS = tuple(_EDITORS)


def editor_for(name: str, config: ModelConfig, layers: Sequence[int] | None = None) -> Editor:
    """The editor of this name with the settings published for a model, or its general ones.

    layers: instead of the editor's. Raises JaxEditError on an unknown name, and on layers for one that has none.
    """
    if name not in _EDITORS:
        raise JaxEditError(f"unknown editor {name!r}; the known ones are {', '.join(EDITORS)}")
    kind, module = _EDITORS[name]
    made = kind(**getattr(module, "PRESETS", {}).get(preset_name(config) or "", {}))
    return made if layers is None else at_layers(made, layers)


def at_layers(editor: Editor, layers: Sequence[int]) -> Editor:
    """The editor at other layers. Raises JaxEditError where it stands at no layer of choice."""
    if isinstance(editor, CachingEditor):
        raise JaxEditError(f"CachingEditor stands behind the last layer; got layers {tuple(layers)}")
    return dataclasses.replace(editor, layers=tuple(layers))
