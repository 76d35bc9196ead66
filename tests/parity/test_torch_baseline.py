"""The PyTorch baseline of the benchmarks does the published work: in float64 it gives the published numbers."""

import dataclasses
import json
import sys
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxedit.adapters.codebook import drawn
from jaxedit.adapters.grace import Grace
from jaxedit.adapters.grace_book import CASES
from jaxedit.adapters.ireva import IReVa
from jaxedit.adapters.ireva_retrofit import out_of_scope
from jaxedit.config import AnchorConfig
from jaxedit.data.requests import read_requests
from jaxedit.data.tokens import CLEAN, check_templates, edit_tokens
from jaxedit.models.hub import load as load_jax
from jaxedit.targets.anchor import find_anchors
from jaxedit.types import EditRequest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import torch_baseline as baseline  # noqa: E402

MODELS = ("tiny-llama", "tiny-gpt2", "tiny-gptj")


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    """transformers computes norms and rotary angles in float32 whatever the model's dtype; here in float64.

    One thread: on models this small, threads that wait for each other cost more than they bring.
    """
    to, threads = torch.Tensor.to, torch.get_num_threads()

    def widened(x):
        return torch.float64 if x is torch.float32 else x

    def to_wide(self, *args, **named):
        return to(self, *map(widened, args), **{k: widened(v) for k, v in named.items()})

    monkeypatch.setattr(torch.Tensor, "to", to_wide)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def loaded(folder):
    """``(model, tokenizer)`` in float64, rotary angles included."""
    model, tokenizer = baseline.load(folder, dtype="float64")
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            n = len(module.inv_freq)
            base = model.config.rope_parameters["rope_theta"]
            module.inv_freq = base ** (-torch.arange(n, dtype=torch.float64) / n)
        if hasattr(module, "embed_positions"):
            positions, size = module.embed_positions.shape
            n = size // 2
            angles = torch.arange(positions)[:, None] * 10000 ** (-torch.arange(n, dtype=torch.float64) / n)
            module.embed_positions = torch.cat([angles.sin(), angles.cos()], 1)
    return model, tokenizer


class Case:
    def __init__(self, folder):
        self.model, self.tokenizer = loaded(folder)
        about = json.loads((folder / "edits.json").read_text())
        self.hparams, self.templates = about["hparams"], about["templates"]
        self.requests = [
            EditRequest.from_template(e["prompt"], e["subject"], e["target_new"]["str"]) for e in about["edits"]
        ]
        with np.load(folder / "edits.npz") as arrays:
            self.arrays = dict(arrays)
        with np.load(folder / "cov.npz") as arrays:
            self.moments = {int(k.removeprefix("cov_L")): v for k, v in arrays.items()}
        self.layers = tuple(self.hparams["fe"]["layers"])

    def settings(self, updates: int = 20) -> AnchorConfig:
        h = self.hparams["fe"]
        return AnchorConfig(
            steps=updates + 1,
            lr=h["v_lr"],
            clamp=h["clamp_norm_factor"],
            kl_weight=h["kl_factor"],
            weight_decay=h["v_weight_decay"],
        )

    def apply(self, method: str) -> dict:
        weight = self.hparams[method]["mom2"]
        args = (self.layers, self.settings(), weight, self.templates, self.moments)
        return baseline.edit.apply(self.model, self.tokenizer, self.requests, method, *args)


@pytest.fixture(params=MODELS)
def case(request, goldens) -> Case:
    return Case(goldens / request.param)


