"""What an edit reports about itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxedit.config import Method


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One edited layer.

    residual_before, residual_after: norm of what is missing to the target at the *last* edited layer, before and
        after this layer is edited, as a ratio of what was missing at first (FE, Tables 2 and 5); mean over edits.
    key_norm: mean ‖k‖. update_norm: ‖ΔW‖ (Frobenius); relative_update_norm: over ‖W‖.
    solve_residual: of the normal equations, relative. condition: estimated condition number of λC + l2·I.
    rounding_loss: ‖written − exact‖ / ‖ΔW‖, what rounding to the model's dtype took away.
    """

    layer: int
    residual_before: float
    residual_after: float
    key_norm: float
    update_norm: float
    relative_update_norm: float
    solve_residual: float
    condition: float
    rounding_loss: float


@dataclasses.dataclass(frozen=True)
class EditInfo:
    """What happened to each edit and in each layer.

    Per edit, ``[n]``: `updates` (Adam's), `final_loss`, `init_norm` ‖h‖ and `delta_norm` ‖δ‖ of the first anchor
    (None where targets without anchors were given); `probability_before` and `probability_after` of the whole
    target. remaining: ``[layers + 1, n]`` norm of the residual at the last edited layer, before the first edit and
    after each layer. seconds: wall-clock time by stage, compilation included.
    """

    method: Method
    templates: tuple[tuple[str, ...], ...]
    layers: tuple[LayerInfo, ...]
    remaining: np.ndarray
    targets_given: bool
    updates: np.ndarray | None
    final_loss: np.ndarray | None
    init_norm: np.ndarray | None
    delta_norm: np.ndarray | None
    probability_before: np.ndarray
    probability_after: np.ndarray
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""

        def plain(x):
            return x.tolist() if isinstance(x, np.ndarray) else x

        made = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "method"}
        made["layers"] = [dataclasses.asdict(l) for l in self.layers]
        return {"method": self.method.name, **made}
