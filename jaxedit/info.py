"""What an edit reports about itself."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxedit.config import Method
from jaxedit.errors import JaxEditError
from jaxedit.plain import finite

if TYPE_CHECKING:
    from jaxedit.adapters.editors import Editor
    from jaxedit.passes import Passes
    from jaxedit.targets.strategies import Targets
    from jaxedit.tuning.named import Tuner


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One edited layer.

    residual_before, residual_after: norm of what is missing to the target at the *last* edited layer, before and
        after this layer is edited, as a ratio of what was missing at first (FE, Tables 2 and 5); mean over edits.
    key_norm: mean ‖k‖. update_norm: ‖ΔW‖ (Frobenius); relative_update_norm: over ‖W‖.
    solve_residual: of the normal equations, relative. condition: estimated condition number of what keys are added
        to, λC + l2·I or l2·I (NaN for NeuronSubset, where it is another matrix for other edits).
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

    method: or the settings of what does not solve for weights. Then there are no layers, and `trace` has arrays; which
    ones, the `edit` of these settings says.
    Per edit, ``[n]``: `updates` (Adam's), `final_loss`, `init_norm` ‖h‖ and `delta_norm` ‖δ‖ of the first anchor
    (None where targets without anchors were given); `probability_before` and `probability_after` of the whole
    target. remaining: ``[layers + 1, n]`` norm of the residual at the last edited layer, before the first edit and
    after each layer. seconds: wall-clock time by stage, compilation included.
    """

    method: Method | Editor | Tuner
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
    trace: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method's."""
        return self.method.name

    @property
    def solved(self) -> Method:
        """The method, of one that solves for weights. Raises JaxEditError of another."""
        if not isinstance(self.method, Method):
            raise JaxEditError(f"{self.name!r} does not solve for weights; this is about methods that do")
        return self.method

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""

        def plain(x):
            return x.tolist() if isinstance(x, np.ndarray) else x

        made = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "method"}
        made["layers"] = [dataclasses.asdict(l) for l in self.layers]
        made["trace"] = {name: finite(x.tolist()) for name, x in self.trace.items()}
        return {"method": self.name, **made}


def make_info(method: Method, templates, targets: Targets, work: Passes, matrices, chances, seconds) -> EditInfo:
    """The report of an edit.

    work: its passes; matrices: what was written, per layer; chances: probabilities of the targets ``[n]`` before and
    after.
    """
    rows = []
    start = np.where(work.remaining[0] == 0, 1, work.remaining[0])
    ratios = np.nanmean(work.remaining / start, axis=1)
    for i, l in enumerate(method.layers):
        delta = work.deltas[l].dense()
        original = work.originals[l].astype(np.float64)
        size = float(np.linalg.norm(delta))
        rounding = float(np.linalg.norm(matrices[l].astype(np.float64) - original - delta))
        rows.append(
            LayerInfo(
                layer=l,
                residual_before=float(ratios[i]),
                residual_after=float(ratios[i + 1]),
                key_norm=float(np.concatenate(work.norms[l]).mean()),
                update_norm=size,
                relative_update_norm=size / float(np.linalg.norm(original)),
                solve_residual=work.residuals[l],
                condition=work.condition[l],
                rounding_loss=rounding / size if size else 0.0,
            )
        )
    anchor = next(iter(targets.anchors.values()), None)
    return EditInfo(
        method=method,
        templates=templates,
        layers=tuple(rows),
        remaining=work.remaining,
        targets_given=work.targets_given,
        updates=None if anchor is None else anchor.updates,
        final_loss=None if anchor is None else anchor.final_loss,
        init_norm=None if anchor is None else np.linalg.norm(anchor.init, axis=-1),
        delta_norm=None if anchor is None else np.linalg.norm(anchor.value - anchor.init, axis=-1),
        probability_before=chances[0],
        probability_after=chances[1],
        seconds=dict(seconds),
    )
