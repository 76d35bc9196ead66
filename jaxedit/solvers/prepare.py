"""One interface to all solvers: prepare once for a model's second moments, protect keys, solve layer by layer.

| solver | prepared | of a layer |
|---|---|---|
| Ridge, EqualityConstrained | Factor | Cholesky factor of λC + l2·I |
| NullSpace | Projections | basis of the null space |
| NeuronSubset | Moments | the second moment itself |
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jax.sharding import Mesh

from jaxedit.config import EqualityConstrained, NullSpace, Ridge, Solver
from jaxedit.solvers.constrained import solve_constrained
from jaxedit.solvers.factors import Factor, factorise
from jaxedit.solvers.neurons import Moments, gather_moments, protect_moments, solve_subset
from jaxedit.solvers.nullspace import Projections, project, protect_projected, solve_projected
from jaxedit.solvers.ridge import Solution, protect, solve, solve_all

Prepared = Factor | Projections | Moments


def prepare(solver: Solver, second_moments, layers: tuple[int, ...], *, mesh: Mesh | None = None) -> Prepared:
    """What `solver` needs of the second moments, whatever the edits. Raises StatisticsError where they do not do."""
    match solver:
        case Ridge() | EqualityConstrained():
            return factorise(solver, second_moments, layers, mesh=mesh)
        case NullSpace():
            return project(solver, second_moments, layers)
        case _:
            return gather_moments(solver, second_moments, layers)


def protect_keys(prepared: Prepared, keys: Mapping[int, np.ndarray]) -> Prepared:
    """With all of `keys`, ``{layer: [m, d_ff]}``, held in place. Its layers' `protected` first rows are so already."""
    match prepared:
        case Factor():
            return protect(prepared, keys)
        case Projections():
            return protect_projected(prepared, keys)
        case _:
            return protect_moments(prepared, keys)


def solve_layer(prepared: Prepared, layer: int, keys, residuals, clean=None) -> Solution:
    """The update of one layer for keys ``[n, d_ff]`` and residuals ``[n, d_model]``.

    clean: the keys of the clean prompts, which only ROME as published tells from `keys`.
    """
    match prepared:
        case Factor(solver=Ridge()):
            return solve(prepared, layer, keys, residuals)
        case Factor():
            return solve_constrained(prepared, layer, keys, residuals, clean)
        case Projections():
            return solve_projected(prepared, layer, keys, residuals)
        case _:
            return solve_subset(prepared, layer, keys, residuals)


def operators(prepared: Prepared, keys, layers: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """X ``[layers, d_ff, n]`` of several layers, so that ΔW = X R, for keys ``[layers, n, d_ff]``, and residuals."""
    if isinstance(prepared, Factor) and isinstance(prepared.solver, Ridge):
        return solve_all(prepared, keys, layers)
    found = [solve_layer(prepared, l, k, np.eye(len(k))) for l, k in zip(layers, keys, strict=True)]
    return np.stack([s.left @ s.right for s in found]), np.asarray([s.residual for s in found])
