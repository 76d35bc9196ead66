"""LoRA adapters: read back with numpy they make the patched matrices, and they are refused where they do not fit."""

import json

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import jaxedit.cli.shipping  # noqa: F401  (adds its commands)
from jaxedit.cli import app
from jaxedit.errors import JaxEditError, PatchError
from jaxedit.export.lora import apply_lora, check_lora, load_lora, save_lora
from jaxedit.export.patch import Delta, apply_patch, make_patch
from jaxedit.types import EditRequest

TINY = ["tiny-llama", "tiny-gpt2", "tiny-gptj"]
RANDOM = ["gemma2", "gpt_neox", "gpt_neox_seq", "llama3_rope", "mistral", "phi3", "qwen2", "qwen3"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def matrix(model, l: int) -> np.ndarray:
    return np.asarray(model.params["blocks"]["down"]["w"][l])


def patch_of(model, deltas):
    requests = (EditRequest("Paris is in", "Paris", "Rome", id=7),)
    originals = {l: matrix(model, l) for l in deltas}
    return make_patch({"name": "fe", "layers": sorted(deltas)}, requests, originals, deltas)[0]


def random_delta(model, rank: int | None, seed: int = 0, ratio: float = 1.0) -> Delta:
    """Low-rank, or dense without a rank. ratio: size of `right` to that of `left`; the product is about 0.01."""
    rng = np.random.default_rng(seed)
    d_ff, d_model = model.config.d_ff, model.config.d_model
    if rank is None:
        return Delta((0.01 * rng.normal(size=(d_ff, d_model))).astype(np.float32))
    scale = 0.1 / np.sqrt(ratio)
    left, right = scale * rng.normal(size=(d_ff, rank)), ratio * scale * rng.normal(size=(rank, d_model))
    return Delta(left.astype(np.float32), right.astype(np.float32))


def products(adapter) -> dict[str, np.ndarray]:
    """``(lora_alpha / r) · B A`` of each module, in float64, as PEFT's documentation defines it."""
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    tensors = {name: x.astype(np.float64) for name, x in load_file(adapter / WEIGHTS).items()}
    made = {}
    for module in config["target_modules"]:
        a, b = (tensors.pop(f"base_model.model.{module}.lora_{x}.weight") for x in "AB")
        assert a.shape[0] == b.shape[1] == config["r"]
        made[module] = config["lora_alpha"] / config["r"] * (b @ a)
    assert not tensors
    return made


def in_out(adapter, product: np.ndarray) -> np.ndarray:
    """What PEFT adds to a stored weight: transposed where the module stores ``[in, out]``."""
    return product.T if json.loads((adapter / CONFIG).read_text(encoding="utf-8"))["fan_in_fan_out"] else product


@pytest.mark.parametrize("name", TINY)
@settings(max_examples=15, deadline=None)
@given(
    ranks=st.dictionaries(st.integers(0, 5), st.integers(1, 47), min_size=1, max_size=4),
    ratio=st.sampled_from([1.0, 1e-6, 1e4]),
    seed=st.integers(0, 99),
)
def test_merged_adapter_equals_the_applied_patch(tiny, goldens, tmp_path_factory, name, ranks, ratio, seed):
    model = tiny(name)[0]
    to = tmp_path_factory.mktemp("lora") / "adapter"
    patch = patch_of(model, {l: random_delta(model, r, seed + l, ratio) for l, r in ranks.items()})
    info = save_lora(patch, model, to, base_name="org/model")
    assert info.rank == max(ranks.values())
    assert {l.layer: l.rank for l in info.layers} == ranks
    edited, stored = apply_patch(model, patch), load_file(goldens / name / "model.safetensors")
    made = products(to)
    for l in info.layers:
        assert l.error < 1e-12
        merged = stored[f"{l.module}.weight"].astype(np.float64) + in_out(to, made[l.module])
        orient = np.asarray if name == "tiny-gpt2" else np.transpose  # GPT-2 alone stores [in, out]
        expected = matrix(edited, l.layer)
        np.testing.assert_allclose(orient(merged), expected, rtol=2**-23, atol=1e-9)
    check_lora(to, model)
    ours = apply_lora(model, to)
    for l in range(model.config.n_layer):
        np.testing.assert_array_equal(matrix(ours, l), matrix(edited, l))


@pytest.mark.parametrize("name", [f"logits_only/{n}" for n in RANDOM] + TINY)
def test_modules_are_those_of_the_checkpoint(decoder, goldens, tmp_path, name):
    model = decoder(name)
    info = save_lora(patch_of(model, {1: random_delta(model, 2)}), model, tmp_path / "a")
    stored = load_file(goldens / name / "model.safetensors")
    for module, product in products(tmp_path / "a").items():
        assert stored[f"{module}.weight"].shape == in_out(tmp_path / "a", product).shape
        assert [module] == [l.module for l in info.layers] and ".1." in module


@pytest.mark.parametrize("rank", [1, 5, 30, None])
@pytest.mark.parametrize("given_rank", [None, 40], ids=["dense", "factors"])
def test_truncation_is_the_best_there_is(tiny, tmp_path, rank, given_rank):
    model = tiny("tiny-llama")[0]
    delta = random_delta(model, given_rank)
    info = save_lora(patch_of(model, {2: delta}), model, tmp_path / "a", rank=rank)
    exact = delta.dense().astype(np.float64)
    s = np.linalg.svd(exact, compute_uv=False)
    true_rank = given_rank or len(s)
    kept = rank or true_rank
    layer = info.layers[0]
    assert (info.rank, layer.rank) == (kept, kept)
    best = np.linalg.norm(s[kept:true_rank]) / np.linalg.norm(s)
    np.testing.assert_allclose(layer.error, best, rtol=1e-6, atol=1e-7)
    written = products(tmp_path / "a")[layer.module].T
    np.testing.assert_allclose(layer.error, np.linalg.norm(written - exact) / np.linalg.norm(s), rtol=1e-6, atol=1e-12)
    assert f"| {layer.error:.2g} |" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    if given_rank is None or rank is not None:  # singular values are split evenly
        delta = load_lora(tmp_path / "a")[2]
        np.testing.assert_allclose(np.linalg.norm(delta.left, axis=0), np.linalg.norm(delta.right, axis=1), rtol=1e-5)


def test_a_dense_update_of_low_rank_makes_a_small_adapter(tiny, tmp_path):
    model = tiny("tiny-llama")[0]
    thin = random_delta(model, 3)
    deltas = {0: Delta(thin.dense().astype(np.float32)), 1: Delta(np.zeros_like(thin.dense(), np.float32))}
    info = save_lora(patch_of(model, deltas), model, tmp_path / "a")
    assert [l.rank for l in info.layers] == [3, 1]
    assert info.layers[0].error < 1e-6 and info.layers[1].error == 0


@pytest.mark.parametrize(("dtype", "eps"), [("bfloat16", 2**-8), ("float16", 2**-11), ("float64", 2**-53)])
@pytest.mark.parametrize("ratio", [1.0, 1e9])
def test_other_dtypes_and_their_error(tiny, tmp_path, dtype, eps, ratio):
    """Factors of very different size fit 16 bits all the same, and the error that is reported is the true one."""
    model = tiny("tiny-llama")[0]
    delta = random_delta(model, 4, ratio=ratio)
    info = save_lora(patch_of(model, {1: delta}), model, tmp_path / "a", dtype=dtype)
    assert {x.dtype for x in load_file(tmp_path / "a" / WEIGHTS).values()} == {jnp.dtype(dtype)}
    exact = delta.dense()
    off = np.linalg.norm(products(tmp_path / "a")[info.layers[0].module].T - exact) / np.linalg.norm(exact)
    np.testing.assert_allclose(info.layers[0].error, off, rtol=1e-6, atol=1e-14)
    assert off < 2 * eps
    back = load_lora(tmp_path / "a")[1]
    assert back.left.dtype == (np.float64 if dtype == "float64" else np.float32)
    np.testing.assert_allclose(back.dense(), exact, atol=4 * eps * np.abs(exact).max())


def test_a_patch_of_a_bfloat16_model(tiny, tmp_path):
    """The adapter is exact; what is applied is rounded once, as the patch is."""
    model = tiny("tiny-gpt2")[0]
    model = model.with_params(jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))
    delta = random_delta(model, 3)
    patch = patch_of(model, {2: delta})
    assert patch.dtype == "bfloat16"
    layer = save_lora(patch, model, tmp_path / "a").layers[0]
    np.testing.assert_allclose(products(tmp_path / "a")[layer.module].T, delta.dense(), rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(matrix(apply_lora(model, tmp_path / "a"), 2), matrix(apply_patch(model, patch), 2))


def test_a_float64_patch(decoder, tmp_path):
    with jax.enable_x64(True):
        model = decoder("tiny-gptj")
        model = model.with_params(jax.tree.map(lambda x: x.astype(jnp.float64), model.params))
        wide = Delta(*(x.astype(np.float64) * (1 + 1e-8) for x in vars(random_delta(model, 3)).values()))
        patch = patch_of(model, {1: wide})
        assert save_lora(patch, model, tmp_path / "a").layers[0].error > 1e-9
        assert save_lora(patch, model, tmp_path / "b", dtype="float64").layers[0].error < 1e-14
        ours, theirs = matrix(apply_lora(model, tmp_path / "b"), 1), matrix(apply_patch(model, patch), 1)
        np.testing.assert_allclose(ours, theirs, rtol=1e-14, atol=1e-16)


def test_a_mismatched_base_is_refused(tiny, tmp_path):
    model, other = tiny("tiny-llama")[0], tiny("tiny-gptj")[0]
    patch = patch_of(model, {1: random_delta(model, 2), 4: random_delta(model, 3)})
    edited = apply_patch(model, patch)
    for wrong in (other, edited):
        with pytest.raises(PatchError, match=r"matrices of layers \[1, 4\] are not those that the patch was made on"):
            save_lora(patch, wrong, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    save_lora(patch, model, tmp_path / "a")
    check_lora(tmp_path / "a", model)
    for wrong in (other, edited):
        for use in (lambda m: check_lora(tmp_path / "a", m), lambda m: apply_lora(m, tmp_path / "a")):
            with pytest.raises(PatchError, match=r"does not fit this model: the matrices of layers \[1, 4\]"):
                use(wrong)


def test_foreign_and_damaged_adapters_are_refused(tiny, tmp_path):
    model = tiny("tiny-llama")[0]
    to = tmp_path / "a"
    save_lora(patch_of(model, {1: random_delta(model, 2)}), model, to)
    weights, config = (to / WEIGHTS).read_bytes(), (to / CONFIG).read_text(encoding="utf-8")
    with pytest.raises(PatchError, match="there is no adapter at .*missing"):
        load_lora(tmp_path / "nowhere")
    (to / CONFIG).write_text(config.replace('"r"', '"rank"'), encoding="utf-8")
    with pytest.raises(PatchError, match="not a complete jaxedit adapter: KeyError"):
        load_lora(to)
    (to / CONFIG).write_text(config.replace('"lora_alpha": 2', '"lora_alpha": 1'), encoding="utf-8")
    halved = load_lora(to)[1].dense()
    (to / CONFIG).write_text(config, encoding="utf-8")
    np.testing.assert_array_equal(2 * halved, load_lora(to)[1].dense())
    (to / WEIGHTS).write_bytes(weights[:-1])
    with pytest.raises(PatchError, match="not a complete jaxedit adapter"):
        load_lora(to)
    (to / WEIGHTS).write_bytes(weights.replace(b"jaxedit-lora-1", b"jaxedit-lora-9"))
    with pytest.raises(PatchError, match="jaxedit-lora-9"):
        check_lora(to, model)
    save_file(load_file(to / WEIGHTS), to / WEIGHTS)
    with pytest.raises(PatchError, match="an adapter from elsewhere"):
        check_lora(to, model)


def test_the_directory_appears_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    import safetensors.numpy

    model = tiny("tiny-llama")[0]
    first, second = (patch_of(model, {1: random_delta(model, r)}) for r in (2, 3))
    save_lora(first, model, tmp_path / "a")
    assert save_lora(second, model, tmp_path / "a").rank == load_lora(tmp_path / "a")[1].left.shape[1] == 3
    with monkeypatch.context() as patched:

        def fail(tensors, file, metadata):
            file.write_bytes(b"half of it")
            raise OSError("no space left")

        patched.setattr(safetensors.numpy, "save_file", fail)
        for to in ("a", "b"):
            with pytest.raises(OSError, match="no space"):
                save_lora(first, model, tmp_path / to)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert load_lora(tmp_path / "a")[1].left.shape[1] == 3
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(JaxEditError, match="is not an adapter; choose another directory"):
        save_lora(first, model, tmp_path / "b")
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["notes.txt"]


def test_impossible_settings_are_refused(tiny, tmp_path):
    model = tiny("tiny-llama")[0]
    patch = patch_of(model, {1: random_delta(model, 2)})
    with pytest.raises(JaxEditError, match="dtype 'int8' is none of float32"):
        save_lora(patch, model, tmp_path / "a", dtype="int8")
    with pytest.raises(JaxEditError, match="at least 1, got 0"):
        save_lora(patch, model, tmp_path / "a", rank=0)
    huge = patch_of(model, {1: random_delta(model, 2), 3: Delta(np.full((192, 64), 1e12, np.float32))})
    with pytest.raises(PatchError, match="update of layer 3 is too large for float16"):
        save_lora(huge, model, tmp_path / "a", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_what_vllm_reads(tiny, tmp_path):
    """One rank, one scale, no biases, no extra modules, and a README that names the option it needs."""
    model = tiny("tiny-llama")[0]
    save_lora(patch_of(model, {l: random_delta(model, 7 * l + 3) for l in (0, 2)}), model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text(encoding="utf-8"))
    assert config["r"] == config["lora_alpha"] == 17
    assert config["bias"] == "none" and config["modules_to_save"] is None
    assert not (config["use_dora"] or config["use_rslora"] or config["rank_pattern"] or config["alpha_pattern"])
    assert config["target_modules"] == ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    assert "--max-lora-rank 32" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")


def test_command(tiny, goldens, tmp_path):
    model = tiny("tiny-llama")[0]
    patch_of(model, {1: random_delta(model, 5)}).save(tmp_path / "facts.jaxedit")
    base = goldens / "tiny-llama"
    call = ["lora", str(tmp_path / "facts.jaxedit"), str(base), "--out", str(tmp_path / "a"), "--rank", "3"]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0, shown.output
    assert "adapter of rank 3 in float32" in shown.stdout and "model.layers.1.mlp.down_proj" in shown.stdout
    made = json.loads(CliRunner().invoke(app, [*call, "--dtype", "bfloat16", "--base-name", "org/x", "--json"]).stdout)
    assert made["adapter"]["dtype"] == "bfloat16" and made["adapter"]["layers"][0]["rank"] == 3
    assert json.loads((tmp_path / "a" / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"] == "org/x"
    check_lora(tmp_path / "a", model)
    refused = CliRunner().invoke(app, [call[0], call[1], str(goldens / "tiny-gptj"), "--out", str(tmp_path / "b")])
    assert refused.exit_code == 1 and "give the model that was edited" in refused.stderr
