"""Groups of edits with goals of their own, solved together: edit these, keep these as they are, forget these.

With keys K_g, residuals R_g and weight w_g of each group g, the joint solve is

    ΔW = argmin Σ_g w_g ‖K_g ΔW − R_g‖² + λ tr(ΔWᵀ C ΔW) = (λC + Σ_g w_g K_gᵀK_g)⁻¹ Σ_g w_g K_gᵀR_g,

and solving one group after the other, with the keys of each added to λC, gives the same. The sum over groups of
``(λC_g + K_gᵀK_g)⁻¹ K_gᵀR_g`` was published for groups with second moments of their own (with a residual divided by
the layers left, as BackwardSpread does). It is the joint minimiser only where keys of different groups are
orthogonal in the metric (λC)⁻¹; elsewhere each group is edited as if the others were not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Literal

import numpy as np

from jaxedit.config import Method
from jaxedit.edit import EditResult, edit_grouped
from jaxedit.errors import JaxEditError
from jaxedit.layer_loop import Progress
from jaxedit.models.transformer import Decoder
from jaxedit.passes import Grouping
from jaxedit.solvers.prepare import Prepared
from jaxedit.statistics import SecondMoments
from jaxedit.targets.strategies import Targets
from jaxedit.types import EditRequest

_GOALS = {"edit": "say", "keep": "keep", "forget": "forget"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditGroup:
    """Requests with one goal.

    goal: "edit", the model is to say the target; "forget", it is to stop saying it; "keep", what it makes of the prompt
        is to stay as it is, whatever the target (a request's target may then be what it says today).
    weight: of each request in the solve, in units of one ordinary edit.
    stats: second moments of what this group is not to disturb, where that is not what `apply_groups` is given. The
        joint solve pools those of all groups by the tokens that they counted.
    """

    requests: Sequence[EditRequest]
    goal: Literal["edit", "keep", "forget"] = "edit"
    weight: float = 1.0
    stats: SecondMoments | None = None

    def __post_init__(self):
        object.__setattr__(self, "requests", tuple(self.requests))
        if self.goal not in _GOALS:
            raise JaxEditError(f"EditGroup.goal must be one of {', '.join(_GOALS)}; got {self.goal!r}")
        if not 0 < self.weight < np.inf:
            raise JaxEditError(f"EditGroup.weight must be positive and finite, got {self.weight}")
        if not self.requests:
            raise JaxEditError("an EditGroup needs requests")


def apply_groups(
    model: Decoder | EditResult,
    tokenizer,
    groups: Sequence[EditGroup],
    method: str | Method = "fe",
    layers: Sequence[int] | None = None,
    stats: SecondMoments | None = None,
    targets: Targets | None = None,
    templates=None,
    *,
    combine: Literal["joint", "sum"] = "joint",
    factor: Prepared | None = None,
    anchor_cache: Path | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> EditResult:
    """Write all groups into the model at once. The result's edits are in the order of the groups.

    combine: "joint", or "sum" as published; see the module. targets: of all requests in that order, in the place of
    what the goals say. factor: for `stats`, so not with pooled ones.
    Everything else is as in `jaxedit.apply_edits`, and so are the errors raised.
    """
    groups = tuple(groups)
    if not groups or not all(isinstance(g, EditGroup) for g in groups):
        raise JaxEditError("groups must be a list of EditGroup, at least one")
    if combine not in ("joint", "sum"):
        raise JaxEditError(f"combine must be 'joint' or 'sum', got {combine!r}")
    replayed = isinstance(method, Method) and method.keys == "replayed"
    if combine == "sum" and replayed:
        raise JaxEditError("combine='sum' solves layer by layer; use keys='recomputed'")
    requests = tuple(r for g in groups for r in g.requests)
    ends = np.cumsum([len(g.requests) for g in groups])
    parts = tuple(np.split(np.arange(len(requests)), ends[:-1]))
    own = tuple(g.stats for g in groups)
    if combine == "joint":
        stats, parts, own = _pooled(own, stats), (np.arange(len(requests)),), (None,)
    weights = np.concatenate([np.full(len(g.requests), g.weight, float) for g in groups])
    goals = tuple(_GOALS[g.goal] for g in groups for _ in g.requests)
    return edit_grouped(
        *(model, tokenizer, requests, method, Grouping(weights, parts, own, goals), layers, stats, targets, templates),
        factor=factor,
        anchor_cache=anchor_cache,
        seed=seed,
        on_progress=on_progress,
    )


def _pooled(own: Sequence[SecondMoments | None], stats: SecondMoments | None) -> SecondMoments | None:
    """The second moments of all that any group protects."""
    given = [s for s in own if s is not None]
    if not given:
        return stats
    if len(given) < len(own):
        if stats is None:
            raise JaxEditError("some groups have second moments of their own and some have not: pass stats= for those")
        given.append(stats)
    return reduce(SecondMoments.merge, {id(s): s for s in given}.values())
