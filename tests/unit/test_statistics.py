"""Second moments: the records, the files they live in, and the pass that makes them."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jaxedit_kernels.second_moment import second_moment

import jaxedit.moments_pass as moments_pass
from jaxedit.data.corpus import pack_documents
from jaxedit.errors import JaxEditError, StatisticsError
from jaxedit.models.hub import load
from jaxedit.models.transformer import Context, embed, run
from jaxedit.statistics import SecondMoment, SecondMoments, read_npz, second_moments

GOLDENS = Path(__file__).parents[1] / "goldens"
SIZES = dict(length=48, batch=4)  # the same everywhere, so that the pass is compiled once
WORDS = "the river town of an old king was built in stone by people who came from the north".split()
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 5 + i % 30)).capitalize() + "." for i in range(60)]


@pytest.fixture(scope="module")
def tiny():
    return load(GOLDENS / "tiny-llama")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moments"


def close(a, b, tolerance=1e-6):
    return np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def same(a: SecondMoments, b: SecondMoments) -> bool:
    return a.layers == b.layers and all(np.array_equal(a[l].matrix, b[l].matrix) for l in a.layers)


def moment(keys) -> SecondMoment:
    return SecondMoment(keys.T @ keys / len(keys), len(keys))


# The records

keys = st.integers(1, 5).flatmap(
    lambda n: arrays(np.float64, (n, 3), elements=st.floats(-10, 10, allow_subnormal=False))
)


@given(keys, keys, keys)
def test_merging_is_associative_and_equals_concatenation(a, b, c):
    left, right = (moment(a) + moment(b)) + moment(c), moment(a) + (moment(b) + moment(c))
    whole = moment(np.concatenate([a, b, c]))
    assert left.count == right.count == whole.count
    np.testing.assert_allclose(left.matrix, right.matrix, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(left.matrix, whole.matrix, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("matrix", "count", "message"),
    [
        (np.ones((2, 3)), 5, "shape"),
        (np.ones(4), 5, "shape"),
        (
            np.array([[1, np.nan], [np.inf, 1]]),
            5,
            r"2 of 4 entries are NaN or infinite, at \(0, 1\), \(1, 0\)",
        ),
        (np.array([[1.0, 0.5], [0.4, 1.0]]), 5, "not symmetric"),
        (np.array([[1.0, 0.0], [0.0, -1.0]]), 5, "negative"),
        (np.eye(2), 0, "count"),
        (np.eye(2), 1.5, "count"),
        (np.eye(2), None, "count"),
        (np.eye(2), float("nan"), "count"),
    ],
)
def test_what_is_not_a_second_moment(matrix, count, message):
    with pytest.raises(StatisticsError, match=message):
        SecondMoment(matrix, count)
    with pytest.raises(StatisticsError, match=f"layer 7: .*{message}"):
        SecondMoments.from_arrays({7: matrix}, count)


def test_moments_are_read_only_and_leave_the_callers_array_alone():
    mine = np.eye(3)
    made = SecondMoment(mine, 4)
    with pytest.raises(ValueError):
        made.matrix[0, 0] = 2
    mine[0, 0] = 3
    assert SecondMoment(jnp.eye(3, dtype=jnp.bfloat16), 4).matrix.dtype == np.float32


def test_moments_are_a_mapping():
    made = SecondMoments.from_arrays({3: np.eye(2), 1: 2 * np.eye(2)}, {3: 5, 1: 6})
    assert made.layers == tuple(made) == (1, 3)
    assert (made[1].count, made[3].count, len(made)) == (6, 5, 2)
    assert 1 in made and 2 not in made
    with pytest.raises(StatisticsError, match=r"layer 2, only of layers \[1, 3\]"):
        made[2]
    with pytest.raises(StatisticsError, match="different shapes"):
        SecondMoments.from_arrays({0: np.eye(2), 1: np.eye(3)}, 5)
    with pytest.raises(StatisticsError, match="no layers"):
        SecondMoments({})


def test_merging_moments_of_several_layers():
    a = SecondMoments.from_arrays({1: np.eye(2), 2: np.eye(2)}, 1, fingerprint="x")
    b = SecondMoments.from_arrays({1: 3 * np.eye(2), 2: np.eye(2)}, 3, fingerprint="x")
    merged = a.merge(b)
    assert np.array_equal(merged[1].matrix, 2.5 * np.eye(2)) and merged[1].count == 4
    assert merged.fingerprint == "x"
    with pytest.raises(StatisticsError, match="different models"):
        a.merge(SecondMoments.from_arrays({1: np.eye(2), 2: np.eye(2)}, 1, fingerprint="y"))
    with pytest.raises(StatisticsError, match="layers"):
        a.merge(SecondMoments.from_arrays({1: np.eye(2)}, 1))
    with pytest.raises(StatisticsError, match="cannot merge"):
        a[1] + SecondMoment(np.eye(3), 1)


# Files


def test_files_round_trip_and_are_checked(tmp_path):
    made = SecondMoments.from_arrays(
        {1: np.eye(3, dtype=np.float32), 4: 2 * np.eye(3)},
        {1: 5, 4: 7},
        fingerprint="x",
        about={"corpus": "c"},
    )
    path = made.save(tmp_path / "new" / "moments.safetensors")
    read = SecondMoments.load(path)
    assert same(made, read) and read[4].count == 7
    assert (read.fingerprint, dict(read.about)) == ("x", {"corpus": "c"})
    assert [read[l].matrix.dtype for l in read] == [np.float32, np.float64]
    whole = path.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(StatisticsError, match="not a complete file"):
            SecondMoments.load(path)
    path.write_bytes(whole.replace(b"jaxedit-moments-1", b"jaxedit-moments-9"))
    with pytest.raises(StatisticsError, match="jaxedit-moments-9"):
        SecondMoments.load(path)
    with pytest.raises(StatisticsError, match="not a complete file"):
        SecondMoments.load(GOLDENS / "tiny-llama" / "model.safetensors")
    with pytest.raises(StatisticsError, match="no second moments at"):
        SecondMoments.load(tmp_path / "nothing")


@pytest.mark.parametrize("prefix", ["mom2.", ""])
def test_published_statistics(tmp_path, prefix):
    k = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    stored = {
        prefix + "constructor": np.array("util.runningstats.SecondMoment()"),
        prefix + "count": np.array(50),
        prefix + "mom2": k.T @ k,
        "sample_size": np.array(50),
        "unused": np.array([{"pickled": 1}], dtype=object),
    }
    np.savez(tmp_path / "stats.npz", **stored)
    read = read_npz(tmp_path / "stats.npz")
    assert read.count == 50 and read.matrix.dtype == np.float32
    assert close(read.matrix, k.T @ k / 50)


def test_published_statistics_that_are_not(tmp_path):
    with pytest.raises(StatisticsError, match="no statistics at"):
        read_npz(tmp_path / "nothing.npz")
    np.savez(tmp_path / "a.npz", other=np.eye(2))
    np.savez(tmp_path / "b.npz", **{"mom2.mom2": np.array([{}], dtype=object), "mom2.count": np.array(3)})
    np.savez(tmp_path / "c.npz", **{"mom2.mom2": np.full((2, 2), np.nan), "mom2.count": np.array(3)})
    (tmp_path / "d.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    (tmp_path / "e.npz").write_bytes(b"\x80\x04N.")  # a pickle
    np.save(tmp_path / "f.npy", np.eye(2))
    for name in ("a.npz", "b.npz", "c.npz", "d.npz", "e.npz", "f.npy"):
        with pytest.raises(StatisticsError, match=name[0] + r"\.np"):
            read_npz(tmp_path / name)


# Which model


def test_moments_fit_their_model_and_its_edited_versions_only(tiny):
    model, tokenizer = tiny
    made = second_moments(model, tokenizer, TEXTS, (1, 2), **SIZES, cache=False)
    made.check(model)
    params = model.params
    down = params["blocks"]["down"]["w"]
    edited = {**params, "blocks": {**params["blocks"], "down": {"w": down.at[1, 0, 0].add(1.0)}}}
    made.check(model.with_params(edited))
    other = {**params, "embed": {"tokens": params["embed"]["tokens"].at[5, 5].add(1.0)}}
    with pytest.raises(StatisticsError, match="other weights"):
        made.check(model.with_params(other))
    # Without a fingerprint only sizes can be checked
    SecondMoments(made.moments).check(model.with_params(other))
    with pytest.raises(StatisticsError, match="2 channels"):
        SecondMoments.from_arrays({1: np.eye(2)}, 5).check(model)
    with pytest.raises(StatisticsError, match="layer 9"):
        SecondMoments.from_arrays({9: np.eye(model.config.d_ff)}, 5).check(model)


@pytest.mark.parametrize("layers", [None, (), (1, 6), (-1,), ("1",), (1.5,)])
def test_layers_must_be_named_and_exist(tiny, layers):
    with pytest.raises(StatisticsError, match="layers 0 … 5"):
        second_moments(*tiny, TEXTS, layers)


def test_no_tokenizer_and_no_tokens(tiny):
    with pytest.raises(JaxEditError, match="tokenizer"):
        second_moments(tiny[0], None, TEXTS, (1,))
    with pytest.raises(StatisticsError, match="no tokens"):
        second_moments(*tiny, [" "], (1,))


def test_keys_that_are_not_finite(tiny, cache):
    model, tokenizer = tiny
    params = model.params
    up = params["blocks"]["up"]["w"].at[2].set(jnp.inf)
    broken = model.with_params({**params, "blocks": {**params["blocks"], "up": {"w": up}}})
    with pytest.raises(StatisticsError, match="layer 2: .*NaN or infinite"):
        second_moments(broken, tokenizer, TEXTS, (1, 2), **SIZES)
    assert not list(cache.glob("*"))


# The pass


def direct(model, rows, layers):
    """Moments with nothing clever: all layers run, all keys kept."""
    tokens, positions, segments = (np.stack(column) for column in zip(*rows, strict=True))
    params, config, context = model.params, model.config, Context(positions, segments)
    h = embed(params, config, tokens, context)
    _, keys = run(params, config, h, context, 0, config.n_layer, probe=lambda inside: inside.key)
    kept = {l: np.asarray(keys[l], np.float64)[segments > 0] for l in layers}
    return {l: k.T @ k / len(k) for l, k in kept.items()}


@pytest.mark.parametrize("layers", [(0,), (4, 0, 1), (1, 2, 3, 5)])
def test_any_layers(tiny, layers):
    model, tokenizer = tiny
    made = second_moments(model, tokenizer, TEXTS, layers, **SIZES, max_tokens=500)
    expected = direct(model, pack_documents(tokenizer, TEXTS, 48, 500), sorted(layers))
    assert made.layers == tuple(sorted(layers))
    for l in made:
        assert made[l].count == 500
        assert close(made[l].matrix, expected[l])
        assert np.array_equal(made[l].matrix, made[l].matrix.T)


def test_packing_and_padding_make_no_difference(tiny):
    model, tokenizer = tiny
    alone, texts = [], [" ".join(text.split()[:10]) for text in TEXTS]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        row = np.zeros((3, 48), np.int32)
        row[0] = 300  # the embedding of token 0 is zero in this model, which would hide that padding is counted
        row[:, : len(ids)] = ids, np.arange(len(ids)), np.ones(len(ids))
        alone.append(tuple(row))
    layers = (1, 2)
    packed = pack_documents(tokenizer, texts, 48, 10**6)
    found, count = moments_pass.moments_of_rows(model.params, model.config, packed, layers, batch=4)
    expected, expected_count = moments_pass.moments_of_rows(model.params, model.config, alone, layers, batch=4)
    assert count == expected_count
    assert all(close(found[l], expected[l]) for l in layers)


def test_wide_models_take_the_gram_in_strips():
    k = jnp.asarray(np.random.default_rng(0).normal(size=(40, 1300)), jnp.float32)
    total = second_moment(k, jnp.zeros((2, 1300, 1300)), slot=1)
    assert not total[0].any()
    assert close(moments_pass._mean(total[None, 1], 40), np.asarray(k.T @ k) / 40)


def test_float64_sums_of_a_float32_model(tiny):
    with jax.enable_x64(True):
        made = second_moments(*tiny, TEXTS, (1, 2), **SIZES, dtype="float64", cache=False)
    assert made[1].matrix.dtype == np.float64
    assert close(second_moments(*tiny, TEXTS, (1, 2), **SIZES, cache=False)[1].matrix, made[1].matrix)


def test_one_trace_and_progress(tiny, monkeypatch):
    traced, seen = [], []
    monkeypatch.setattr(moments_pass, "embed", lambda *a: traced.append(1) or embed(*a))
    for most in (1100, 900):
        seen.clear()
        second_moments(*tiny, TEXTS, (0, 2), **SIZES, max_tokens=most, on_progress=lambda *at: seen.append(at))
        assert seen[-1] == (most, most)
        assert seen == sorted(seen) and len(seen) > 4
    assert len(traced) == 1


# Cache and checkpoints


def test_the_cache_saves_the_pass(tiny, cache, monkeypatch):
    first = second_moments(*tiny, TEXTS, (1, 2), **SIZES)
    second_moments(*tiny, TEXTS, (1, 2), **SIZES, max_tokens=100)
    second_moments(*tiny, TEXTS[1:], (1, 2), **SIZES)
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setattr("jaxedit.statistics.moments_of_rows", lambda *_, **__: pytest.fail("computed again"))
    again = second_moments(*tiny, list(TEXTS), [2, 1], **SIZES)
    assert same(first, again) and again.fingerprint == first.fingerprint


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other layers"])
def test_a_bad_cache_file_is_reported_and_replaced(tiny, cache, damage):
    first = second_moments(*tiny, TEXTS, (1, 2), **SIZES)
    (file,) = cache.iterdir()
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "foreign":
        file.write_bytes((GOLDENS / "tiny-llama" / "model.safetensors").read_bytes())
    else:
        SecondMoments({2: first[1]}).save(file)
    with pytest.warns(UserWarning, match="not usable and are computed again"):
        again = second_moments(*tiny, TEXTS, (1, 2), **SIZES)
    assert same(first, again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second_moments(*tiny, TEXTS, (1, 2), **SIZES)


class Interrupted(Exception):
    pass


def interrupt(done, total):
    if done > 600:
        raise Interrupted


def test_an_interrupted_pass_resumes_to_the_same_bits(tiny, cache, monkeypatch):
    settings = dict(**SIZES, max_tokens=1200, checkpoint_every=200)
    whole = second_moments(*tiny, TEXTS, (1, 2), cache=False, **settings)
    with pytest.raises(Interrupted):
        second_moments(*tiny, TEXTS, (1, 2), on_progress=interrupt, **settings)
    assert list(cache.glob("*.partial/*/after-*"))
    ran = []
    step = moments_pass._step
    monkeypatch.setattr(moments_pass, "_step", lambda *a, **k: ran.append(1) or step(*a, **k))
    resumed = second_moments(*tiny, TEXTS, (1, 2), **settings)
    assert same(whole, resumed) and resumed[1].count == 1200
    assert 0 < len(ran) <= 4
    assert [p.suffix for p in cache.iterdir()] == [".safetensors"]


def test_a_damaged_checkpoint_is_reported_and_ignored(tiny, cache):
    settings = dict(**SIZES, max_tokens=1200, checkpoint_every=200)
    with pytest.raises(Interrupted):
        second_moments(*tiny, TEXTS, (1, 2), on_progress=interrupt, **settings)
    for file in cache.glob("*.partial/*/after-*/**/*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.warns(UserWarning, match="ignored"):
        resumed = second_moments(*tiny, TEXTS, (1, 2), **settings)
    assert same(resumed, second_moments(*tiny, TEXTS, (1, 2), cache=False, **settings))


# Several devices

ON_FOUR = """
import sys
import numpy as np
from jaxedit.models.hub import load
from jaxedit.sharding import make_mesh
from jaxedit.statistics import second_moments

name, *texts = sys.argv[1:]
model, tokenizer = load(name)
settings = dict(layers=(1, 2), length=48, max_tokens=1200)
one = second_moments(model, tokenizer, texts, batch=5, cache=False, **settings)
split, _ = load(name, mesh=make_mesh(2, 2))
others = [
    second_moments(model, tokenizer, texts, batch=5, mesh=make_mesh(4), checkpoint_every=400, **settings),
    second_moments(split, tokenizer, texts, batch=5, cache=False, **settings),
]
for other in others:
    assert other.fingerprint == one.fingerprint
    for l in one:
        assert other[l].count == one[l].count == 1200
        difference = np.linalg.norm(other[l].matrix - one[l].matrix) / np.linalg.norm(one[l].matrix)
        assert difference < 1e-6, difference
"""


def test_four_devices_equal_one():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", ON_FOUR, str(GOLDENS / "tiny-llama"), *TEXTS],
        env={**os.environ, **flags, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
