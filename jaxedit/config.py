"""How an edit is made: frozen dataclasses that fill the slots of the pipeline, and presets per model."""

from __future__ import annotations

import dataclasses
import math

from jaxedit.errors import JaxEditError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """How anchors are optimised (see `jaxedit.targets.anchor`).

    steps: loss evaluations, so at most ``steps - 1`` updates. lr: Adam's. clamp: largest ‖δ‖ as a multiple of
    ‖h‖. threshold: an edit stops when its loss is below it.
    tokens_per_step: suffix tokens optimised together, None for a default of the device; bounds memory.
    bucket_growth: largest over smallest suffix in a bucket of edits that one step cannot take together: fewer
        compilations against more padding.
    resident_rounds: edits held on the device, as a multiple of those optimised together.
    """

    steps: int = 25
    lr: float = 0.5
    clamp: float = 0.75
    kl_weight: float = 0.0625
    weight_decay: float = 0.5
    threshold: float = 5e-2
    tokens_per_step: int | None = None
    bucket_growth: float = 1.25
    resident_rounds: int = 8

    def __post_init__(self):
        for name in ("lr", "clamp", "threshold"):
            if not 0 < getattr(self, name) < math.inf:
                raise JaxEditError(f"AnchorConfig.{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("kl_weight", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise JaxEditError(f"AnchorConfig.{name} must be finite and not negative, got {getattr(self, name)}")
        if self.steps < 1 or self.resident_rounds < 1 or self.bucket_growth < 1:
            raise JaxEditError("AnchorConfig.steps, resident_rounds and bucket_growth must be at least 1")
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            raise JaxEditError(f"AnchorConfig.tokens_per_step must be positive, got {self.tokens_per_step}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardSpread:
    """An anchor at the last edited layer; the residual that remains there is spread over the layers left to edit.

    divide: by the number of layers left (True, MEMIT), by its square root ("sqrt", PMET), or not at all (False).
    """

    divide: bool | str = True

    def __post_init__(self):
        if self.divide not in (True, False, "sqrt"):
            raise JaxEditError(f"BackwardSpread.divide must be True, False or 'sqrt', got {self.divide!r}")

    def anchor_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        return layers[-1:]

    def share(self, layers_left: int) -> float:
        """What part of the residual the next layer takes, with `layers_left` of them still to edit."""
        return {True: 1 / layers_left, False: 1.0, "sqrt": layers_left**-0.5}[self.divide]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardReplay:
    """An anchor at the first edited layer; later targets are what the model makes of it (FE, §5)."""

    def anchor_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        return layers[:1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerLayer:
    """An anchor of its own at each edited layer, found on the model as edited so far (BLUE)."""

    def anchor_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        return layers


Strategy = BackwardSpread | ForwardReplay | PerLayer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ridge:
    """``ΔW = (λC + l2·I + KᵀK)⁻¹ KᵀR`` with λ = `cov_weight` (MEMIT, eq. 14; FE, eq. 5)."""

    cov_weight: float = 15000.0
    l2: float = 0.0

    def __post_init__(self):
        for name in ("cov_weight", "l2"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise JaxEditError(f"Ridge.{name} must be finite and not negative, got {value}")
        if self.cov_weight == 0 and self.l2 == 0:
            raise JaxEditError("Ridge needs cov_weight > 0 or l2 > 0; with neither nothing protects other knowledge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One locate-then-edit method: where targets come from, how they are solved for, and in which layers.

    keys: "recomputed" takes each layer's keys after the layers below are edited (as published); "replayed" takes
        all keys from the replay of the anchor, so that every layer is factored and solved at once (ForwardReplay).
    """

    name: str
    targets: Strategy
    layers: tuple[int, ...]
    solver: Ridge = Ridge()
    anchor: AnchorConfig = AnchorConfig()
    keys: str = "recomputed"

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or min(self.layers) < 0:
            raise JaxEditError(f"layers must be different, not negative, and in rising order, got {self.layers}")
        if self.keys not in ("recomputed", "replayed"):
            raise JaxEditError(f"keys must be 'recomputed' or 'replayed', got {self.keys!r}")
        if self.keys == "replayed" and not isinstance(self.targets, ForwardReplay):
            raise JaxEditError("keys='replayed' needs targets made by ForwardReplay")
