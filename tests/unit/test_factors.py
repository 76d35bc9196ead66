"""Factors: panels, keys absorbed, float32 with refinement, disk and memory. The oracle is NumPy in float64."""

import dataclasses
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from jaxedit.config import Ridge
from jaxedit.errors import JaxEditError, StatisticsError
from jaxedit.solvers import factors, ridge, triangle
from jaxedit.solvers.factor_files import factor_file, keep_factor, read_factor
from jaxedit.solvers.factors import factor_bytes, plan_factors
from jaxedit.solvers.ridge import absorb, factorise, protect, solve, solve_all
from jaxedit.statistics import SecondMoments

few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
D_FF, D_MODEL = 600, 7  # two panels, of 512 and 88 columns


def moments(rng, d_ff: int = D_FF, layers=(3,), spread: float = 1.0) -> SecondMoments:
    scales = np.exp(spread * rng.normal(size=d_ff))
    keys = {l: rng.normal(size=(2 * d_ff, d_ff)) * scales for l in layers}
    return SecondMoments.from_arrays({l: k.T @ k / len(k) for l, k in keys.items()}, 2 * d_ff)


def direct(solver: Ridge, c, keys, residuals, past) -> np.ndarray:
    every = np.concatenate([past, keys])
    total = solver.cov_weight * c + solver.l2 * np.eye(len(c)) + every.T @ every
    return np.linalg.solve(total, keys.T @ residuals)


def true_residual(solver: Ridge, c, keys, residuals, update) -> float:
    right = keys.T @ residuals
    left = solver.cov_weight * (c @ update) + solver.l2 * update + keys.T @ (keys @ update)
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


