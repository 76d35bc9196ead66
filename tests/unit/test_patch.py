"""Patches: applied and withdrawn to the last bit, saved and read back, and refused where they do not fit."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers_model import random_weights, small_llama
from hypothesis import HealthCheck, given, settings

from jaxedit.errors import PatchError
from jaxedit.export.patch import (
    Delta,
    EditPatch,
    add,
    apply_patch,
    make_patch,
    subtract,
    undo_of,
    with_matrices,
    withdraw_patch,
)
from jaxedit.models.config import parameter_shapes
from jaxedit.models.conversion import flatten, nest
from jaxedit.models.transformer import Decoder
from jaxedit.types import EditRequest

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
D_FF, D_MODEL, LAYERS = 12, 8, (0, 2)
CONFIG = small_llama(3, D_MODEL, D_FF)
often = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(params=list(DTYPES))
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(DTYPES[request.param])


def random_model(dtype, seed: int = 0) -> Decoder:
    return random_weights(CONFIG, dtype, seed)


def bits(x) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


def fingerprint(model: Decoder) -> dict[str, bytes]:
    return {path: np.asarray(x).tobytes() for path, x in flatten(model.params).items()}


def random_patch(model: Decoder, rank: int = 2, scale: float = 0.1) -> tuple[EditPatch, Decoder]:
    rng = np.random.default_rng(1)
    kind = np.float64 if model.dtype == np.float64 else np.float32
    deltas = {
        l: Delta.of(rng.normal(size=(D_FF, rank)) * scale, rng.normal(size=(rank, D_MODEL)), kind) for l in LAYERS
    }
    originals = {l: np.asarray(model.params["blocks"]["down"]["w"][l]) for l in LAYERS}
    requests = (EditRequest("Paris is in", "Paris", "Rome", id=7), EditRequest("Rome is", "Rome", "東京"))
    patch, edited = make_patch({"name": "fe", "layers": list(LAYERS)}, requests, originals, deltas)
    return patch, with_matrices(model, edited)


def exact_sum(matrix, delta: Delta) -> np.ndarray:
    return np.asarray(matrix, np.float64) + delta.dense()


# Exactness


def values(dtype):
    """Every kind of number: zeros of both signs, subnormals, tiny ones, and ones of very different sizes."""
    info = ml_dtypes.finfo(dtype)
    tiny, least = float(info.tiny), float(info.smallest_subnormal)
    special = [0.0, -0.0, least, -least, tiny, -tiny, tiny / 2, 1.0, -1.0, 3e-5, 100.0]
    exponents = st.tuples(st.floats(-1, 1), st.integers(-12, 3)).map(lambda p: p[0] * 10.0 ** p[1])
    return st.sampled_from(special) | exponents


@pytest.mark.parametrize("name", list(DTYPES))
@often
@given(data=st.data())
def test_subtract_restores_any_matrix(name, data):
    dtype = DTYPES[name]
    kind = np.float64 if name == "float64" else np.float32
    shape = (3, 4)
    numbers = st.lists(values(dtype), min_size=12, max_size=12)
    matrix = np.asarray(data.draw(numbers), np.float64).astype(dtype).reshape(shape)
    delta = Delta(np.asarray(data.draw(numbers), kind).reshape(shape) * kind(data.draw(st.sampled_from([1, 1e4]))))
    edited = add(matrix, delta)
    assert edited.dtype == matrix.dtype
    undo = undo_of(matrix, edited, delta)
    restored = subtract(edited, delta, undo)
    assert restored.dtype == matrix.dtype
    np.testing.assert_array_equal(bits(restored), bits(matrix))


@pytest.mark.parametrize("name", list(DTYPES))
def test_tiny_weights_under_a_huge_update(name):
    """The edited matrix remembers nothing of the original: all of it is in the undo record."""
    dtype = DTYPES[name]
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(5, 6)) * 1e-30).astype(dtype)
    matrix[0, :3] = [0.0, -0.0, ml_dtypes.finfo(dtype).smallest_subnormal]
    delta = Delta(rng.normal(size=(5, 6)).astype(np.float32) * 1e6)
    edited = add(matrix, delta)
    assert np.asarray(edited, np.float64).min() < -1e4
    undo = undo_of(matrix, edited, delta)
    assert len(undo.far_index) >= 25  # further than eight bits can say
    np.testing.assert_array_equal(bits(subtract(edited, delta, undo)), bits(matrix))


def test_add_rounds_once(dtype):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(30, 20)).astype(dtype)
    delta = Delta(rng.normal(size=(30, 2)).astype(np.float32), rng.normal(size=(2, 20)).astype(np.float32))
    np.testing.assert_array_equal(bits(add(matrix, delta)), bits(exact_sum(matrix, delta).astype(dtype)))


@pytest.mark.parametrize("scale", [0.0, 1e-9, 0.1, 1e5])
def test_apply_then_withdraw(dtype, scale):
    model = random_model(dtype)
    patch, edited = random_patch(model, scale=scale)
    before = fingerprint(model)
    applied = apply_patch(model, patch)
    assert fingerprint(applied) == fingerprint(edited)
    assert {path for path, x in fingerprint(applied).items() if x != before[path]} <= {"blocks.down.w"}
    assert (fingerprint(applied) != before) == (scale > 1e-3 or (scale > 0 and dtype != ml_dtypes.bfloat16))
    untouched = np.asarray(applied.params["blocks"]["down"]["w"][1])
    np.testing.assert_array_equal(bits(untouched), bits(np.asarray(model.params["blocks"]["down"]["w"][1])))
    assert fingerprint(withdraw_patch(applied, patch)) == before
    assert fingerprint(model) == before


def test_the_undo_record_is_small(dtype):
    """Where update and weights are of one size, few entries miss, and none by much."""
    patch, _ = random_patch(random_model(dtype))
    for undo in patch.undo.values():
        assert undo.steps.dtype == np.int8
        assert (undo.steps == 0).mean() > 0.4


def test_withdraw_with_the_base(dtype):
    model = random_model(dtype)
    patch, edited = random_patch(model)
    assert fingerprint(withdraw_patch(edited, patch, base=model)) == fingerprint(model)
    with pytest.raises(PatchError, match="withdraw with"):
        withdraw_patch(edited, patch, base=edited)


def test_a_wider_model_is_withdrawn_with_its_base():
    """The same weights loaded in float32 have the same hash, but the steps were counted in bfloat16."""
    narrow = random_model(ml_dtypes.bfloat16)
    patch, _ = random_patch(narrow)
    wide = narrow.with_params(jax.tree.map(lambda x: x.astype(jnp.float32), narrow.params))
    applied = apply_patch(wide, patch)
    with pytest.raises(PatchError, match="made on a bfloat16 model and this one is float32; pass base="):
        withdraw_patch(applied, patch)
    assert fingerprint(withdraw_patch(applied, patch, base=wide)) == fingerprint(wide)


# What does not fit


def test_wrong_models_are_refused(dtype):
    model = random_model(dtype)
    patch, edited = random_patch(model)
    other = random_model(dtype, seed=5)
    for action, wrong in (
        (apply_patch, other),
        (apply_patch, edited),
        (withdraw_patch, model),
        (withdraw_patch, other),
    ):
        with pytest.raises(PatchError, match=r"matrices of layers \[0, 2\] are not those of the patch"):
            action(wrong, patch)


def test_one_changed_weight_is_enough(dtype):
    model = random_model(dtype)
    patch, _ = random_patch(model)
    matrix = np.array(model.params["blocks"]["down"]["w"][2])
    matrix[3, 4] = np.nextafter(matrix[3, 4], matrix.dtype.type(9))
    with pytest.raises(PatchError, match=r"layers \[2\]"):
        apply_patch(with_matrices(model, {2: matrix}), patch)


def test_other_shapes_are_refused():
    model = random_model(np.float32)
    patch, _ = random_patch(model)
    shallow = dataclasses.replace(CONFIG, n_layer=2, windows=(0, 0))
    smaller = Decoder(
        shallow, nest({p: jnp.zeros(shape, jnp.float32) for p, (shape, _) in parameter_shapes(shallow).items()})
    )
    with pytest.raises(PatchError, match="its matrices are"):
        apply_patch(smaller, patch)


# Storage


def same(a: EditPatch, b: EditPatch):
    for name in ("method", "requests", "base", "edited", "dtype", "layers"):
        assert getattr(a, name) == getattr(b, name), name
    for l in a.layers:
        for mine, theirs in ((a.deltas[l], b.deltas[l]), (a.undo[l], b.undo[l])):
            for field in dataclasses.fields(mine):
                x, y = getattr(mine, field.name), getattr(theirs, field.name)
                assert (x is None) == (y is None)
                if x is not None:
                    assert (x.dtype, x.shape) == (y.dtype, y.shape)
                    np.testing.assert_array_equal(bits(x), bits(y))


@pytest.mark.parametrize("rank", [1, 20])
@pytest.mark.parametrize("scale", [0.1, 1e8])
def test_save_and_load(tmp_path, dtype, rank, scale):
    model = random_model(dtype)
    patch, edited = random_patch(model, rank, scale)
    path = patch.save(tmp_path / "new folder" / "facts.jaxedit")
    assert [p.name for p in path.parent.iterdir()] == ["facts.jaxedit"]
    loaded = EditPatch.load(path)
    same(patch, loaded)
    assert fingerprint(apply_patch(model, loaded)) == fingerprint(edited)
    assert fingerprint(withdraw_patch(edited, loaded)) == fingerprint(model)


def test_low_rank_only_where_it_is_smaller():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(D_FF, 4)), rng.normal(size=(4, D_MODEL))
    low = Delta.of(left, right, np.float32)  # 4 · (12 + 8) = 80 numbers for 96
    assert low.left.shape == (12, 4)
    assert low.right is not None
    assert low.left.dtype == low.right.dtype == np.float32
    left, right = rng.normal(size=(D_FF, 5)), rng.normal(size=(5, D_MODEL))
    dense = Delta.of(left, right, np.float32)  # 5 · 20 = 100 numbers for 96
    assert dense.right is None
    assert dense.left.shape == (12, 8)
    assert dense.left.dtype == np.float32
    np.testing.assert_allclose(dense.dense(), left @ right, rtol=1e-5, atol=1e-6)


def test_truncated_and_foreign_files(tmp_path):
    from safetensors.numpy import save_file

    model = random_model(np.float32)
    patch, _ = random_patch(model)
    path = patch.save(tmp_path / "a.jaxedit")
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(PatchError, match="a.jaxedit"):
            EditPatch.load(path)
    path.write_text("just text")
    with pytest.raises(PatchError, match="not a complete jaxedit patch"):
        EditPatch.load(path)
    save_file({"x": np.zeros(3, np.float32)}, path)
    with pytest.raises(PatchError, match="not a complete jaxedit patch"):
        EditPatch.load(path)
    path.write_bytes(whole.replace(b"jaxedit-patch-1", b"jaxedit-patch-9"))
    with pytest.raises(PatchError, match="jaxedit-patch-9"):
        EditPatch.load(path)
    with pytest.raises(PatchError, match="no patch at"):
        EditPatch.load(tmp_path / "missing.jaxedit")


def test_a_file_whose_bytes_changed_is_not_withdrawn(tmp_path):
    """A flipped bit in the update changes what is computed, and the hashes notice."""
    model = random_model(np.float32)
    patch, edited = random_patch(model)
    path = patch.save(tmp_path / "a.jaxedit")
    loaded = EditPatch.load(path)
    left = loaded.deltas[0].left.copy()
    left[0, 0] += 1.0
    damaged = dataclasses.replace(loaded, deltas={**loaded.deltas, 0: Delta(left, loaded.deltas[0].right)})
    with pytest.raises(PatchError, match=r"layers \[0\] are not restored exactly"):
        withdraw_patch(edited, damaged)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    import safetensors.numpy

    patch, _ = random_patch(random_model(np.float32))
    path = patch.save(tmp_path / "a.jaxedit")
    whole = path.read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    for target in (path, tmp_path / "b.jaxedit"):
        with pytest.raises(OSError, match="no space"):
            patch.save(target)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jaxedit"]
    assert path.read_bytes() == whole


def test_two_patches_come_off_in_reverse_order(dtype):
    model = random_model(dtype)
    first, once = random_patch(model)
    second, twice = random_patch(once, rank=1, scale=0.3)
    with pytest.raises(PatchError, match="not those of the patch"):
        withdraw_patch(twice, first)
    assert fingerprint(withdraw_patch(withdraw_patch(twice, second), first)) == fingerprint(model)
