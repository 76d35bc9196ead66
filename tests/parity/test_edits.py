"""Edits against the numbers of published PyTorch code: keys, losses, anchors, targets and weight updates."""

import dataclasses
import json
from functools import cache

import jax
import numpy as np
import pytest

from jaxedit.config import AnchorConfig, BackwardSpread, ForwardReplay, Method, PerLayer, Ridge
from jaxedit.data.tokens import check_templates, template_weights, validate
from jaxedit.edit import apply_edits, find_targets
from jaxedit.models.hub import load
from jaxedit.statistics import SecondMoments
from jaxedit.targets.anchor import find_anchors
from jaxedit.targets.anchor_plan import buckets, suffix_tokens
from jaxedit.targets.strategies import clean_states, replay
from jaxedit.types import EditRequest

MODELS = ("tiny-llama", "tiny-gpt2", "tiny-gptj")
STRATEGIES = {
    "memit": BackwardSpread(),
    "memit_nodiv": BackwardSpread(divide=False),
    "fe": ForwardReplay(),
    "blue": PerLayer(),
}
ONE_BUCKET = 1e9


def error(found, expected) -> float:
    """Largest relative error over the rows (the last axis is a vector)."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float((np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


def frobenius(found, expected) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class Case:
    """One model in one precision with its reference; what it computes is kept for all tests of the module."""

    def __init__(self, folder, dtype):
        self.x64 = dtype == "float64"
        with self.precision():
            self.model, self.tokenizer = load(folder, dtype=dtype)
        about = json.loads((folder / "edits.json").read_text())
        self.hparams, self.templates = about["hparams"], about["templates"]
        self.requests = [
            EditRequest.from_template(e["prompt"], e["subject"], e["target_new"]["str"]) for e in about["edits"]
        ]
        with np.load(folder / "edits.npz") as arrays:
            self.arrays = dict(arrays)
        self.targets = {k.removeprefix("targets/"): v for k, v in self.arrays.items() if k.startswith("targets/")}
        moments = np.load(folder / "cov.npz")
        self.layers = tuple(self.hparams["fe"]["layers"])
        self.stats = SecondMoments.from_arrays({l: moments[f"cov_L{l}"] for l in self.layers}, 19_200)
        groups = check_templates(self.templates)
        self.weights = template_weights(groups)
        self.edits = validate(self.tokenizer, self.requests, groups, self.model.config.max_positions)
        for name in ("anchors", "result", "sequence"):
            setattr(self, name, cache(getattr(self, name)))

    def precision(self):
        return jax.enable_x64(self.x64)

    def method(self, tag: str, updates: int | None = None) -> Method:
        h = self.hparams[tag]
        anchor = AnchorConfig(
            steps=h["v_num_grad_steps"] if updates is None else updates + 1,
            lr=h["v_lr"],
            clamp=h["clamp_norm_factor"],
            kl_weight=h["kl_factor"],
            weight_decay=h["v_weight_decay"],
            bucket_growth=ONE_BUCKET,
            tokens_per_step=10_000,
        )
        return Method(
            name=tag,
            targets=STRATEGIES[tag.removesuffix("_seq")],
            layers=h["layers"],
            solver=Ridge(cov_weight=h["mom2"]),
            anchor=anchor,
        )

    def anchors(self, layer: int, updates: int, **changes):
        settings = dataclasses.replace(self.method("fe", updates).anchor, **changes)
        with self.precision():
            return find_anchors(self.model.params, self.model.config, self.edits, layer, settings)

    def apply(self, on, requests, method, **more):
        with self.precision():
            return apply_edits(on, self.tokenizer, requests, method, stats=self.stats, templates=self.templates, **more)

    def result(self, tag: str, updates: int | None = None):
        return self.apply(self.model, self.requests, self.method(tag, updates))

    def sequence(self, tag: str):
        """Two batches; targets of both from the unedited model, as published."""
        method, size = self.method(tag), self.hparams[tag]["bs"]
        with self.precision():
            targets = find_targets(self.model, self.tokenizer, self.requests, method, templates=self.templates)

        def part(rows):
            return dataclasses.replace(targets, values=targets.values[:, rows], anchors={}, lookup=None)

        first = self.apply(self.model, self.requests[:size], method, targets=part(slice(size)))
        return first, self.apply(first, self.requests[size:], method, targets=part(slice(size, None)))

    def update(self, result, layer: int) -> np.ndarray:
        """What the edit added, in the orientation of the reference."""
        new, old = (m.params["blocks"]["down"]["w"][layer] for m in (result.model, self.model))
        return (np.asarray(new, np.float64) - np.asarray(old, np.float64)).T


@cache
def case_of(folder, dtype: str) -> Case:
    return Case(folder, dtype)


@pytest.fixture(scope="module", params=MODELS)
def case(request, goldens) -> Case:
    return case_of(goldens / request.param, "float64")


@pytest.fixture(params=["first", "last"])
def layer(request, case) -> int:
    return case.layers[0 if request.param == "first" else -1]


def test_lookup_indices(case):
    found = [[r.lookup for r in (*e.contexts, e.essence)] for e in case.edits]
    np.testing.assert_array_equal(found, case.targets["lookup_idx"])


def test_keys_and_states_before_any_edit(case):
    with case.precision():
        params, config = case.model.params, case.model.config
        nothing = np.zeros((len(case.edits), config.d_model))
        states, keys = replay(params, config, case.edits, case.layers, nothing, case.weights, "replayed")
        clean = clean_states(params, config, case.edits, case.layers)
    assert keys.dtype == np.float64
    for i, l in enumerate(case.layers):
        assert error(keys[i], case.targets[f"keys_L{l}"]) <= 1e-11
        assert error(states[i], case.targets[f"init_L{l}"]) <= 1e-11
        assert error(clean[i], case.targets[f"init_L{l}"]) <= 1e-11


def test_losses_of_every_step(case, layer):
    found, expected = case.anchors(layer, 20), case.targets[f"loss_L{layer}"]
    assert found.losses.shape == (8, 21, 4)
    np.testing.assert_array_equal(np.isnan(found.losses), np.isnan(expected))
    np.testing.assert_array_equal(found.updates, case.targets[f"updates_L{layer}_u20"])
    # nll and total are far from 0; the KL is 0 up to rounding before the first update
    np.testing.assert_allclose(found.losses, expected, rtol=1e-9, atol=1e-11)
    last = expected[np.arange(8), found.updates, 0]
    np.testing.assert_allclose(found.final_loss, last, rtol=1e-9)


def test_anchors_after_twenty_updates(case, layer):
    found = case.anchors(layer, 20)
    assert found.value.dtype == np.float64
    assert error(found.init, case.targets[f"init_L{layer}"]) <= 1e-11
    assert error(found.value, case.targets[f"z_L{layer}_u20"]) <= 1e-9


# Every number of steps is another program, so not each of them on each model: the losses above are those of every step.
@pytest.mark.parametrize(
    ("name", "updates"), [("tiny-llama", 2), ("tiny-llama", 5), ("tiny-gpt2", 5), ("tiny-gptj", 2)]
)
def test_anchors_after_few_updates(goldens, name, updates):
    case = case_of(goldens / name, "float64")
    layer = case.layers[0]
    found = case.anchors(layer, updates)
    np.testing.assert_array_equal(found.updates, case.targets[f"updates_L{layer}_u{updates}"])
    assert error(found.value, case.targets[f"z_L{layer}_u{updates}"]) <= 1e-9
    # a shorter run is the beginning of a longer one
    longer = case.anchors(layer, 20).losses[:, : updates + 1]
    np.testing.assert_allclose(found.losses, longer, rtol=1e-12, atol=1e-14)


ONE_UPDATE = [("tiny-llama", "fe"), ("tiny-gpt2", "memit"), ("tiny-gptj", "fe")]


@pytest.mark.parametrize(("name", "tag"), ONE_UPDATE)
def test_anchors_after_one_update(goldens, name, tag):
    case = case_of(goldens / name, "float64")
    result = case.result(tag, updates=1)
    (layer,) = result.targets.anchors
    assert layer == case.layers[0 if tag == "fe" else -1]
    anchors = result.targets.anchors[layer]
    np.testing.assert_array_equal(anchors.updates, case.targets[f"updates_L{layer}_u1"])
    assert error(anchors.value, case.targets[f"z_L{layer}_u1"]) <= 1e-9


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # a bucket of seven, three at a time, the next one as soon as one of them stops; and a bucket of one
        ("tiny-llama", {"tokens_per_step": 168, "bucket_growth": 2.0}),
        ("tiny-gptj", {"tokens_per_step": 40}),  # one at a time
    ],
)
def test_anchors_do_not_depend_on_batching(goldens, name, changes):
    case = case_of(goldens / name, "float64")
    layer = case.layers[0]
    together, apart = case.anchors(layer, 20), case.anchors(layer, 20, **changes)
    if name == "tiny-llama":
        assert len(set(together.updates)) > 3  # edits stop at different times, so lanes are refilled midway
        groups = buckets([suffix_tokens(e) for e in case.edits], changes["bucket_growth"], changes["tokens_per_step"])
        assert [len(members) for members in groups] == [7, 1]
    np.testing.assert_array_equal(apart.updates, together.updates)
    assert error(apart.value, together.value) <= 1e-12
    np.testing.assert_allclose(apart.losses, together.losses, rtol=1e-11, atol=1e-13)


def test_targets_of_forward_replay(case):
    targets = case.result("fe").targets
    assert targets.layers == case.layers
    for l in case.layers:
        assert error(targets.at(l), case.targets[f"fe_z_L{l}"]) <= 1e-9
    np.testing.assert_array_equal(targets.lookup, case.targets["lookup_idx"][:, 0])


@pytest.mark.parametrize("tag", ["memit", "memit_nodiv", "fe", "blue"])
def test_weight_updates(case, tag):
    result, method = case.result(tag), case.method(tag)
    assert [i.layer for i in result.info.layers] == list(method.layers)
    for info in result.info.layers:
        l = info.layer
        assert frobenius(case.update(result, l), case.arrays[f"{tag}/delta_L{l}"]) <= 1e-9
        assert error(result.keys[l], case.arrays[f"{tag}/K_L{l}"].T) <= 1e-9
        assert info.solve_residual <= 1e-10
        if tag == "blue":
            assert error(result.targets.at(l), case.arrays[f"blue/z_L{l}"]) <= 1e-9
    untouched = [l for l in range(case.model.config.n_layer) if l not in method.layers]
    for l in untouched:
        assert not case.update(result, l).any()


@pytest.mark.parametrize("tag", ["memit", "memit_nodiv"])
def test_residuals_at_the_last_layer(case, tag):
    """`remaining` against what the published code saw when it solved each layer."""
    z = case.targets[f"z_L{case.layers[-1]}_u20"]
    expected = [np.linalg.norm(z - case.arrays[f"{tag}/cur_L{l}"].T, axis=-1) for l in case.layers]
    np.testing.assert_allclose(case.result(tag).info.remaining[:-1], expected, rtol=1e-9)


@pytest.mark.parametrize("tag", ["memit_seq", "fe_seq"])
def test_two_batches_one_after_the_other(case, tag):
    first, second = case.sequence(tag)
    for l in case.layers:
        assert frobenius(case.update(first, l), case.arrays[f"{tag}/delta_b1_L{l}"]) <= 1e-9
        assert frobenius(case.update(second, l), case.arrays[f"{tag}/delta_b2_L{l}"]) <= 1e-9
        both = np.concatenate([case.arrays[f"{tag}/K_b{b}_L{l}"].T for b in (1, 2)])
        assert error(second.keys[l], both) <= 1e-9
    assert all(i.solve_residual <= 1e-10 for r in (first, second) for i in r.info.layers)


@pytest.mark.parametrize(("name", "tag"), ONE_UPDATE)
def test_float32_agrees_with_float64(goldens, name, tag):
    case, single = (case_of(goldens / name, dtype) for dtype in ("float64", "float32"))
    expected, found = case.result(tag, updates=1), single.result(tag, updates=1)
    (layer,) = found.targets.anchors
    assert found.model.dtype == np.float32
    assert found.targets.anchors[layer].value.dtype == np.float32
    assert error(found.targets.anchors[layer].value, case.targets[f"z_L{layer}_u1"]) <= 1e-4
    for l in case.layers:
        assert frobenius(found.patch.deltas[l].dense().T, case.update(expected, l)) <= 1e-4