def relative(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def dense(solution) -> np.ndarray:
    return solution.left @ solution.right


@partial(jax.jit, static_argnames="block")
def products(lower, b, block):
    t = triangle.cut(lower, block)
    update = triangle.dense(triangle.update(t, b))
    return triangle.dense(t), triangle.times(t, b), triangle.forward(t, b), triangle.backward(t, b), update


@few
@given(
    seed=st.integers(0, 2**31),
    d=st.sampled_from([1, 8, 19]),
    n=st.sampled_from([1, 5]),
    block=st.sampled_from([4, 8]),
    spread=st.sampled_from([0.0, 3.0]),
)
def test_panels(seed, d, n, block, spread):
    """Products, solves and the update are those of the whole matrix, whatever the width of its panels."""
    rng = np.random.default_rng(seed)
    lower = np.tril(rng.normal(size=(d, d)), -1) * 0.3 + np.diag(np.exp(spread * rng.normal(size=d)))
    whole, b = lower @ lower.T, rng.normal(size=(d, n))
    with jax.enable_x64(True):
        same, times, forward, backward, grown = (np.asarray(x) for x in products(lower, b, block))
    np.testing.assert_array_equal(same, lower)
    np.testing.assert_allclose(times, whole @ b, rtol=1e-9, atol=1e-12 * np.abs(whole).max())
    for l, x in ((lower, forward), (lower.T, backward)):
        assert np.linalg.norm(l @ x - b) <= 1e-13 * np.linalg.norm(l) * np.linalg.norm(x)
    assert relative(grown @ grown.T, whole + b @ b.T) <= 1e-13
    assert (np.triu(grown, 1) == 0).all()
    assert (np.diagonal(grown) > 0).all()


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize(("m", "n"), [(1, 5), (520, 3), (700, 40), (30, 620)])
def test_absorbed_keys_equal_stacked_keys(precision, m, n):
    """In two portions; fewer and more keys than channels; the factor that was absorbed into stays as it is."""
    rng = np.random.default_rng(m)
    stats, solver = moments(rng), Ridge(cov_weight=20.0, l2=0.1)
    past, keys, residuals = (rng.normal(size=s) for s in ((m, D_FF), (n, D_FF), (n, D_MODEL)))
    base = factorise(solver, stats, (3,), precision=precision)
    factor = base
    for part in np.array_split(past, 2):
        factor = absorb(factor, 3, part)
    assert (base[3].protected, factor[3].protected) == (0, m)
    found = solve(factor, 3, keys, residuals)
    assert relative(dense(found), direct(solver, stats[3].matrix, keys, residuals, past)) <= 1e-9
    assert found.residual <= 1e-10
    free = dense(solve(base, 3, keys, residuals))
    assert relative(free, direct(solver, stats[3].matrix, keys, residuals, past[:0])) <= 1e-9


def test_protect_absorbs_what_is_not_absorbed_yet():
    rng = np.random.default_rng(0)
    factor = factorise(Ridge(), moments(rng, 12, (1, 2)), (1, 2))
    keys = {1: rng.normal(size=(5, 12)), 7: rng.normal(size=(2, 12))}
    step = protect(factor, {1: keys[1][:3]})
    both = protect(step, keys)
    assert [step[l].protected for l in (1, 2)] == [3, 0]
    assert [both[l].protected for l in (1, 2)] == [5, 0]
    assert protect(both, keys)[1] is both[1]
    at_once = protect(factor, keys)
    for a, b in zip(jax.tree.leaves(both[1].triangle), jax.tree.leaves(at_once[1].triangle), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("n", [100, 650])
def test_residual_of_ill_conditioned_moments(precision, n):
    """A condition number of about 1e7 is more than float32 alone can solve, and keys of the same spectrum."""
    rng = np.random.default_rng(n)
    scales = np.exp(np.linspace(0, -6, D_FF))
    basis = np.linalg.qr(rng.normal(size=(D_FF, D_FF)))[0]
    made = rng.normal(size=(4 * D_FF, D_FF)) * scales @ basis
    stats = SecondMoments.from_arrays({3: made.T @ made / len(made)}, len(made))
    keys, residuals = rng.normal(size=(n, D_FF)) * scales @ basis, rng.normal(size=(n, 64))
    factor = factorise(Ridge(cov_weight=1000.0), stats, (3,), precision=precision)
    assert factor.condition[0] >= 1e5
    found = solve(factor, 3, keys, residuals)
    true = true_residual(factor.solver, stats[3].matrix, keys, residuals, dense(found))
    assert true <= 1e-10
    assert found.residual <= 1e-10


def test_float32_says_what_to_do_where_it_is_not_enough():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    c = (basis * np.logspace(0, -13, 40)) @ basis.T
    stats = SecondMoments.from_arrays({0: (c + c.T) / 2}, 100)
    with pytest.raises(StatisticsError, match="precision='float64'"):
        factor = factorise(Ridge(), stats, (0,), precision="float32")
        solve(factor, 0, rng.normal(size=(3, 40)), rng.normal(size=(3, 2)))


def test_shapes_of_keys_and_layers_are_checked():
    factor = factorise(Ridge(), moments(np.random.default_rng(0), 12), (3,))
    for call in (lambda k: absorb(factor, 3, k), lambda k: solve(factor, 3, k, np.zeros((2, 4)))):
        with pytest.raises(JaxEditError, match=r"keys of layer 3 have shape \(2, 9\), expected \(n, 12\)"):
            call(np.zeros((2, 9)))
    with pytest.raises(JaxEditError, match=r"layers \[3\], not layer 4"):
        solve(factor, 4, np.zeros((2, 12)), np.zeros((2, 4)))


def test_one_program_for_similar_numbers_of_edits():
    rng = np.random.default_rng(0)
    factor = factorise(Ridge(), moments(rng, 130), (3,))
    ridge._woodbury_on.clear_cache()
    for n in (97, 100, 104):
        solve(factor, 3, rng.normal(size=(n, 130)), rng.normal(size=(n, 20)))
    assert ridge._woodbury_on._cache_size() == 1


# Memory


def test_streamed_factors_stay_on_the_host_and_give_the_same():
    rng = np.random.default_rng(0)
    stats, layers, solver = moments(rng, 50, (1, 2)), (1, 2), Ridge(cov_weight=3.0)
    keys, residuals = rng.normal(size=(2, 4, 50)), rng.normal(size=(4, D_MODEL))
    resident, streamed = (factorise(solver, stats, layers, placement=p) for p in ("resident", "streamed"))
    for factor, kind in ((resident, jax.Array), (streamed, np.ndarray)):
        grown = absorb(factor, 1, keys[0])
        assert all(isinstance(x, kind) for f in (factor, grown) for x in jax.tree.leaves(f[1].triangle))
    np.testing.assert_allclose(streamed.condition, resident.condition)
    for l in layers:
        a, b = (dense(solve(f, l, keys[0], residuals)) for f in (resident, streamed))
        np.testing.assert_allclose(a, b, rtol=1e-12)
    np.testing.assert_allclose(solve_all(streamed, keys)[0], solve_all(resident, keys)[0], rtol=1e-12)


@pytest.mark.parametrize(
    ("memory", "weights", "more", "plan"),
    [
        (80, 16, {}, "resident"),
        (24, 16, {}, "streamed"),
        (24, 16, {"devices": 8}, "resident"),
        (40, 16, {"precision": "float32"}, "resident"),
        (30, 16, {}, "streamed"),
    ],
)
def test_plan_for_llama_3_8b(memory, weights, more, plan):
    """Five matrices of 14336², 1.6 GB each in float64."""
    assert plan_factors(14336, 5, memory * 10**9, weights * 10**9, **more) == plan


def test_plan_refuses_what_cannot_fit():
    with pytest.raises(JaxEditError, match=r"d_ff 14336 in float64 takes 4\.\d GB .* 2\.0 GB are free"):
        plan_factors(14336, 5, 20 * 10**9, 16 * 10**9)


def test_the_plan_is_made_for_free_memory(monkeypatch):
    rng = np.random.default_rng(0)
    stats = moments(rng, 50, (1, 2, 3))
    for free, kind in ((1_000_000, jax.Array), (200_000, np.ndarray)):
        monkeypatch.setattr(factors, "free_memory", lambda devices, free=free: free)
        factor = factorise(Ridge(), stats, stats.layers)
        assert all(isinstance(x, kind) for x in jax.tree.leaves(factor[2].triangle))


def test_size_of_a_factor():
    """Half a matrix, but for the blocks on the diagonal."""
    with jax.enable_x64(True):
        t = triangle.cut(np.eye(D_FF))
    assert factor_bytes(D_FF) == sum(x.nbytes for x in jax.tree.leaves(t))
    assert 4 * 14336**2 < factor_bytes(14336) < 4.5 * 14336**2


# Disk


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEDIT_CACHE", str(tmp_path))
    return tmp_path / "factors"


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_cached_factors_are_read_back(folder, monkeypatch, precision, placement):
    rng = np.random.default_rng(0)
    stats, solver = moments(rng, D_FF, (1, 2)), Ridge(cov_weight=3.0)
    keys, residuals = rng.normal(size=(4, D_FF)), rng.normal(size=(4, D_MODEL))
    settings = {"precision": precision, "placement": placement, "cache": True}
    made = factorise(solver, stats, (2,), **settings)
    assert len(list(folder.iterdir())) == 1
    both = factorise(solver, stats, (1, 2), **settings)  # layer 2 from disk
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(factors, "_factor_group", None)
    again = factorise(solver, stats, (1, 2), **settings)
    np.testing.assert_array_equal(again.condition, both.condition)
    for x, y in zip(jax.tree.leaves(made[2].triangle), jax.tree.leaves(again[2].triangle), strict=True):
        assert x.dtype == y.dtype == precision
        np.testing.assert_array_equal(x, y)
    kind = jax.Array if placement == "resident" else np.memmap
    assert all(isinstance(x, kind) for x in jax.tree.leaves(again[1].triangle) if x.size)
    found = solve(absorb(again, 2, keys[:1]), 2, keys, residuals)
    assert relative(dense(found), direct(solver, stats[2].matrix, keys, residuals, keys[:1])) <= 1e-9


def test_everything_that_changes_a_factor_changes_its_file():
    c = np.eye(5, dtype=np.float32)
    cases = [
        (c, Ridge(), "float64"),
        (c * 2, Ridge(), "float64"),
        (c.astype(np.float64), Ridge(), "float64"),
        (c, Ridge(cov_weight=1.0), "float64"),
        (c, Ridge(l2=1.0), "float64"),
        (c, Ridge(), "float32"),
    ]
    files = {factor_file(*case) for case in cases}
    assert len(files) == len(cases)
    assert factor_file(c.T, Ridge(), "float64") in files


def damage(file, how: str):
    data = bytearray(file.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "emptied":
        data = bytearray()
    elif how == "flipped":
        data[-100] ^= 1
    elif how == "foreign":
        data = bytearray(b"x" * len(data))
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "emptied", "flipped", "foreign", "swapped"])
def test_damaged_files_are_reported_and_replaced(folder, how):
    stats = moments(np.random.default_rng(0), 20, (1, 2))
    made = factorise(Ridge(), stats, (1,), cache=True)
    (file,) = folder.iterdir()
    if how == "swapped":
        other = factor_file(stats[2].matrix, Ridge(), "float64")
        factorise(Ridge(), stats, (2,), cache=True)
        other.replace(file)
    else:
        damage(file, how)
    with pytest.warns(UserWarning, match="not usable and is computed again"):
        again = factorise(Ridge(), stats, (1,), cache=True)
    for x, y in zip(jax.tree.leaves(made[1].triangle), jax.tree.leaves(again[1].triangle), strict=True):
        np.testing.assert_array_equal(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factorise(Ridge(), stats, (1,), cache=True)


def test_small_factors_are_not_cached_unless_asked_for(folder):
    stats = moments(np.random.default_rng(0), 20, (1,))
    factorise(Ridge(), stats, (1,))
    factorise(Ridge(), stats, (1,), cache=False)
    assert not folder.exists()


def test_bad_moments_are_not_cached(folder):
    keys = np.random.default_rng(0).normal(size=(5, 20))
    stats = SecondMoments.from_arrays({1: keys.T @ keys}, 5)
    with pytest.raises(StatisticsError, match="not positive definite"):
        factorise(Ridge(), stats, (1,), cache=True)
    assert not folder.exists()


def test_a_full_disk_is_reported(folder, monkeypatch):
    folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not be cached"):
        factorise(Ridge(), moments(np.random.default_rng(0), 20), (3,), cache=True)


def test_several_writers_of_one_file(tmp_path):
    file = tmp_path / "abc.safetensors"
    eye = triangle.Triangle((np.eye(300),), (np.eye(300),), (np.zeros((0, 300)),))
    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings():
        warnings.simplefilter("error")
        writing = [pool.submit(keep_factor, file, eye, 1.0) for _ in range(20)]
        for _ in range(30):
            read_factor(file, 300)
        for each in writing:
            each.result()
    assert read_factor(file, 300)[1] == 1.0
    assert list(tmp_path.iterdir()) == [file]


def test_factors_are_readable_as_safetensors(folder):
    from safetensors.numpy import load_file

    made = factorise(Ridge(), moments(np.random.default_rng(0)), (3,), cache=True)
    (file,) = folder.iterdir()
    tensors = load_file(file)
    for part in ("diagonal", "inverse", "below"):
        for i, x in enumerate(getattr(made[3].triangle, part)):
            np.testing.assert_array_equal(tensors[f"{part}.{i}"], x)


# Through apply_edits


def test_continued_edits_absorb_the_last_keys_only(tiny, monkeypatch):
    """A result continued with its factor equals one continued from its keys alone, and absorbs each key once."""
    import jaxedit as je

    model, tokenizer = tiny("tiny-llama")
    requests = [je.EditRequest.from_template("{} lives in", s, " Rome") for s in ("Ann", "Bob", "Eve")]
    rng = np.random.default_rng(0)
    layers, d_ff = (1, 2), model.config.d_ff
    stats = moments(rng, d_ff, layers)
    values = rng.normal(size=(2, 1, model.config.d_model))
    options = {"method": "fe", "layers": layers, "stats": stats, "templates": ["{}"]}

    def edit(on, request):
        return je.apply_edits(on, tokenizer, [request], targets=je.Targets(layers, values), **options)

    second = edit(edit(model, requests[0]), requests[1])
    absorbed = []
    protected = je.edit.protect_keys
    monkeypatch.setattr(
        je.edit,
        "protect_keys",
        lambda f, keys: absorbed.append([len(keys[l]) - f[l].protected for l in layers]) or protected(f, keys),
    )
    carried = edit(second, requests[2])
    rebuilt = edit(dataclasses.replace(second, factor=None), requests[2])
    assert absorbed == [[1, 1], [2, 2]]
    for l in layers:
        a, b = (np.asarray(r.model.params["blocks"]["down"]["w"][l]) for r in (carried, rebuilt))
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        assert carried.factor[l].protected == 2
        assert len(carried.keys[l]) == 3
    forgotten = dataclasses.replace(second, keys={l: k[:0] for l, k in second.keys.items()})
    with pytest.raises(JaxEditError, match="set its factor to None"):
        edit(forgotten, requests[2])
    with pytest.raises(JaxEditError, match="as factorise made it"):
        je.apply_edits(model, tokenizer, requests[:1], factor=second.factor, **options)
