"""The ridge solver against a direct solve in float64."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from jaxedit.config import Ridge
from jaxedit.errors import JaxEditError, StatisticsError
from jaxedit.solvers import ridge
from jaxedit.solvers.ridge import absorb, factorise, solve, solve_all
from jaxedit.statistics import SecondMoments

few = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
D_MODEL = 5


def moments(rng, d_ff: int, layers=(3,), tokens: int = 200) -> SecondMoments:
    scales = np.exp(rng.normal(size=d_ff))  # channels of different sizes, as in a model
    keys = {l: rng.normal(size=(tokens, d_ff)) * scales for l in layers}
    return SecondMoments.from_arrays({l: k.T @ k / tokens for l, k in keys.items()}, tokens)


def direct(solver: Ridge, c, keys, residuals, past=None) -> np.ndarray:
    every = keys if past is None else np.concatenate([past, keys])
    total = solver.cov_weight * c + solver.l2 * np.eye(len(c)) + every.T @ every
    return np.linalg.solve(total, keys.T @ residuals)


def relative(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@few
@given(
    seed=st.integers(0, 2**31),
    n=st.sampled_from([1, 4, 8, 11]),
    m=st.sampled_from([0, 3, 10]),
    cov_weight=st.sampled_from([0.5, 30.0, 15_000.0]),
    l2=st.sampled_from([0.0, 2.0]),
    duplicates=st.booleans(),
)
def test_solve_equals_a_direct_solve(seed, n, m, cov_weight, l2, duplicates):
    """Fewer and more edits than channels, with and without keys that are protected, and equal keys."""
    rng, d_ff = np.random.default_rng(seed), 8
    stats, solver = moments(rng, d_ff), Ridge(cov_weight=cov_weight, l2=l2)
    keys, residuals = rng.normal(size=(n, d_ff)), rng.normal(size=(n, D_MODEL))
    past = rng.normal(size=(m, d_ff))
    if duplicates:
        keys[-1] = keys[0]
    found = solve(absorb(factorise(solver, stats, (3,)), 3, past), 3, keys, residuals)
    update = found.left @ found.right
    assert found.left.dtype == found.right.dtype == np.float64
    assert update.shape == (d_ff, D_MODEL)
    assert relative(update, direct(solver, stats[3].matrix, keys, residuals, past)) <= 1e-9
    assert found.residual <= 1e-12
    if n < d_ff:
        assert found.left.shape == (d_ff, min(n, D_MODEL))  # low rank: one column an edit


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("n", [3, 20])
def test_the_residual_reports_an_inexact_solution(monkeypatch, precision, n):
    """With more columns than the residual looks at one by one."""
    rng = np.random.default_rng(n)
    stats, solver = moments(rng, 12), Ridge(cov_weight=2.0, l2=0.1)
    keys, residuals = rng.normal(size=(n, 12)), rng.normal(size=(n, 40))
    factor = factorise(solver, stats, (3,), precision=precision)
    assert 0 < solve(factor, 3, keys, residuals).residual <= 1e-10
    # The same solution held against a matrix that is larger by a known part
    exact, exact_on_host = ridge.times, ridge._residual_on_host
    monkeypatch.setattr(ridge, "times", lambda t, v: exact(t, v) * (1 + 1e-5))
    monkeypatch.setattr(ridge, "_residual_on_host", lambda a, *rest: exact_on_host(a * (1 + 1e-5), *rest))
    monkeypatch.setattr(ridge, "_woodbury_on", ridge._woodbury_on.__wrapped__)
    monkeypatch.setattr(ridge, "_gram", ridge._gram.__wrapped__)
    update = direct(solver, stats[3].matrix, keys, residuals)
    a = solver.cov_weight * stats[3].matrix + solver.l2 * np.eye(12)
    expected = 1e-5 * np.linalg.norm(a @ update) / np.linalg.norm(keys.T @ residuals)
    assert expected / 2 <= solve(factor, 3, keys, residuals).residual <= 2 * expected


def test_protected_keys_keep_their_outputs():
    rng = np.random.default_rng(0)
    stats, solver = moments(rng, 12), Ridge(cov_weight=1e-6)
    past, keys, residuals = rng.normal(size=(4, 12)), rng.normal(size=(3, 12)), rng.normal(size=(3, D_MODEL))
    factor = factorise(solver, stats, (3,))
    free, bound = (solve(f, 3, keys, residuals) for f in (factor, absorb(factor, 3, past)))
    assert np.abs(past @ free.left @ free.right).max() > 1e-2
    assert np.abs(past @ bound.left @ bound.right).max() < 1e-4
    np.testing.assert_allclose(keys @ bound.left @ bound.right, residuals, atol=1e-4)


def test_nothing_to_move_gives_no_update():
    rng = np.random.default_rng(0)
    factor = factorise(Ridge(cov_weight=3.0), moments(rng, 12), (3,))
    found = solve(factor, 3, rng.normal(size=(2, 12)), np.zeros((2, D_MODEL)))
    assert found.residual == 0.0
    assert not (found.left @ found.right).any()


@few
@given(seed=st.integers(0, 2**31), spread=st.floats(0.0, 8.0), cov_weight=st.sampled_from([1.0, 1e4]))
def test_condition_estimate(seed, spread, cov_weight):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    matrix = (basis * 10 ** rng.uniform(0, spread, 12)) @ basis.T
    stats = SecondMoments.from_arrays({0: (matrix + matrix.T) / 2}, 100)
    (found,) = factorise(Ridge(cov_weight=cov_weight), stats, (0,)).condition
    exact = np.linalg.cond(stats[0].matrix)
    assert exact / 2 <= found <= 2 * exact


def test_condition_counts_l2():
    stats = SecondMoments.from_arrays({0: np.diag([4.0, 1.0, 0.0])}, 100)
    (found,) = factorise(Ridge(cov_weight=1.0, l2=1.0), stats, (0,)).condition
    np.testing.assert_allclose(found, 5.0, rtol=0.05)


def test_singular_moments_are_refused_by_layer():
    rng = np.random.default_rng(0)
    good = moments(rng, 12, (1, 2, 4))
    few_tokens = rng.normal(size=(5, 12))
    matrices = {l: good[l].matrix for l in (1, 4)} | {2: few_tokens.T @ few_tokens}
    stats = SecondMoments.from_arrays(matrices, {1: 200, 2: 5, 4: 200})
    with pytest.raises(StatisticsError, match=r"layers \[2\].*2: 5.*d_ff 12"):
        factorise(Ridge(cov_weight=1.0), stats, (1, 2, 4))
    assert factorise(Ridge(cov_weight=1.0), stats, (1, 4)).layers == (1, 4)
    assert np.isfinite(factorise(Ridge(cov_weight=1.0, l2=1e-3), stats, (1, 2, 4)).condition).all()


def test_missing_layer_is_named():
    with pytest.raises(StatisticsError, match="layer 7"):
        factorise(Ridge(), moments(np.random.default_rng(0), 6), (3, 7))


@pytest.mark.parametrize("n", [1, 4, 15])
def test_solve_all_equals_layer_by_layer(n):
    rng = np.random.default_rng(n)
    layers, solver = (1, 2, 5), Ridge(cov_weight=10.0, l2=0.5)
    stats = moments(rng, 12, layers)
    factor = factorise(solver, stats, layers)
    keys, residuals = rng.normal(size=(3, n, 12)), rng.normal(size=(3, n, D_MODEL))
    operators, errors = solve_all(factor, keys)
    assert operators.shape == (3, 12, n)
    assert errors.shape == (3,)
    assert (errors <= 1e-12).all()
    for i, l in enumerate(layers):
        alone = solve(factor, l, keys[i], residuals[i])
        assert relative(operators[i] @ residuals[i], alone.left @ alone.right) <= 1e-10
        assert relative(operators[i] @ residuals[i], direct(solver, stats[l].matrix, keys[i], residuals[i])) <= 1e-10


def test_layers_are_solved_with_their_own_moments():
    rng = np.random.default_rng(0)
    stats, solver = moments(rng, 12, (1, 2)), Ridge(cov_weight=10.0)
    keys, residuals = rng.normal(size=(3, 12)), rng.normal(size=(3, D_MODEL))
    found = {l: solve(factorise(solver, stats, (1, 2)), l, keys, residuals) for l in (1, 2)}
    for l in (1, 2):
        assert relative(found[l].left @ found[l].right, direct(solver, stats[l].matrix, keys, residuals)) <= 1e-10


def test_float32_inputs_are_solved_in_float64():
    rng = np.random.default_rng(0)
    stats, solver = moments(rng, 12), Ridge(cov_weight=10.0)
    narrow = SecondMoments.from_arrays({3: stats[3].matrix.astype(np.float32)}, 200)
    keys, residuals = (rng.normal(size=(4, k)).astype(np.float32) for k in (12, D_MODEL))
    found = solve(factorise(solver, narrow, (3,)), 3, keys, residuals)
    assert found.left.dtype == np.float64
    exact = direct(solver, narrow[3].matrix.astype(float), keys.astype(float), residuals.astype(float))
    assert relative(found.left @ found.right, exact) <= 1e-11
    assert found.residual <= 1e-12


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"cov_weight": -1.0}, "Ridge.cov_weight"),
        ({"cov_weight": float("nan")}, "Ridge.cov_weight"),
        ({"l2": float("inf")}, "Ridge.l2"),
        ({"l2": -0.5}, "Ridge.l2"),
        ({"cov_weight": 0.0}, "cov_weight > 0"),
    ],
)
def test_bad_weights_are_refused_by_name(values, field):
    with pytest.raises(JaxEditError, match=field):
        Ridge(**values)
