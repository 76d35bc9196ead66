"""Fine-tuning: its updates against whole models in float64, its bound, its end, and what it leaves behind."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_adapters import target_nll, with_adapters
from helpers_tuning import adam, as_float64, edit_of, nlls, patched, with_change

from jaxedit.data.requests import read_requests
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.export.patch import withdraw_patch
from jaxedit.tuning.epochs import Descent, _go_on, train
from jaxedit.tuning.finetune import METHODS, FineTune, changed, fine_tune_for
from jaxedit.types import EditRequest

PAIRS = [((5, 9, 4, 7), (3, 8)), ((6, 2), (5,)), ((8, 4, 9), (2, 6, 7)), ((3, 3, 5, 6, 9), (9, 4))]
QUICK = FineTune(layers=(3,), lr=5e-3, steps=8, batch=4)


@pytest.fixture(scope="module")
def llama(tiny, goldens):
    model, tokenizer = tiny("tiny-llama")
    return model, tokenizer, read_requests(goldens / "tiny-llama" / "facts.json")[:6]


@pytest.fixture(scope="module")
def tuned(llama):
    return QUICK.edit(*llama)


@pytest.mark.parametrize(
    ("name", "layers", "objective", "clamp", "most"),
    [
        ("tiny-llama", (1, 2, 4), "target", None, 4096),
        ("tiny-gpt2", (5,), "last", 2e-3, 4096),
        ("logits_only/gemma2", (1,), "target", None, 9),
    ],
)
def test_updates_are_those_of_whole_models(decoder, name, layers, objective, clamp, most):
    """Adam for three epochs of a full and a smaller update; also where an update is taken in parts."""
    how = Descent(objective, 1e-3, clamp or math.inf, 0.0, 3, 3)
    with jax.enable_x64(True):
        model = as_float64(decoder(name))
        config, params = model.config, model.params
        start = np.zeros((len(layers), config.d_ff, config.d_model))
        found, traces = train(model, [edit_of(*p) for p in PAIRS], layers, changed, start, how, 7, most=most)

        def losses_of(delta):
            return nlls(with_change(params, delta), config, PAIRS, objective)

        assert sorted(traces["batch"]) == [0, 0, 0, 1]
        deltas = dict(zip(layers, start, strict=True))
        expected, losses = adam(losses_of, deltas, traces["batch"], how.lr, how.epochs, clamp)
    np.testing.assert_allclose(traces["losses"], losses, rtol=1e-9)
    assert traces["updates"] == 6
    for i, l in enumerate(layers):
        np.testing.assert_allclose(found[i], expected[l], atol=1e-8)
    if clamp is not None:
        assert np.abs(expected[layers[0]]).max() == clamp


def test_edits_are_learnt(tuned, llama):
    model, tokenizer, requests = llama
    deltas, traces = tuned
    base = target_nll(model, tokenizer, requests)
    firsts = [base[traces["batch"] == u].mean() for u in (0, 1)]
    assert traces["losses"][0, 0] == pytest.approx(firsts[0], abs=1e-4)
    assert traces["losses"].shape == (8, 2) and deltas[3].left.dtype == np.float32
    edited = patched(model, requests, deltas)[1]
    assert target_nll(edited, tokenizer, requests).mean() < 0.1 * base.mean()


def test_patches_are_taken_back_exactly(tuned, llama):
    model, _, requests = llama
    patch, edited = patched(model, requests, tuned[0])
    back = withdraw_patch(edited, patch).params["blocks"]["down"]["w"]
    assert np.array_equal(back, model.params["blocks"]["down"]["w"])
    assert not np.array_equal(edited.params["blocks"]["down"]["w"], back)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_edited_model_has_the_loss_that_the_next_epoch_begins_with(llama, dtype):
    """With bfloat16 weights the change is float32, and the forward pass rounds as the edited model does."""
    model, tokenizer, requests = llama
    model = model.with_params(jax.tree.map(lambda x: x.astype(dtype), model.params))
    editor = FineTune(layers=(2, 3), lr=2e-3, steps=3, batch=None)
    deltas, _ = editor.edit(model, tokenizer, requests)
    _, traces = dataclasses.replace(editor, steps=4).edit(model, tokenizer, requests)
    assert all(d.left.dtype == np.float32 for d in deltas.values())
    edited = patched(model, requests, deltas)[1]
    assert edited.dtype == jnp.dtype(dtype)
    found = target_nll(edited, tokenizer, requests).mean()
    assert found == pytest.approx(traces["losses"][3, 0], rel=1e-5 if dtype == "float32" else 1e-2)
    assert found < 0.5 * traces["losses"][0, 0]


def test_both_objectives_are_one_for_targets_of_one_token(llama):
    model, tokenizer, _ = llama
    prompts = ("Paris is", "Paris was", "The home of Paris lies")
    requests = [EditRequest(p, "Paris", t) for p, t in zip(prompts, ("it", "in", "on"), strict=True)]
    editor = FineTune(layers=(3,), steps=3, batch=2)
    made = [dataclasses.replace(editor, objective=o).edit(model, tokenizer, requests)[0] for o in ("target", "last")]
    assert made[0][3].left.any() and np.array_equal(made[0][3].left, made[1][3].left)


def test_what_is_known_already_changes_nothing(llama):
    deltas, traces = dataclasses.replace(QUICK, stop=100.0).edit(*llama)
    assert not deltas[3].left.any()
    assert len(traces["losses"]) == 1 and traces["updates"] == 0


def test_updates_end_one_by_one_and_then_the_epochs(llama):
    _, traces = dataclasses.replace(QUICK, steps=8, stop=1.5).edit(*llama)
    losses = traces["losses"]
    assert traces["updates"] == (losses >= 1.5).sum() < losses.size
    assert len(losses) < 8
    means = losses @ np.asarray([4, 2]) / 6
    assert means[-1] < 1.5 and (means[:-1] >= 1.5).all()


def test_reporting_changes_nothing(tuned, llama):
    told = []
    deltas, traces = QUICK.edit(*llama, on_progress=lambda *what: told.append(what))
    assert told == [("epochs", i + 1, 8) for i in range(8)]
    assert np.array_equal(deltas[3].left, tuned[0][3].left) and np.array_equal(traces["losses"], tuned[1]["losses"])


def test_other_rates_are_not_compiled_again(tuned, llama):
    before = _go_on._cache_size()
    other = dataclasses.replace(QUICK, lr=1e-3, clamp=1e-3, stop=0.1).edit(*llama)[0]
    assert _go_on._cache_size() == before
    assert np.abs(other[3].left).max() == np.float32(1e-3)


def test_presets(llama):
    config = llama[0].config
    assert set(METHODS) == {"ft", "ft_l", "ft_m"}
    assert fine_tune_for("ft", config).layers == (4,)
    assert fine_tune_for("ft_l", config).objective == "last" and fine_tune_for("ft_l", config).clamp == 5e-4
    assert fine_tune_for("ft_m", config).layers_in(config) == (3,)
    xl = dataclasses.replace(config, family="gpt2", n_layer=48, d_model=1600, d_ff=6400)
    assert fine_tune_for("ft", xl) == FineTune(layers=(46,), clamp=5e-2, lr=1e-4, steps=20)
    assert fine_tune_for("ft_l", xl, (5,)).layers == (5,)
    with pytest.raises(JaxEditError, match="the known ones are ft, ft_l, ft_m"):
        fine_tune_for("ftl", config)


def test_what_cannot_be_done_is_refused(llama):
    model, tokenizer, requests = llama
    for layers in ((), (1, 1), (6,), (-1,)):
        with pytest.raises(JaxEditError, match="different ones of 0 to 5"):
            FineTune(layers=layers).edit(model, tokenizer, requests)
    with pytest.raises(RequestError, match="target is empty"):
        QUICK.edit(model, tokenizer, [EditRequest("Paris is", "Paris", " ")])
    with pytest.raises(JaxEditError, match="without adapters"):
        QUICK.edit(with_adapters(model, jnp.zeros(1)), tokenizer, requests)
    for wrong in ({"objective": "both"}, {"clamp": 0.0}, {"lr": 0.0}, {"steps": 0}, {"batch": 0}, {"stop": -1.0}):
        with pytest.raises(JaxEditError, match="FineTune"):
            FineTune(**wrong)