def relative(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("updates", [1, 2, 5])
def test_anchors_equal_the_published_ones(case, updates):
    for layer in (case.layers[0], case.layers[-1]):
        for i in (0, 3, 6):
            settings = case.settings(updates)
            found = baseline.anchors.find_anchor(
                case.model, case.tokenizer, case.requests[i], layer, settings, case.templates
            )
            assert found.updates == case.arrays[f"targets/updates_L{layer}_u{updates}"][i]
            assert relative(found.init, case.arrays[f"targets/init_L{layer}"][i]) <= 1e-11
            assert relative(found.value, case.arrays[f"targets/z_L{layer}_u{updates}"][i]) <= 1e-9
            expected = case.arrays[f"targets/loss_L{layer}"][i, : found.updates + 1]
            np.testing.assert_allclose(found.losses, expected, rtol=1e-9, atol=1e-11)


def test_anchors_equal_those_of_jaxedit(goldens):
    """Settings and templates other than the goldens': a threshold that is met, a flat tuple of templates."""
    folder, layer, templates = goldens / "tiny-llama", 2, ("{}", "It is said. {}")
    settings = AnchorConfig(steps=12, lr=0.5, threshold=0.5)
    model, tokenizer = loaded(folder)
    requests = read_requests(folder / "facts.json")[20:23]
    theirs = [baseline.anchors.find_anchor(model, tokenizer, r, layer, settings, templates) for r in requests]
    with jax.enable_x64(True):
        ours, _ = load_jax(folder, dtype="float64")
        edits = [edit_tokens(tokenizer, r, check_templates(templates)) for r in requests]
        found = find_anchors(ours.params, ours.config, edits, layer, settings)
    assert [a.updates for a in theirs] == found.updates.tolist()
    assert 0 < min(found.updates) < 11
    for i, anchor in enumerate(theirs):
        assert relative(anchor.value, found.value[i]) <= 1e-9
        np.testing.assert_allclose(anchor.losses, found.losses[i, : anchor.updates + 1], rtol=1e-9, atol=1e-11)


def test_neurons_equal_those_of_jaxedit(goldens):
    folder = goldens / "tiny-llama"
    model, tokenizer = loaded(folder)
    requests = read_requests(folder / "facts.json")[20:23]
    edits = [edit_tokens(tokenizer, r, CLEAN) for r in requests]
    settings = IReVa(alpha=0.4, retrofit=True, steps=3, rec_weight=1e-2, irr_weight=1e-2)
    with jax.enable_x64(True):
        ours, _ = load_jax(folder, dtype="float64")
        layer = settings.layer_in(ours.config)
        clean, _ = dataclasses.replace(settings, retrofit=False).edit(ours, tokenizer, requests)
        trained, _ = settings.edit(ours, tokenizer, requests)
        scope = out_of_scope(ours, tokenizer, requests)
    for batch in (1, 2):
        same_rows(clean, *baseline.adapters.ireva(model, edits, layer, batch))
    same_rows(trained, *baseline.adapters.retrofit(model, edits, layer, scope, dataclasses.asdict(settings)))


def same_rows(state, keys, values):
    used = np.asarray(state.owner) >= 0
    assert relative(keys, state.keys[used]) <= 1e-9 and relative(values, state.values[used]) <= 1e-9


def test_codebook_equals_that_of_jaxedit(goldens):
    """New balls, one that is split and one that holds a later edit, and values after a few steps."""
    folder = goldens / "tiny-llama"
    model, tokenizer = loaded(folder)
    requests = read_requests(folder / "facts.json")[20:23]
    for i, target in ((0, requests[0].target), (1, "Rome")):
        prompt = "So " + requests[i].prompt
        requests.append(dataclasses.replace(requests[i], prompt=prompt, target=target, subject_start=None))
    edits = [edit_tokens(tokenizer, r, CLEAN) for r in requests]
    with jax.enable_x64(True):
        ours, _ = load_jax(folder, dtype="float64")
        settings = Grace(steps=4, radius=1.0, lr=0.1)
        state, trace = settings.edit(ours, tokenizer, requests)
        cold = np.asarray(drawn(0, np.arange(len(edits)), ours.config.d_model))
    plain = dataclasses.asdict(settings)
    assert {CASES[case] for case in trace["case"]} == {"new", "split", "inside"}
    keys, values, radii, losses = baseline.adapters.grace(model, edits, state.layer, cold, plain)
    same_rows(state, keys, values)
    np.testing.assert_allclose(radii, np.asarray(state.radii)[np.asarray(state.owner) >= 0], rtol=1e-9)
    np.testing.assert_allclose(losses, trace["losses"], rtol=1e-5)


@pytest.mark.parametrize("method", ["fe", "memit"])
def test_edits_equal_the_published_ones(case, method):
    before = {name: w.clone() for name, w in case.model.state_dict().items()}
    result = case.apply(method)
    try:
        for l in case.layers:
            expected = case.arrays[f"{method}/delta_L{l}"].T
            assert relative(result["deltas"][l], expected) <= 1e-9
            name = next(n for n, m in case.model.named_modules() if m is baseline.models.down(case.model, l))
            change = baseline.models.down(case.model, l).weight - before[f"{name}.weight"]
            assert relative(change if "gpt2" in case.model.config.model_type else change.T, expected) <= 1e-9
        seconds = result["seconds"]
        assert set(seconds) - {"replay"} == {"anchors", "keys", "solve", "total"}
        assert sum(v for k, v in seconds.items() if k != "total") == pytest.approx(seconds["total"])
    finally:
        baseline.edit.restore(case.model, result)
    for name, w in case.model.state_dict().items():
        assert torch.equal(w, before[name]), name


def test_statistics_equal_the_published_ones(case, goldens):
    rows = list(np.load(goldens / "cov_tokens.npz")["input_ids"])
    for function in (baseline.statistics.one_pass, baseline.statistics.per_layer):
        found = function(case.model, rows, case.layers, batch=64)
        for l in case.layers:
            assert relative(found[l], case.moments[l]) <= 1e-10


def test_statistics_of_rows_of_different_lengths(goldens):
    """Padding is not counted, and a row does not depend on the rows beside it."""
    model, _ = loaded(goldens / "tiny-gpt2")
    rows = [r[:n] for r, n in zip(np.load(goldens / "cov_tokens.npz")["input_ids"], (5, 64, 17, 1, 30), strict=False)]
    together = baseline.statistics.one_pass(model, rows, (1, 3), batch=3)
    alone = [baseline.statistics.one_pass(model, [r], (1, 3), batch=1) for r in rows]
    for l in (1, 3):
        total = sum(len(r) * a[l] for r, a in zip(rows, alone, strict=True))
        assert relative(together[l], total / sum(map(len, rows))) <= 1e-12


def test_metrics_equal_the_published_ones(case, goldens, request):
    folder = goldens / request.node.callspec.params["case"]
    published = json.loads((folder / "metrics.json").read_text())
    requests = read_requests(folder / "facts.json")[:8]
    base = baseline.evaluate.metrics(case.model, case.tokenizer, requests)
    with np.load(folder / "deltas_memit_fe.npz") as arrays:
        deltas = {l: torch.from_numpy(arrays[f"fe/delta_L{l}"].T).double() for l in case.layers}
    originals = {l: baseline.models.down(case.model, l).weight.clone() for l in case.layers}
    for l, delta in deltas.items():
        baseline.models.matrix(case.model, l).add_(delta)
    edited = baseline.evaluate.metrics(case.model, case.tokenizer, requests)
    baseline.edit.restore(case.model, {"originals": originals})
    for found, expected in ((edited, published["fe"]["summary"]), (base, published["base"]["summary"])):
        for name, value in expected.items():
            assert found[name.replace("neighborhood", "neighbourhood")] == pytest.approx(value, abs=1e-9), name
