"""LoRA as an editor: its updates against whole models in float64, its rank, and what it leaves behind."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_adapters import target_nll
from helpers_tuning import adam, as_float64, edit_of, nlls, patched, with_change

from jaxedit.data.requests import read_requests
from jaxedit.errors import JaxEditError
from jaxedit.export.patch import withdraw_patch
from jaxedit.models.transformer import layer, mlp_output
from jaxedit.tuning.epochs import Descent, train
from jaxedit.tuning.lora import LoraEditor, LowRank, lora_for

QUICK = LoraEditor(layers=(2, 4), rank=3, alpha=6.0, lr=1e-2, steps=8, batch=4)


@pytest.fixture(scope="module")
def llama(tiny, goldens):
    model, tokenizer = tiny("tiny-llama")
    return model, tokenizer, read_requests(goldens / "tiny-llama" / "facts.json")[:6]


@pytest.fixture(scope="module")
def tuned(llama):
    return QUICK.edit(*llama)


def test_updates_are_those_of_whole_models(decoder):
    pairs, layers = [((5, 9, 4, 7), (3, 8)), ((6, 2), (5,)), ((8, 4, 9), (2, 6, 7))], (1, 3)
    how, rng = Descent("target", 1e-2, math.inf, 0.0, 3, 2), np.random.default_rng(0)
    with jax.enable_x64(True):
        model = as_float64(decoder("tiny-gpt2"))
        config, params = model.config, model.params
        start = {"a": rng.normal(size=(2, config.d_ff, 3)), "b": np.zeros((2, 3, config.d_model))}
        found, traces = train(model, [edit_of(*p) for p in pairs], layers, LowRank(4.0), start, how, 0)

        def losses_of(x):
            merged = {l: 4.0 * x["a"][i] @ x["b"][i] for i, l in enumerate(layers)}
            return nlls(with_change(params, merged), config, pairs)

        expected, losses = adam(losses_of, start, traces["batch"], how.lr, how.epochs)
    np.testing.assert_allclose(traces["losses"], losses, rtol=1e-9)
    for name in start:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-7)
    assert np.abs(expected["b"]).max() > 1e-3


def test_nothing_is_added_at_first(llama):
    model, _, _ = llama
    block, rng = layer(model.params, 2), np.random.default_rng(0)
    key = jnp.asarray(rng.normal(size=(2, 5, model.config.d_ff)), jnp.float32)
    factors = {"a": jnp.asarray(rng.normal(size=(192, 3)), jnp.float32), "b": jnp.zeros((3, 64))}
    assert np.array_equal(LowRank(4.0)(block, factors, key), mlp_output(block, key))


def test_edits_are_learnt_at_low_rank(tuned, llama):
    model, tokenizer, requests = llama
    deltas, _ = tuned
    assert set(deltas) == {2, 4}
    for delta in deltas.values():
        assert delta.left.shape == (192, 3) and delta.right.shape == (3, 64) and delta.left.dtype == np.float32
        assert np.linalg.matrix_rank(delta.dense(), tol=1e-6) <= 3
    base, edited = target_nll(model, tokenizer, requests), patched(model, requests, deltas)[1]
    assert target_nll(edited, tokenizer, requests).mean() < 0.2 * base.mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_is_unmerged(llama, dtype):
    """The edited model has the loss that the next epoch begins with."""
    model, tokenizer, requests = llama
    model = model.with_params(jax.tree.map(lambda x: x.astype(dtype), model.params))
    editor = dataclasses.replace(QUICK, steps=3, batch=None)
    deltas, _ = editor.edit(model, tokenizer, requests)
    _, traces = dataclasses.replace(editor, steps=4).edit(model, tokenizer, requests)
    found = target_nll(patched(model, requests, deltas)[1], tokenizer, requests).mean()
    assert found == pytest.approx(traces["losses"][3, 0], rel=1e-5 if dtype == "float32" else 3e-2)


def test_patches_are_taken_back_exactly(tuned, llama):
    model, _, requests = llama
    patch, edited = patched(model, requests, tuned[0])
    assert patch.deltas[2].right is not None
    back = withdraw_patch(edited, patch).params["blocks"]["down"]["w"]
    assert np.array_equal(back, model.params["blocks"]["down"]["w"])


def test_a_seed_makes_the_same_factors_again(tuned, llama):
    again, other = QUICK.edit(*llama)[0], QUICK.edit(*llama, seed=1)[0]
    assert np.array_equal(again[2].left, tuned[0][2].left)
    assert not np.array_equal(other[2].left, tuned[0][2].left)


def test_settings(llama):
    config = llama[0].config
    assert lora_for(config) == LoraEditor() and lora_for(config).layers_in(config) == tuple(range(6))
    assert lora_for(config, (1,)).layers == (1,)
    xl = dataclasses.replace(config, family="gpt2", n_layer=48, d_model=1600, d_ff=6400)
    assert lora_for(xl).steps == 30
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"lr": -1.0}, {"steps": 0}, {"batch": 0}, {"stop": -1.0}):
        with pytest.raises(JaxEditError, match="LoraEditor"):
            LoraEditor(**wrong)
