"""Hyper-parameter files in the formats of EasyEdit and of ROME, MEMIT, AlphaEdit and NSE."""

import json

import pytest

from jaxedit.config import (
    AnchorConfig,
    BackwardSpread,
    EqualityConstrained,
    ForwardReplay,
    NeuronSubset,
    NullSpace,
    Ridge,
)
from jaxedit.errors import JaxEditError
from jaxedit.hparams import read_hyperparameters

MODULES = """
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
layer_module_tmp: "model.layers.{}"
mlp_module_tmp: "model.layers.{}.mlp"
attn_module_tmp: "model.layers.{}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
"""
MEMIT = (
    """alg_name: "MEMIT"
model_name: "./models/some-7b"
stats_dir: "./data/stats"
device: 0
layers: [4, 5, 6, 7, 8]
clamp_norm_factor: 4
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 25
v_lr: 5e-1
v_loss_layer: 31
v_weight_decay: 1e-3
kl_factor: 0.0625
mom2_adjustment: true
mom2_update_weight: 15000
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
model_parallel: false
"""
    + MODULES
)
ROME = {
    "layers": [17],
    "fact_token": "subject_last",
    "v_num_grad_steps": 20,
    "v_lr": 5e-1,
    "v_loss_layer": 47,
    "v_weight_decay": 0.5,
    "clamp_norm_factor": 4,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "context_template_length_params": [[5, 10], [10, 10]],
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
}


@pytest.fixture
def file(tmp_path):
    def write(content, name="hparams.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def test_easyedit_memit(file):
    found = read_hyperparameters(file(MEMIT))
    assert found.method.name == "memit" and found.method.layers == (4, 5, 6, 7, 8)
    assert found.method.anchor == AnchorConfig(steps=25, lr=0.5, clamp=4.0, kl_weight=0.0625, weight_decay=1e-3)
    assert found.method.solver == Ridge(cov_weight=15000) and found.method.targets == BackwardSpread()
    assert found.model_name == "./models/some-7b"
    assert found.statistics["mom2_n_samples"] == 100000 and found.statistics["mom2_dataset"] == "wikipedia"
    assert {"device", "rewrite_module_tmp", "v_loss_layer", "model_parallel"} <= set(found.unused)


def test_a_memit_file_for_forward_replay(file):
    found = read_hyperparameters(file(MEMIT), "fe").method
    assert found.targets == ForwardReplay() and found.solver == Ridge(cov_weight=15000) and found.name == "fe"


def test_easyedit_alphaedit(file):
    text = MEMIT.replace('"MEMIT"', '"AlphaEdit"') + 'nullspace_threshold: 2e-2\nL2: 10\nP_loc: "./P.pt"\n'
    found = read_hyperparameters(file(text)).method
    assert found.solver == NullSpace(threshold=0.02, l2=10) and found.name == "alphaedit"


def test_published_alphaedit_and_nse_json(file):
    common = {**ROME, "layers": [4, 5], "mom2_update_weight": 15000}
    del common["context_template_length_params"]
    alphaedit = {**common, "nullspace_threshold": 0.02, "L2": 1}
    assert read_hyperparameters(file(alphaedit, "a.json")).method.solver == NullSpace(l2=1)
    nse = {**common, "alpha": 15, "upper_bound": 100, "neuron_threshold": 0.8, "max_iterations": 3}
    found = read_hyperparameters(file(nse, "n.json")).method
    assert found.solver == NeuronSubset(cov_weight=15000, share=0.8, rounds=2, lower=15, upper=100)


def test_rome_json(file):
    found = read_hyperparameters(file(ROME, "rome.json")).method
    assert found.name == "rome" and found.layers == (17,) and found.at_once == 1
    assert found.solver == EqualityConstrained(denominator="clean")
    assert found.anchor == AnchorConfig(steps=20, lr=0.5, clamp=4.0, site="mlp_out")
    plain = read_hyperparameters(file({**ROME, "mom2_adjustment": False}, "rome.json")).method
    assert plain.solver == EqualityConstrained(cov_weight=0.0, l2=1.0, denominator="clean")
    assert read_hyperparameters(file(ROME, "rome.json"), "r_rome").method.solver == EqualityConstrained()


def test_a_weight_a_layer(file):
    text = MEMIT.replace("mom2_update_weight: 15000", "mom2_update_weight: [1.5e4, 1.5e4, 1.5e4, 1.5e4, 1.5e4]")
    assert read_hyperparameters(file(text)).method.solver == Ridge(cov_weight=15000)
    with pytest.raises(JaxEditError, match="not the same for all layers"):
        read_hyperparameters(file(text.replace("[1.5e4,", "[1e4,")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("kl_factor: 0.0625", "kl_factor: 0.0625\nwarp_factor: 9\nshields: up"), "'warp_factor', 'shields'"),
        (('fact_token: "subject_last"', 'fact_token: "last"'), "fact_token is 'last', and can only be 'subject_last'"),
        (("layers: [4, 5, 6, 7, 8]\n", ""), "there are no layers"),
        (("layers: [4, 5, 6, 7, 8]", "layers: [4, four]"), "wrong type"),
        (("clamp_norm_factor: 4", "clamp_norm_factor: -4"), "AnchorConfig.clamp must be positive"),
        (('alg_name: "MEMIT"', 'alg_name: "WISE"'), "is for 'WISE'"),
        (("device: 0", "device: [0"), "is not YAML"),
    ],
)
def test_what_cannot_be_carried_out_is_named(file, change, message):
    with pytest.raises(JaxEditError, match=message):
        read_hyperparameters(file(MEMIT.replace(*change)))


def test_files_that_are_not_hyper_parameters(file, tmp_path):
    with pytest.raises(JaxEditError, match="cannot read"):
        read_hyperparameters(tmp_path / "none.yaml")
    with pytest.raises(JaxEditError, match="is not JSON"):
        read_hyperparameters(file("{", "x.json"))
    with pytest.raises(JaxEditError, match="expected names with values"):
        read_hyperparameters(file("- 1\n- 2\n"))
    with pytest.raises(JaxEditError, match="does not say which method"):
        read_hyperparameters(file({"layers": [1]}, "x.json"))
