"""The solvers against direct solves and against each other, in float64."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from jaxedit.config import EqualityConstrained, NeuronSubset, NullSpace, Ridge
from jaxedit.errors import JaxEditError, StatisticsError
from jaxedit.solvers import nullspace
from jaxedit.solvers.neurons import largest_channels
from jaxedit.solvers.prepare import operators, prepare, protect_keys, solve_layer
from jaxedit.solvers.spectra import spectrum
from jaxedit.statistics import SecondMoments

few = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
D, D_MODEL, LAYER = 16, 5, 3
N = st.sampled_from([1, 2, 6, 15])
SPREAD = st.sampled_from([0.3, 1.0, 2.5])  # of the logarithms of channel sizes: condition numbers to about 1e6
SEED = st.integers(0, 2**31)


def problem(seed: int, n: int, spread: float = 1.0, past: int = 0):
    """Second moments, keys ``[n, D]``, residuals, and earlier keys."""
    rng = np.random.default_rng(seed)
    scale = np.exp(spread * rng.normal(size=D))
    tokens = rng.normal(size=(400, D)) * scale
    stats = SecondMoments.from_arrays({LAYER: tokens.T @ tokens / len(tokens)}, len(tokens))
    return stats, rng.normal(size=(n, D)) * scale, rng.normal(size=(n, D_MODEL)), rng.normal(size=(past, D)) * scale


def update(solver, stats, keys, residuals, past=None, clean=None) -> np.ndarray:
    prepared = prepare(solver, stats, (LAYER,))
    if past is not None and len(past):
        prepared = protect_keys(prepared, {LAYER: past})
    found = solve_layer(prepared, LAYER, keys, residuals, clean)
    assert found.left.dtype == found.right.dtype == np.float64
    assert found.residual <= 1e-8  # relative; the spread of C's eigenvalues goes up to 1e5
    return found.left @ found.right


def relative(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@few
@given(seed=SEED, n=N, spread=SPREAD, cov_weight=st.sampled_from([1.0, 100.0]), past=st.sampled_from([0, 4]))
def test_emmet_equals_its_closed_form(seed, n, spread, cov_weight, past):
    stats, keys, residuals, earlier = problem(seed, n, spread, past)
    inverse = np.linalg.inv(cov_weight * stats[LAYER].matrix + earlier.T @ earlier)
    inner = keys @ inverse @ keys.T + 0.1 * np.eye(n)
    expected = inverse @ keys.T @ np.linalg.solve(inner, residuals)
    found = update(EqualityConstrained(cov_weight=cov_weight, slack=0.1), stats, keys, residuals, earlier)
    assert relative(found, expected) <= 1e-8


@few
@given(seed=SEED, n=N, spread=SPREAD)
def test_without_slack_the_targets_are_met_and_others_disturbed_least(seed, n, spread):
    stats, keys, residuals, _ = problem(seed, n, spread)
    found = update(EqualityConstrained(), stats, keys, residuals)
    np.testing.assert_allclose(keys @ found, residuals, rtol=1e-8, atol=1e-8)
    # any other update that meets them disturbs more: the difference is orthogonal in the metric of C
    rng = np.random.default_rng(seed)
    free = rng.normal(size=found.shape)
    free -= np.linalg.pinv(keys) @ (keys @ free)
    inner = np.sum(free * (stats[LAYER].matrix @ found))
    size = np.sqrt(np.sum(free * (stats[LAYER].matrix @ free)) * np.sum(found * (stats[LAYER].matrix @ found)))
    assert abs(inner) <= 1e-7 * size


@few
@given(seed=SEED, n=N, spread=SPREAD)
def test_slack_one_is_ridge(seed, n, spread):
    stats, keys, residuals, _ = problem(seed, n, spread)
    expected = update(Ridge(cov_weight=7.0), stats, keys, residuals)
    assert relative(update(EqualityConstrained(cov_weight=7.0, slack=1.0), stats, keys, residuals), expected) <= 1e-9


@few
@given(seed=SEED, spread=SPREAD)
def test_emmet_of_one_edit_is_rome(seed, spread):
    """ROME's own form: a direction C⁻¹k, scaled so that the key meets the target; and its asymmetric variant."""
    stats, keys, residuals, _ = problem(seed, 1, spread)
    clean = keys * 1.1 + 0.05
    u = np.linalg.solve(stats[LAYER].matrix, keys[0])
    u /= np.linalg.norm(u)
    rome = np.outer(u, residuals[0] / (keys[0] @ u))
    assert relative(update(EqualityConstrained(), stats, keys, residuals, clean=clean), rome) <= 1e-8
    published = EqualityConstrained(denominator="clean")
    asymmetric = np.outer(u, residuals[0] / (clean[0] @ u))
    assert relative(update(published, stats, keys, residuals, clean=clean), asymmetric) <= 1e-8


