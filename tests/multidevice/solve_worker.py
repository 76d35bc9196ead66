"""Factors of five layers on as many of eight devices as it takes, against one device's."""

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jaxedit.config import Ridge
from jaxedit.sharding import make_mesh
from jaxedit.solvers.ridge import absorb, factorise, solve, solve_all
from jaxedit.statistics import SecondMoments

LAYERS, D_FF, D_MODEL, N = (2, 3, 5, 6, 9), 40, 6, 4

devices = jax.devices()
assert len(devices) == 8
rng = np.random.default_rng(0)
made = {l: rng.normal(size=(100, D_FF)) for l in LAYERS}
stats = SecondMoments.from_arrays({l: k.T @ k / 100 for l, k in made.items()}, 100)
keys, residuals = rng.normal(size=(len(LAYERS), N, D_FF)), rng.normal(size=(N, D_MODEL))
past = rng.normal(size=(N, D_FF))
solver = Ridge(cov_weight=5.0)
alone = factorise(solver, stats, LAYERS)
expected, _ = solve_all(alone, keys)


def check(mesh: Mesh, homes: list[int], **options):
    factor = factorise(solver, stats, LAYERS, mesh=mesh, **options)
    np.testing.assert_allclose(factor.condition, alone.condition, rtol=1e-4)
    for i, l in enumerate(LAYERS):
        home = devices[homes[i]]
        grown = absorb(factor, l, past)
        for part in (factor[l], grown[l]):
            assert all(x.sharding == SingleDeviceSharding(home) for x in jax.tree.leaves(part.triangle)), (l, home)
        a, b = (solve(absorb(f, l, past), l, keys[i], residuals) for f in (factor, alone))
        np.testing.assert_allclose(a.left @ a.right, b.left @ b.right, rtol=1e-9, atol=1e-12)
    operators, errors = solve_all(factor, keys)
    np.testing.assert_allclose(operators, expected, rtol=1e-9, atol=1e-12)
    assert errors.max() <= 1e-10


check(make_mesh(data=8), [0, 1, 2, 3, 4])  # one layer each, three devices with none
check(make_mesh(data=4, model=2), [0, 1, 2, 3, 4])
check(make_mesh(data=2), [0, 0, 0, 1, 1])  # filled up with one identity
check(make_mesh(data=3), [0, 0, 1, 1, 2])
check(make_mesh(data=8), [0, 1, 2, 3, 4], precision="float32")
# Three of the layers from disk, the others made by devices that may not be theirs
factorise(solver, stats, LAYERS[::2], cache=True)
check(make_mesh(data=8), [0, 1, 2, 3, 4], cache=True)
