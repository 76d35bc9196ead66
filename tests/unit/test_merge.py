"""Merged patches: the sum of their updates, exactly withdrawable; conflicts and strangers are named."""

import dataclasses
import json

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers_model import random_weights, small_llama
from hypothesis import given, settings
from typer.testing import CliRunner

import jaxedit.cli.shipping  # noqa: F401  (adds its commands)
from jaxedit.cli import app
from jaxedit.errors import PatchError
from jaxedit.export.merge import merge_patches
from jaxedit.export.patch import Delta, EditPatch, apply_patch, make_patch, with_matrices, withdraw_patch
from jaxedit.models.config import parameter_shapes
from jaxedit.models.conversion import nest
from jaxedit.models.transformer import Decoder
from jaxedit.types import EditRequest

D_FF, D_MODEL = 40, 24
CONFIG = small_llama(4, D_MODEL, D_FF)


def random_model(dtype=np.float32, seed: int = 0) -> Decoder:
    return random_weights(CONFIG, dtype, seed)


def matrix(model, l: int) -> np.ndarray:
    return np.asarray(model.params["blocks"]["down"]["w"][l])


def request(prompt="Paris is in", target="Rome", **fields) -> EditRequest:
    return EditRequest(prompt, prompt.split()[0], target, **fields)


def random_delta(rank: int | None, seed: int, kind=np.float32) -> Delta:
    rng = np.random.default_rng(seed)
    if rank is None:
        return Delta((0.1 * rng.normal(size=(D_FF, D_MODEL))).astype(kind))
    return Delta(
        (0.3 * rng.normal(size=(D_FF, rank))).astype(kind), (0.3 * rng.normal(size=(rank, D_MODEL))).astype(kind)
    )


def patch_on(model, deltas, *requests) -> EditPatch:
    return make_patch({"name": "fe"}, requests, {l: matrix(model, l) for l in deltas}, deltas)[0]


ranks = st.dictionaries(st.integers(0, 3), st.none() | st.integers(1, 9), min_size=1)


@settings(max_examples=30, deadline=None)
@given(given_ranks=st.lists(ranks, min_size=1, max_size=4), seed=st.integers(0, 99), chained=st.booleans())
def test_the_merged_patch_adds_all_updates(given_ranks, seed, chained):
    model = random_model()
    patches, at = [], model
    for i, layers in enumerate(given_ranks):
        deltas = {l: random_delta(rank, seed + 10 * i + l) for l, rank in layers.items()}
        patches.append(patch_on(at, deltas, request(f"Paris{i} is in")))
        at = apply_patch(at, patches[-1]) if chained else at
    merged, report = merge_patches(patches, model)
    assert merged.layers == tuple(sorted({l for layers in given_ranks for l in layers}))
    assert merged.requests == tuple(r for p in patches for r in p.requests) and not report.conflicts
    edited = apply_patch(model, merged)
    for l in range(CONFIG.n_layer):
        parts = [p.deltas[l].dense().astype(np.float64) for p in patches if l in p.deltas]
        total = sum(parts, matrix(model, l).astype(np.float64))
        np.testing.assert_allclose(matrix(edited, l), total, rtol=2e-7, atol=1e-6 if len(parts) > 1 else 1e-9)
        if chained:
            np.testing.assert_allclose(matrix(edited, l), matrix(at, l), rtol=1e-6, atol=2e-6)
    restored = withdraw_patch(edited, merged)
    for l in range(CONFIG.n_layer):
        assert matrix(restored, l).tobytes() == matrix(model, l).tobytes()
    for overlap in report.overlaps:
        parts = [patches[i].deltas[overlap.layer].dense().ravel().astype(np.float64) for i in overlap.patches]
        norms = [np.linalg.norm(p) for p in parts]
        np.testing.assert_allclose(overlap.norms, norms, rtol=1e-12)
        cosines = [
            [a @ b / (m * n) for b, n in zip(parts, norms, strict=True)] for a, m in zip(parts, norms, strict=True)
        ]
        np.testing.assert_allclose(overlap.cosines, cosines, atol=1e-12)
        np.testing.assert_allclose(overlap.ratio, np.linalg.norm(sum(parts)) / np.linalg.norm(norms), rtol=1e-10)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float64], ids=["bfloat16", "float64"])