def test_equal_keys_with_different_targets_meet_halfway():
    stats, keys, residuals, _ = problem(0, 2)
    keys[1] = keys[0]
    prepared = prepare(EqualityConstrained(), stats, (LAYER,))
    found = solve_layer(prepared, LAYER, keys, residuals)
    half = np.repeat(residuals.mean(0, keepdims=True), 2, 0)
    np.testing.assert_allclose(keys @ (found.left @ found.right), half, rtol=1e-8, atol=1e-9)
    assert found.residual > 0.1  # which says that the targets are not met


@few
@given(seed=SEED, n=N, spread=SPREAD, past=st.sampled_from([0, 3, 20]), share=st.sampled_from([0.2, 0.6, 1.0]))
def test_nullspace_equals_the_published_system(seed, n, spread, past, share):
    """The form as large as the edits against the d_ff × d_ff one, with earlier keys as columns against their sum."""
    stats, keys, residuals, earlier = problem(seed, n, spread, past)
    values, vectors = np.linalg.eigh(stats[LAYER].matrix)
    threshold = 1.0001 * values[int(share * (D - 1))]
    small = values < threshold
    p = vectors[:, small] @ vectors[:, small].T
    system = p @ (keys.T @ keys + earlier.T @ earlier) + 10.0 * np.eye(D)
    expected = np.linalg.solve(system, p @ keys.T @ residuals)
    found = update(NullSpace(threshold=threshold), stats, keys, residuals, earlier)
    assert relative(found, expected) <= 1e-8


def test_nullspace_protects_a_long_stream():
    """Many batches, with room made several times, and more keys than channels: as if all had come at once."""
    rng = np.random.default_rng(0)
    stats, keys, residuals, _ = problem(1, 4)
    stream = rng.normal(size=(40, 20, D))
    solver = NullSpace(threshold=0.5, measure="relative", l2=3.0)
    prepared = prepare(solver, stats, (LAYER,))
    for i in range(len(stream)):
        prepared = protect_keys(prepared, {LAYER: stream[: i + 1].reshape(-1, D)})
    assert prepared[LAYER].protected == 800
    assert len(prepared[LAYER].past) < 800
    found = solve_layer(prepared, LAYER, keys, residuals)
    values, vectors = np.linalg.eigh(stats[LAYER].matrix)
    small = values < 0.5 * values[-1]
    p, every = vectors[:, small] @ vectors[:, small].T, np.concatenate([keys, stream.reshape(-1, D)])
    expected = np.linalg.solve(p @ every.T @ every + 3.0 * np.eye(D), p @ keys.T @ residuals)
    assert relative(found.left @ found.right, expected) <= 1e-9
    assert found.residual <= 1e-10


@few
@given(seed=SEED, n=N)
def test_nullspace_of_everything_is_ridge_of_the_identity(seed, n):
    _, keys, residuals, _ = problem(seed, n)
    identity = SecondMoments.from_arrays({LAYER: np.eye(D)}, 400)
    found = update(NullSpace(threshold=2.0, l2=4.0), identity, keys, residuals)
    assert relative(found, update(Ridge(cov_weight=4.0), identity, keys, residuals)) <= 1e-10


