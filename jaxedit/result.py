"""What `apply_edits` returns."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxedit.export.patch import EditPatch
from jaxedit.info import EditInfo
from jaxedit.models.transformer import Decoder
from jaxedit.solvers.prepare import Prepared
from jaxedit.statistics import SecondMoments
from jaxedit.targets.strategies import Targets


@dataclasses.dataclass(frozen=True)
class EditResult:
    """The edited model, the edits as a patch, and what happened.

    targets, keys, stats, factor: of methods that solve for weights; None (keys: empty) of the others.
    keys: per layer ``[n, d_ff]``, this edit's and all earlier ones': what a further `apply_edits` on this result
    protects. factor: what was solved with, which protects the earlier ones' already; a further `apply_edits` with the
    same solver and statistics absorbs the rest into it. To protect other keys, replace `keys` and set factor to None;
    that also frees its memory.
    """

    model: Decoder
    patch: EditPatch
    info: EditInfo
    targets: Targets | None
    keys: dict[int, np.ndarray]
    stats: SecondMoments | None
    factor: Prepared | None = None
