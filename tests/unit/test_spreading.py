"""What becomes of an edit on its way up, and the premises of the spreading theorems (FE, §4), on tiny models."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxedit as je
from jaxedit.analysis.figures import save_figure
from jaxedit.analysis.jacobian import jacobian, passive, stretch
from jaxedit.analysis.krylov import Dense, extremes
from jaxedit.analysis.spreading import cosine, models_on_the_way, premises, step_sizes, walk
from jaxedit.analysis.study import spread
from jaxedit.errors import JaxEditError
from jaxedit.targets.pull_back import least_change

NAMES = ("tiny-llama", "tiny-gpt2", "tiny-gptj")
LAYERS = (1, 2, 3, 4)
TEMPLATES = ["{}"]


@pytest.fixture(scope="module")
def made(tiny, goldens):
    """``made(name) -> (model, tokenizer, requests, stats)`` in float32."""

    def load(name: str):
        model, tokenizer = tiny(name)
        requests = je.read_requests(goldens / name / "edits.json")[:6]
        return model, tokenizer, requests, je.second_moments(model, tokenizer, None, LAYERS, max_tokens=4000)

    return load


def methods_with(cov_weight: float, model, names: tuple[str, ...]) -> list[je.Method]:
    solver = je.Ridge(cov_weight=cov_weight)
    return [dataclasses.replace(je.method_for(name, model.config, LAYERS), solver=solver) for name in names]


@pytest.fixture(scope="module")
def strong(made):
    """``strong(name)``: the study of edits that take; next to nothing of the residual remains."""

    @functools.cache
    def study(name: str):
        model, tokenizer, requests, stats = made(name)
        methods = methods_with(50.0, model, ("memit", "memit_no_divide", "one_layer", "fe"))
        return spread(model, tokenizer, requests, methods, stats=stats, templates=TEMPLATES)

    return study


@pytest.fixture(scope="module")
def gentle(made):
    """``gentle(name)``: walks of two methods whose steps are so small that J says what they become."""

    @functools.cache
    def walks(name: str):
        model, tokenizer, requests, stats = made(name)
        methods = methods_with(15_000.0, model, ("memit_no_divide", "jacobian_spread"))
        aims = je.targets(model, tokenizer, requests, methods[0], templates=TEMPLATES)
        options = {"stats": stats, "targets": aims, "templates": TEMPLATES}
        results = [je.apply_edits(model, tokenizer, requests, m, **options) for m in methods]
        return [walk(model, tokenizer, requests, result) for result in results]

    return walks


@pytest.mark.parametrize("name", NAMES)
def test_table_one(gentle, name):
    """The cosine rises towards the last layer, where it is 1."""
    cosines = gentle(name)[0].cosine.mean(1)
    assert (np.diff(cosines) > 0.01).all() and cosines[0] < 0.9 and cosines[-1] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_tables_two_and_five(strong, name):
    """Dividing leaves most of the residual to the last layers, one layer alone leaves more than all of them, and FE's
    residual falls with every layer, most of it at the first."""
    found = strong(name)
    divided, whole, alone, replayed = (
        found.walks[m].remaining.mean(1) for m in ("memit", "memit_no_divide", "one_layer", "fe")
    )
    assert divided[0] > 0.75 and divided[-2] > 0.4 and divided[-1] < 0.1
    assert replayed[0] < 0.5 and (np.diff(replayed) < 0).all()
    assert replayed[-1] < divided[-1] < alone[-1] and whole[-1] < divided[-1]
    assert list(found.below) == [(4,), (3, 4), (2, 3, 4), (1, 2, 3, 4)]
    assert found.below[4,] == pytest.approx(alone[-1], rel=1e-4)
    assert (np.diff(list(found.below.values())) < 0).all()
    text = found.table()
    for part in ("memit_no_divide", "smallest eigenvalue", "layer 4"):
        assert part in text
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_theorems(strong, name):
    """Wherever the symmetric part is positive definite every tested direction has a positive cosine; nowhere is δ an
    eigenvector."""
    p = strong(name).premises
    assert p.violations.sum() == 0 and p.definite.shape == (3, 6) and p.random_cosine.shape == (3, 6, 32)
    assert (p.random_cosine >= p.smallest[..., None] * 0 - 1).all()
    assert (p.misfit > 0.05).all() and (p.eigenvector_cosine < 0.999).all()
    assert (p.counterexamples <= ~p.definite).all()


def test_a_walk_follows_the_edit(made):
    """Against the edit's own report, and against each layer's update times the key."""
    model, tokenizer, requests, stats = made("tiny-llama")
    for name in ("memit", "fe", "r_rome"):
        method = je.method_for(name, model.config, LAYERS)
        method = dataclasses.replace(method, anchor=dataclasses.replace(method.anchor, steps=5), at_once=None)
        result = je.apply_edits(model, tokenizer, requests, method, stats=stats, templates=TEMPLATES)
        found = walk(model, tokenizer, requests, result)
        assert found.site == ("mlp_out" if name == "r_rome" else "block_out")
        reported = result.info.remaining[1:] / result.info.remaining[0]
        assert found.remaining == pytest.approx(reported, rel=1e-3, abs=1e-4)
        assert found.passive[-1] == pytest.approx(found.change[-1], abs=1e-6)
        # "{}" is the only context, so the keys that were solved with are those of the clean prompts
        for i, (l, keys) in enumerate(result.keys.items()):
            before, after = (np.asarray(m.params["blocks"]["down"]["w"][l], np.float64) for m in (model, result.model))
            assert found.change[i] == pytest.approx(keys @ (after - before), abs=1e-4)


def test_premises_against_dense_matrices(made):
    """Every number of `premises` from Jacobians that are written out, of the model as edited so far."""
    model, tokenizer, requests, stats = made("tiny-gpt2")
    method = je.method_for("memit", model.config, LAYERS)
    result = je.apply_edits(model, tokenizer, requests, method, stats=stats, templates=TEMPLATES)
    found = premises(model, tokenizer, requests, result, directions=4)
    change = walk(model, tokenizer, requests, result).change
    for i, (at, l) in enumerate(zip(models_on_the_way(model, result), LAYERS[:-1], strict=False)):
        of = stretch(at, tokenizer, requests, l, LAYERS[-1])
        dense = jacobian(of).astype(np.float64)
        values = np.linalg.eigvalsh((dense + dense.swapaxes(1, 2)) / 2)
        scale = np.abs(values).max()
        assert found.smallest[i] == pytest.approx(values[:, 0], abs=1e-4 * scale)
        assert found.largest[i] == pytest.approx(values[:, -1], abs=1e-4 * scale)
        moved = np.einsum("nij,nj->ni", dense, change[i])
        assert found.cosine[i] == pytest.approx(cosine(moved, change[i]), abs=1e-5)
        beta = np.sum(moved * change[i], -1) / np.sum(change[i] ** 2, -1)
        assert found.rayleigh[i] == pytest.approx(beta, abs=1e-5 * scale)
        left = np.linalg.norm(moved - beta[:, None] * change[i], axis=-1) / np.linalg.norm(moved, axis=-1)
        assert found.misfit[i] == pytest.approx(left, abs=1e-4)
        assert found.measured[i] == pytest.approx(cosine(np.asarray(passive(of, change[i])), change[i]), abs=1e-5)


def test_theorem_two_on_made_up_jacobians():
    """A rotation by less than a right angle is positive definite in its symmetric part and has a cosine below one;
    beyond it, directions outside its plane have a positive cosine although the premise fails."""
    matrices = np.stack([np.eye(4), np.eye(4)])
    for matrix, angle in zip(matrices, (1.0, 2.0), strict=True):
        matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    found = extremes(Dense(matrices))
    assert found.smallest == pytest.approx(np.cos([1.0, 2.0])) and found.largest == pytest.approx(np.ones(2))
    v = np.array([0.0, 0.0, 1.0, 0.0])
    assert (v @ matrices[1] @ v) > 0 > found.smallest[1]


def test_step_sizes(made):
    model, tokenizer, requests, _ = made("tiny-llama")
    of = stretch(model, tokenizer, requests, 1, 4)
    residual = np.random.default_rng(0).standard_normal(of.shape)
    found = step_sizes(of, residual, 1, scales=(1e-3, 0.1, 1.0))
    assert (np.diff(found.error, axis=0) > 0).all() and found.error[0].max() <= 0.05
    arrives = np.asarray(of.reach(0.1 * residual.astype(np.float32)) - of.reach(np.zeros(of.shape, np.float32)))
    left = np.linalg.norm(residual - arrives, axis=-1) / np.linalg.norm(residual, axis=-1)
    assert found.remaining[1] == pytest.approx(left, rel=1e-5)
    assert (found.radius(0.0) == 0).all() and found.radius(1e9) == pytest.approx(found.size)


def test_jacobian_spread_solves_its_equations(made):
    """Against a dense solve, in float64: undamped it is what J turns into the residual."""
    model, tokenizer, requests, _ = made("tiny-gptj")
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), model.params)
        of = stretch(model.with_params(params), tokenizer, requests, 1, 4)
        dense, rest = jacobian(of), np.random.default_rng(0).standard_normal(of.shape)
        for damping in (0.5, 0.0):
            found, error = least_change(of, jnp.asarray(rest), damping, 300)
            left = dense.swapaxes(1, 2) @ dense + damping * np.eye(64)
            expected = np.linalg.solve(left, np.einsum("nij,ni->nj", dense, rest)[..., None])[..., 0]
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-6) and float(error.max()) <= 1e-8
        assert push_all(dense, found) == pytest.approx(rest, abs=1e-5)
        rough, error = least_change(of, jnp.asarray(rest), 0.5, 2)
        assert float(error.min()) > 1e-6 and np.linalg.norm(rough - expected) > 1e-6


def push_all(dense, v):
    return np.einsum("nij,nj->ni", dense, np.asarray(v))


@pytest.mark.parametrize("name", NAMES)
def test_jacobian_spread_aims_better_than_spreading(gentle, name):
    """What a layer's change becomes points more at the residual that it was made for."""
    spread_as_it_is, pulled_back = (found.aim.mean(1)[:-1] for found in gentle(name))
    assert (pulled_back > spread_as_it_is + 0.01).all()