@pytest.mark.parametrize(
    ("solver", "small"),
    [
        (NullSpace(threshold=0.3), 2),
        (NullSpace(threshold=0.3, measure="relative"), 3),
        (NullSpace(threshold=0.1, measure="energy"), 2),
        (NullSpace(threshold=1.0, measure="energy"), 5),
    ],
)
def test_what_counts_as_small(solver, small):
    values = np.array([0.1, 0.2, 0.5, 1.0, 2.0])  # together 3.8
    assert nullspace.count_small(solver, values) == small


def test_an_empty_null_space_is_refused_with_the_eigenvalues():
    stats, *_ = problem(0, 1)
    with pytest.raises(StatisticsError, match=r"(?s)no eigenvalue.*layer 3.*relative"):
        prepare(NullSpace(threshold=1e-9), stats, (LAYER,))


def test_a_spectrum_is_kept_and_a_damaged_one_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEDIT_CACHE", str(tmp_path))
    stats, *_ = problem(0, 1)
    matrix = stats[LAYER].matrix
    made = spectrum(matrix, cache=True)
    (file,) = (tmp_path / "spectra").iterdir()
    monkeypatch.setattr(np.linalg, "eigh", lambda *_: pytest.fail("computed again"))
    kept = spectrum(matrix, cache=True)
    for a, b in zip(made, kept, strict=True):
        np.testing.assert_array_equal(a, b)
    monkeypatch.undo()
    monkeypatch.setenv("JAXEDIT_CACHE", str(tmp_path))
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged"):
        again = spectrum(matrix, cache=True)
    np.testing.assert_array_equal(again[0], made[0])


@few
@given(seed=SEED, n=N, share=st.sampled_from([0.5, 0.8, 1.0]), past=st.sampled_from([0, 3]))
def test_neuron_subset_equals_a_direct_solve_on_its_channels(seed, n, share, past):
    stats, keys, residuals, earlier = problem(seed, n, past=past)
    size = np.abs(keys).sum(0)
    order = np.argsort(-size)
    count = D if share == 1 else max(1, int(np.sum(np.cumsum(size[order]) <= share * size.sum())))
    chosen = order[:count]
    np.testing.assert_array_equal(np.sort(largest_channels(keys, share)), np.sort(chosen))
    k, p = keys[:, chosen], earlier[:, chosen]
    system = 20.0 * stats[LAYER].matrix[np.ix_(chosen, chosen)] + k.T @ k + p.T @ p
    expected = np.zeros((D, D_MODEL))
    expected[chosen] = np.linalg.solve(system, k.T @ residuals)
    found = update(NeuronSubset(cov_weight=20.0, share=share), stats, keys, residuals, earlier)
    assert relative(found, expected) <= 1e-8
    if share == 1:
        assert relative(found, update(Ridge(cov_weight=20.0), stats, keys, residuals, earlier)) <= 1e-8


@pytest.mark.parametrize(
    "solver", [Ridge(cov_weight=2.0), EqualityConstrained(slack=0.3), NullSpace(threshold=0.5, measure="relative")]
)
def test_operators_are_the_updates_without_residuals(solver):
    stats, keys, residuals, _ = problem(5, 3)
    prepared = prepare(solver, stats, (LAYER,))
    x, error = operators(prepared, keys[None], (LAYER,))
    assert x.shape == (1, D, 3) and (error <= 1e-10).all()
    assert relative(x[0] @ residuals, update(solver, stats, keys, residuals)) <= 1e-9


