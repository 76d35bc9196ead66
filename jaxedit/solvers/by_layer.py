"""What a solver prepared for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from jaxedit.errors import JaxEditError

Part = TypeVar("Part")


class ByLayer(Generic[Part]):
    """`parts` by layer; asking for another layer is an error that says which there are."""

    parts: Mapping[int, Part]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.parts)

    def __getitem__(self, layer: int) -> Part:
        try:
            return self.parts[layer]
        except KeyError:
            raise JaxEditError(f"the {type(self).__name__} has layers {list(self.layers)}, not layer {layer}") from None