def test_other_dtypes(dtype):
    kind = np.float64 if dtype is np.float64 else np.float32
    with jax.enable_x64(dtype is np.float64):
        model = random_model(dtype)
        patches = [patch_on(model, {1: random_delta(2, i, kind)}, request(f"Paris{i} is in")) for i in range(3)]
        merged, _ = merge_patches(patches, model)
        assert merged.dtype == str(np.dtype(dtype)) and merged.deltas[1].left.dtype == kind
        total = matrix(model, 1).astype(np.float64) + sum(p.deltas[1].dense() for p in patches)
        edited = apply_patch(model, merged)
        eps = float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(matrix(edited, 1).astype(np.float64), total, rtol=eps, atol=1e-15)
        assert matrix(withdraw_patch(edited, merged), 1).tobytes() == matrix(model, 1).tobytes()


def test_factors_are_joined_while_they_are_smaller():
    model = random_model()
    few = [patch_on(model, {0: random_delta(3, i)}) for i in range(4)]
    joined = merge_patches(few, model)[0].deltas[0]
    assert joined.right is not None and joined.left.shape == (D_FF, 12)
    assert merge_patches([*few, *few], model)[0].deltas[0].right is None


def test_ratio_and_cosine_say_what_happens_to_the_sum():
    model = random_model()
    delta, other = random_delta(2, 0), random_delta(2, 1)
    opposite = Delta(-delta.left, delta.right)
    across = Delta(delta.left, other.right - other.right @ np.linalg.pinv(delta.right) @ delta.right)
    nothing = Delta(np.zeros_like(delta.left), delta.right)
    for second, cosine, ratio in ((delta, 1, np.sqrt(2)), (opposite, -1, 0), (across, 0, 1), (nothing, 0, 1)):
        report = merge_patches([patch_on(model, {2: delta}), patch_on(model, {2: second})], model)[1]
        assert report.overlaps[0].patches == (0, 1)
        np.testing.assert_allclose(report.overlaps[0].cosines[0][1], cosine, atol=1e-6)
        np.testing.assert_allclose(report.overlaps[0].ratio, ratio, atol=1e-6)


def test_cosines_of_factors_that_nearly_cancel():
    """Two huge columns whose difference is the update: the inner product of the factors alone would lose it."""
    model, rng = random_model(), np.random.default_rng(0)
    near = rng.normal(size=(D_FF, 1)).astype(np.float32) * 1e4
    left = np.hstack([near, near + rng.normal(size=(D_FF, 1)).astype(np.float32) * 1e-2])
    right = np.vstack([r := rng.normal(size=(1, D_MODEL)).astype(np.float32), -r])
    patches = [patch_on(model, {0: Delta(left, right)}), patch_on(model, {0: random_delta(2, 3)})]
    overlap = merge_patches(patches, model)[1].overlaps[0]
    exact = [p.deltas[0].left.astype(np.longdouble) @ p.deltas[0].right.astype(np.longdouble) for p in patches]
    norms = [np.sqrt(np.sum(x * x)) for x in exact]
    np.testing.assert_allclose(overlap.norms, np.array(norms, float), rtol=1e-7)
    np.testing.assert_allclose(
        overlap.cosines[0][1], float(np.sum(exact[0] * exact[1]) / norms[0] / norms[1]), rtol=1e-6
    )


def test_conflicting_requests_are_found():
    model = random_model()
    first = patch_on(model, {0: random_delta(1, 0)}, request(id="a"), request("Rome is in", "Italy"))
    again = patch_on(model, {1: random_delta(1, 1)}, request("Paris  is in ", " Rome", id="b"))
    against = patch_on(model, {0: random_delta(1, 2)}, request(target="Oslo", id="c"), request("Rome was in", "Italy"))
    later = patch_on(apply_patch(model, first), {0: random_delta(1, 3)}, request(target="Bern", id="d"))
    merged, report = merge_patches([first, again, against, later], model)
    assert report.on_top_of == ((), (), (), (0,))
    assert len(merged.requests) == 6
    found = {(c.kind, c.patches, c.ids, c.targets) for c in report.conflicts}
    assert found == {
        ("repeats", (0, 1), ("a", "b"), ("Rome", " Rome")),
        ("contradicts", (0, 2), ("a", "c"), ("Rome", "Oslo")),
        ("contradicts", (1, 2), ("b", "c"), (" Rome", "Oslo")),
        ("updates", (0, 3), ("a", "d"), ("Rome", "Bern")),
        ("contradicts", (1, 3), ("b", "d"), (" Rome", "Bern")),
        ("contradicts", (2, 3), ("c", "d"), ("Oslo", "Bern")),
    }
    assert {c.prompt for c in report.conflicts} == {"Paris is in"}