@few
@given(seed=SEED, sizes=st.lists(st.integers(1, 4), min_size=2, max_size=3), weight=st.sampled_from([0.5, 1.0, 3.0]))
def test_groups_one_after_the_other_are_the_joint_minimiser_and_their_sum_is_not(seed, sizes, weight):
    """Solving each group with the keys of those before it protected, towards what is left, gives the joint solve."""
    stats, keys, residuals, _ = problem(seed, sum(sizes))
    root = np.sqrt(np.concatenate([np.full(n, weight if i == 0 else 1.0) for i, n in enumerate(sizes)]))[:, None]
    k, r, c = keys * root, residuals * root, 2.0 * stats[LAYER].matrix
    solver = Ridge(cov_weight=2.0)
    joint = update(solver, stats, k, r)
    assert relative(joint, np.linalg.solve(c + k.T @ k, k.T @ r)) <= 1e-8
    groups = np.split(np.arange(len(k)), np.cumsum(sizes)[:-1])
    prepared, total = prepare(solver, stats, (LAYER,)), np.zeros((D, D_MODEL))
    for i, rows in enumerate(groups):
        found = solve_layer(prepared, LAYER, k[rows], r[rows] - k[rows] @ total)
        total += found.left @ found.right
        seen = np.concatenate(groups[: i + 1])
        prepared = protect_keys(prepared, {LAYER: k[seen]})
    assert relative(total, joint) <= 1e-8

    def objective(delta):
        return np.sum((k @ delta - r) ** 2) + np.sum(delta * (c @ delta))

    summed = sum(update(solver, stats, k[rows], r[rows]) for rows in groups)
    assert objective(summed) >= objective(joint) - 1e-9


@few
@given(seed=SEED)
def test_the_sum_over_groups_is_joint_where_whitened_keys_are_orthogonal(seed):
    stats, _, residuals, _ = problem(seed, 6)
    root = np.linalg.cholesky(stats[LAYER].matrix)
    whitened = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, 6)))[0].T  # orthonormal rows
    keys = whitened @ root.T
    solver = Ridge(cov_weight=3.0)
    summed = update(solver, stats, keys[:2], residuals[:2]) + update(solver, stats, keys[2:], residuals[2:])
    joint = update(solver, stats, keys, residuals)
    assert relative(summed, joint) <= 1e-9
    skewed = keys + 0.5 * keys[::-1]
    apart = update(solver, stats, skewed[:2], residuals[:2]) + update(solver, stats, skewed[2:], residuals[2:])
    assert relative(apart, update(solver, stats, skewed, residuals)) > 1e-3


def test_prepared_layers_are_named_where_one_is_missing():
    stats, keys, residuals, _ = problem(0, 2)
    for solver in (NullSpace(threshold=0.5, measure="relative"), NeuronSubset(), EqualityConstrained()):
        prepared = prepare(solver, stats, (LAYER,))
        with pytest.raises(JaxEditError, match=r"\[3\], not layer 7"):
            solve_layer(prepared, 7, keys, residuals)
        with pytest.raises(JaxEditError, match=r"expected \(n, 16\)"):
            solve_layer(prepared, LAYER, keys[:, :4], residuals)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NullSpace(threshold=0.0), "NullSpace.threshold must be positive"),
        (lambda: NullSpace(threshold=1.5, measure="energy"), "NullSpace.threshold is a share"),
        (lambda: NullSpace(measure="small"), "NullSpace.measure must be one of 'absolute', 'relative', 'energy'"),
        (lambda: EqualityConstrained(cov_weight=0.0), "EqualityConstrained needs cov_weight > 0 or l2 > 0"),
        (lambda: EqualityConstrained(denominator="other"), "EqualityConstrained.denominator"),
        (lambda: NeuronSubset(share=0.0), "NeuronSubset.share is a share"),
        (lambda: NeuronSubset(lower=3.0, upper=2.0), "lower < upper"),
        (lambda: dataclasses.replace(NeuronSubset(), rounds=0), "rounds of at least 1"),
    ],
)
def test_bad_settings_are_refused_by_name(make, message):
    with pytest.raises(JaxEditError, match=message):
        make()