def test_jacobian_spread_of_one_layer_is_memit(made):
    model, tokenizer, requests, stats = made("tiny-llama")
    results = []
    for strategy in (je.JacobianSpread(), je.BackwardSpread()):
        method = je.Method(name="one", targets=strategy, layers=(3,), anchor=je.AnchorConfig(steps=3))
        results.append(je.apply_edits(model, tokenizer, requests, method, stats=stats, templates=TEMPLATES))
    one, other = (r.patch.deltas[3].dense() for r in results)
    assert np.array_equal(one, other)


def test_what_cannot_be_studied(made):
    model, tokenizer, requests, stats = made("tiny-llama")
    with pytest.raises(JaxEditError, match="as edited so far"):
        spread(model, tokenizer, requests, ("blue",), LAYERS, stats)
    with pytest.raises(JaxEditError, match="no methods"):
        spread(model, tokenizer, requests, (), LAYERS, stats)
    only = je.apply_edits(
        *(model, tokenizer, requests, je.method_for("one_layer", model.config, (3,))), stats=stats, templates=TEMPLATES
    )
    with pytest.raises(JaxEditError, match="only layer 3 was edited"):
        premises(model, tokenizer, requests, only)
    with pytest.raises(JaxEditError, match="of 6 edits, and there are 2"):
        walk(model, tokenizer, requests[:2], only)
    with pytest.raises(JaxEditError, match="of other requests"):
        walk(model, tokenizer, requests[::-1], only)
    with pytest.raises(JaxEditError, match="of another model"):
        walk(only.model, tokenizer, requests, only)
    with pytest.raises(JaxEditError, match="memit twice"):
        spread(model, tokenizer, requests, ("memit", "memit"), LAYERS, stats)
    with pytest.raises(JaxEditError, match="whole number"):
        je.JacobianSpread(iterations=2.5)  # type: ignore[arg-type]


def test_a_figure_needs_a_known_ending(tmp_path):
    with pytest.raises(JaxEditError, match="got 'plot'"):
        save_figure(None, tmp_path / "plot")