def test_a_chain_of_three_through_different_layers():
    model = random_model()
    first = patch_on(model, {0: random_delta(1, 0), 1: random_delta(2, 1)})
    once = apply_patch(model, first)
    second = patch_on(once, {1: random_delta(1, 2), 2: random_delta(1, 3)})
    third = patch_on(apply_patch(once, second), {2: random_delta(1, 4), 3: random_delta(1, 5)})
    aside = patch_on(model, {3: random_delta(1, 6)})
    assert merge_patches([first, second, aside, third], model)[1].on_top_of == ((), (0,), (), (0, 1))
    with pytest.raises(PatchError, match=r"- patch 1: the matrices of layers \[2\].*another model$"):
        merge_patches([third, first, second], model)
    with pytest.raises(PatchError, match=r"(?s)- Tuesday: .* layers \[1, 2\].*- Wednesday: .* layers \[3\]"):
        merge_patches([second, third], random_model(seed=1), ["Tuesday", "Wednesday"])


def test_patches_of_another_model_are_named():
    model, other = random_model(), random_model(seed=1)
    good, bad = (patch_on(m, {0: random_delta(1, 0), 2: random_delta(1, 1)}) for m in (model, other))
    with pytest.raises(PatchError, match=r"patch 2: the matrices of layers \[0, 2\]") as caught:
        merge_patches([good, bad], model)
    assert "patch 1" not in str(caught.value)
    shallow = dataclasses.replace(CONFIG, n_layer=2, windows=(0, 0))
    small = Decoder(shallow, nest({p: jnp.zeros(s, jnp.float32) for p, (s, _) in parameter_shapes(shallow).items()}))
    with pytest.raises(PatchError, match=r"patch 1: the matrices of layers \[0, 2\]"):
        merge_patches([good], small)
    changed = matrix(model, 2).copy()
    changed[0, 0] = np.nextafter(changed[0, 0], np.float32(9))
    with pytest.raises(PatchError, match=r"patch 1: the matrices of layers \[2\]"):
        merge_patches([good], with_matrices(model, {2: changed}))
    for patches, names in (([], None), ([good], ["a", "b"])):
        with pytest.raises(PatchError, match="give at least one patch, and each a name"):
            merge_patches(patches, model, names)


def test_command(tiny, goldens, tmp_path):
    model = tiny("tiny-gptj")[0]
    shape = (model.config.d_ff, model.config.d_model)

    def save(name, target, seed):
        rng = np.random.default_rng(seed)
        delta = Delta(*(0.1 * rng.normal(size=s).astype(np.float32) for s in ((shape[0], 2), (2, shape[1]))))
        patch_on(model, {1: delta}, request(target=target)).save(tmp_path / name)
        return str(tmp_path / name)

    files = [save("a.jaxedit", "Rome", 0), save("b.jaxedit", "Oslo", 1)]
    call = ["merge", *files, "--base", str(goldens / "tiny-gptj"), "--out", str(tmp_path / "both.jaxedit")]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0, shown.output
    assert "2 edits of 2 patches in layers [1]" in shown.stdout and "contradicts" in shown.stdout
    assert "1 of these contradict each other" in shown.stderr
    document = json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)
    assert document["report"]["names"] == files and document["report"]["overlaps"][0]["layer"] == 1
    assert document["report"]["conflicts"][0]["targets"] == ["Rome", "Oslo"]
    merged = EditPatch.load(tmp_path / "both.jaxedit")
    assert merged.method["name"] == "merge" and apply_patch(model, merged)
    refused = CliRunner().invoke(app, ["merge", *files, "--base", str(goldens / "tiny-llama"), "--out", "x"])
    assert refused.exit_code == 1 and "b.jaxedit: the matrices of layers [1]" in " ".join(refused.stderr.split())
