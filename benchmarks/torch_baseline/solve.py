"""The update of one layer: ``(λC + KᵀK) ΔW = KᵀR`` (MEMIT, eq. 14), solved in float64 from scratch, as published."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def updates(second_moment, keys: Tensor, residuals: Tensor, cov_weight: float) -> Tensor:
    """``ΔW [d_ff, d_model]``, float64, for keys ``[n, d_ff]`` and residuals ``[n, d_model]``.

    second_moment: ``[d_ff, d_ff]``, a tensor or an array; one that is on the keys' device is not copied there.
    """
    k, r = keys.double(), residuals.double()
    if not isinstance(second_moment, Tensor):
        second_moment = torch.from_numpy(np.array(second_moment, np.float64))
    a = second_moment.to(keys.device).double() * cov_weight
    return torch.linalg.solve(a.addmm_(k.T, k), k.T @ r)
