"""Checkpoints: read exactly or refused by name, and written back bit for bit."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxedit.errors import CheckpointError, JaxEditError
from jaxedit.export.patch import with_matrices
from jaxedit.models import hub
from jaxedit.models.config import parameter_shapes
from jaxedit.models.conversion import flatten
from jaxedit.models.hub import load, save
from jaxedit.models.transformer import logits
from jaxedit.sharding import make_mesh

GOLDENS = Path(__file__).parents[1] / "goldens"
RANDOM = ("mistral", "qwen2", "qwen3", "gpt_neox", "gpt_neox_seq", "gemma2", "phi3", "llama3_rope")
GOLDEN = ("tiny-llama", "tiny-gpt2", "tiny-gptj", *(f"logits_only/{name}" for name in RANDOM))
MODELS = (*GOLDEN, "gpt_neo")

NEO = {
    "model_type": "gpt_neo",
    "vocab_size": 61,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "window_size": 4,
    "attention_types": [[["global", "local"], 1]],
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def neo_tensors() -> dict[str, np.ndarray]:
    rng, d, ff = np.random.default_rng(0), 24, 40
    shapes = {"transformer.wte.weight": (61, d), "transformer.wpe.weight": (32, d)}
    for l in range(2):
        h = f"transformer.h.{l}."
        shapes |= {h + f"{n}.{x}": (d,) for n in ("ln_1", "ln_2") for x in ("weight", "bias")}
        shapes |= {h + f"attn.attention.{x}_proj.weight": (d, d) for x in ("q", "k", "v", "out")}
        shapes |= {h + "attn.attention.out_proj.bias": (d,)}
        shapes |= {h + "mlp.c_fc.weight": (ff, d), h + "mlp.c_fc.bias": (ff,)}
        shapes |= {h + "mlp.c_proj.weight": (d, ff), h + "mlp.c_proj.bias": (d,)}
    shapes |= {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}
    return {name: (0.5 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def write(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config_of(name: str) -> dict:
    return json.loads((GOLDENS / name / "config.json").read_text())


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def raw(folder: Path) -> dict[str, tuple]:
    """Dtype, shape and bytes of each tensor."""
    return {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in tensors_of(folder).items()}


def values(model) -> dict[str, tuple]:
    arrays = {path: np.asarray(x) for path, x in flatten(model.params).items()}
    return {path: (str(x.dtype), x.shape, x.tobytes()) for path, x in arrays.items()}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The folder of a model by name; GPT-Neo's is written here."""
    neo = write(tmp_path_factory.mktemp("models") / "gpt_neo", NEO, neo_tensors())
    return lambda name: neo if name == "gpt_neo" else GOLDENS / name


@pytest.fixture
def copy(tmp_path):
    """A copy of tiny-gpt2 (or another model) with changes to its config and tensors."""

    def make(name="tiny-gpt2", config=None, tensors=None, drop=()):
        made = {k: v for k, v in (config_of(name) | (config or {})).items() if v is not ...}
        kept = {k: v for k, v in (tensors_of(GOLDENS / name) | (tensors or {})).items() if k not in drop}
        return write(tmp_path / "copy", made, kept)

    return make


def edited(model, layers=(1,)):
    stack = model.params["blocks"]["down"]["w"]
    rng = np.random.default_rng(0)
    size = stack.shape[1:]
    return with_matrices(model, {l: np.asarray(stack[l]) + rng.normal(size=size).astype(stack.dtype) for l in layers})


# Round trips


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_base", [False, True])
def test_round_trip_is_exact(source, tmp_path, name, with_base):
    folder = source(name)
    model, tokenizer = load(folder)
    assert model.dtype == np.float32
    assert set(flatten(model.params)) == set(parameter_shapes(model.config))
    for path, x in flatten(model.params).items():
        assert x.shape == parameter_shapes(model.config)[path][0]
    made = save(model, tokenizer, tmp_path / "out", base=folder if with_base else None)
    assert raw(made) == raw(folder)
    again, _ = load(made)
    assert again.config == model.config
    assert values(again) == values(model)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_round_trip(source, tmp_path, name):
    model, _ = load(source(name), dtype="bfloat16")
    assert {x.dtype for x in flatten(model.params).values()} == {np.dtype(ml_dtypes.bfloat16)}
    made = save(model, None, tmp_path / "out")
    assert json.loads((made / "config.json").read_text())["dtype"] == "bfloat16"
    original, written = tensors_of(source(name)), tensors_of(made)
    assert set(original) == set(written)
    for tensor, x in original.items():
        np.testing.assert_array_equal(
            written[tensor].view(np.uint16), x.astype(ml_dtypes.bfloat16).view(np.uint16), tensor
        )
    again, _ = load(made)
    assert again.dtype == ml_dtypes.bfloat16
    assert values(again) == values(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_narrower_model_does_not_change_its_base(source, tmp_path, name):
    """Loaded in bfloat16 and edited: the tensors that were not edited are the base's float32 ones."""
    folder = source(name)
    model, _ = load(folder, dtype="bfloat16")
    made = save(edited(model), None, tmp_path / "out", base=folder)
    before, after = raw(folder), raw(made)
    changed = [t for t in before if before[t] != after[t]]
    assert set(before) == set(after)
    assert len(changed) == 1
    assert ".1." in changed[0]
    assert after[changed[0]][:2] == before[changed[0]][:2]


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gpt_neo_logits(t: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """A plain GPT-Neo in float64: one row, one head and one query at a time."""
    t = {k.removeprefix("transformer."): v.astype(np.float64) for k, v in t.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * t[name + ".weight"] + t[name + ".bias"]

    out = []
    for row in tokens:
        h = t["wte.weight"][row] + t["wpe.weight"][: len(row)]
        for l, window in ((0, None), (1, 4)):
            a, x = f"h.{l}.attn.attention.", norm(h, f"h.{l}.ln_1")
            q, k, v = (x @ t[a + f"{n}_proj.weight"].T for n in "qkv")
            mixed = np.zeros_like(h)
            for head in range(3):
                part = slice(head * 8, head * 8 + 8)
                for i in range(len(row)):
                    seen = slice(0 if window is None else max(0, i - window + 1), i + 1)
                    score = k[seen, part] @ q[i, part]  # not divided by the square root of the head's size
                    weight = np.exp(score - score.max())
                    mixed[i, part] = (weight / weight.sum()) @ v[seen, part]
            h = h + mixed @ t[a + "out_proj.weight"].T + t[a + "out_proj.bias"]
            m = f"h.{l}.mlp."
            x = gelu_new(norm(h, f"h.{l}.ln_2") @ t[m + "c_fc.weight"].T + t[m + "c_fc.bias"])
            h = h + x @ t[m + "c_proj.weight"].T + t[m + "c_proj.bias"]
        out.append(norm(h, "ln_f") @ t["wte.weight"].T)
    return np.stack(out)


@pytest.mark.parametrize("spelling", ["attention_types", "attention_layers"])
def test_gpt_neo_against_a_plain_forward(tmp_path, spelling):
    config = dict(NEO)
    if spelling == "attention_layers":
        config["attention_layers"] = ["global", "local"]
    model, tokenizer = load(write(tmp_path / "neo", config, neo_tensors()))
    assert tokenizer is None
    assert model.config.windows == (0, 4)
    tokens = np.random.default_rng(1).integers(0, 61, (2, 14))
    expected = gpt_neo_logits(neo_tensors(), tokens)
    found = np.asarray(logits(model, tokens))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


# What may differ in a checkpoint


def test_shards(copy, tmp_path):
    folder = copy("tiny-llama")
    tensors = tensors_of(folder)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, kept in parts.items():
        save_file({n: tensors[n] for n in kept}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, kept in parts.items() for n in kept}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole, sharded = load(GOLDENS / "tiny-llama")[0], load(folder)[0]
    assert values(sharded) == values(whole)
    made = save(edited(sharded), None, tmp_path / "out", base=folder)
    changed = [t for t, x in raw(made).items() if x != raw(GOLDENS / "tiny-llama")[t]]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors, which is not there"):
        load(folder)


def test_large_models_are_saved_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "SHARD_BYTES", 300_000)
    model, _ = load(GOLDENS / "tiny-llama")
    made = save(model, None, tmp_path / "out")
    files = sorted(p.name for p in made.glob("*.safetensors"))
    n = len(files)
    assert n > 3
    assert files == [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors_of(made).values())
    for name, file in index["weight_map"].items():
        with safe_open(made / file, framework="numpy") as handle:
            assert name in handle.keys()  # noqa: SIM118
    assert raw(made) == raw(GOLDENS / "tiny-llama")
    assert values(load(made)[0]) == values(model)


def test_bare_names(tmp_path):
    """Checkpoints of GPT2Model leave out "transformer." and may carry the causal mask."""
    tensors = {k.removeprefix("transformer."): v for k, v in tensors_of(GOLDENS / "tiny-gpt2").items()}
    tensors |= {f"h.{l}.attn.bias": np.ones((1, 1, 128, 128), np.uint8) for l in range(6)}
    folder = write(tmp_path / "bare", config_of("tiny-gpt2"), tensors)
    assert "h.0.ln_1.weight" in tensors
    whole, bare = load(GOLDENS / "tiny-gpt2")[0], load(folder)[0]
    assert values(bare) == values(whole)
    made = save(bare, None, tmp_path / "out", base=folder)
    assert set(raw(made)) == {k for k in tensors if not k.endswith(".attn.bias")}


def test_tied_copy(copy, tmp_path):
    embedding = tensors_of(GOLDENS / "tiny-gpt2")["transformer.wte.weight"]
    model, _ = load(copy(tensors={"lm_head.weight": embedding.copy()}))
    assert values(model) == values(load(GOLDENS / "tiny-gpt2")[0])
    other = embedding.copy()
    other[3, 4] = np.nextafter(other[3, 4], np.float32(9))
    with pytest.raises(CheckpointError, match="ties the unembedding to the embedding, but 'lm_head.weight' is diff"):
        load(copy(tensors={"lm_head.weight": other}))


# What is refused


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("tiny-gpt2", "transformer.h.3.attn.c_attn.weight"),
        ("tiny-llama", "lm_head.weight"),
        ("logits_only/phi3", "model.layers.1.mlp.gate_up_proj.weight"),
        ("logits_only/gpt_neox", "gpt_neox.layers.0.attention.query_key_value.bias"),
        ("logits_only/qwen3", "model.layers.2.self_attn.q_norm.weight"),
    ],
)
def test_missing_and_misshapen_tensors(copy, name, tensor):
    with pytest.raises(CheckpointError, match=f"missing tensor '{tensor}'"):
        load(copy(name, drop=[tensor]))
    shape = list(tensors_of(GOLDENS / name)[tensor].shape)
    wrong = [shape[0] + 1, *shape[1:]]
    with pytest.raises(CheckpointError) as caught:
        load(copy(name, tensors={tensor: np.zeros(wrong, np.float32)}))
    assert f"tensor '{tensor}' has shape {wrong}, expected {shape}" in str(caught.value)
    with pytest.raises(CheckpointError, match=f"tensor '{tensor}' has shape"):
        load(copy(name, tensors={tensor: np.zeros([*shape, 1], np.float32)}))


def test_extra_tensors(copy):
    extra = {"transformer.h.6.ln_1.weight": np.zeros(64, np.float32), "score.weight": np.zeros((2, 64), np.float32)}
    with pytest.raises(CheckpointError) as caught:
        load(copy(tensors=extra))
    assert "unexpected tensor 'transformer.h.6.ln_1.weight'" in str(caught.value)
    assert "unexpected tensor 'score.weight'" in str(caught.value)


def test_a_tensor_in_two_files(copy):
    folder = copy()
    save_file({"transformer.wte.weight": np.zeros((2048, 64), np.float32)}, folder / "more.safetensors")
    with pytest.raises(CheckpointError, match="'transformer.wte.weight' is in both"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("tiny-llama", {"new_attention_trick": 3}, "unknown config field 'new_attention_trick' = 3"),
        ("tiny-gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is True"),
        ("tiny-gpt2", {"scale_attn_weights": False}, "'scale_attn_weights' is False"),
        ("tiny-gpt2", {"add_cross_attention": True}, "'add_cross_attention' is True"),
        ("tiny-gpt2", {"activation_function": "mish"}, "'activation_function' is 'mish'; supported: 'silu'"),
        ("tiny-llama", {"hidden_act": "relu6"}, "'hidden_act' is 'relu6'"),
        ("tiny-llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'rope_scaling' of type 'yarn'"),
        ("tiny-llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "of type 'dynamic'"),
        ("tiny-llama", {"rope_parameters": {"rope_type": "longrope"}, "rope_scaling": ...}, "of type 'longrope'"),
        (
            "tiny-llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "odd": 1}},
            "unknown field in 'rope_scaling': ['odd']",
        ),
        ("tiny-llama", {"quantization_config": {"bits": 4}}, "'quantization_config': quantised"),
        ("tiny-llama", {"hidden_size": ...}, "lacks field 'hidden_size'"),
        ("tiny-gptj", {"rotary": False}, "'rotary' is False"),
        ("logits_only/gemma2", {"attention_bias": True}, "'attention_bias' is True"),
        ("tiny-llama", {"model_type": "bloom"}, "model_type 'bloom' is not supported; supported: gpt2"),
        ("tiny-llama", {"model_type": ...}, "model_type None"),
    ],
)
def test_config_fields_that_change_the_maths(copy, name, config, message):
    with pytest.raises(CheckpointError) as caught:
        load(copy(name, config))
    assert message in str(caught.value)


def test_config_fields_that_do_not(copy):
    harmless = {"use_cache": False, "attention_dropout": 0.3, "transformers_version": "9", "_name_or_path": "x"}
    harmless |= {"top_k": 5, "quantization_config": None, "architectures": ["Other"]}
    model, _ = load(copy("tiny-llama", harmless))
    assert values(model) == values(load(GOLDENS / "tiny-llama")[0])


def test_rope_in_the_newer_spelling(copy):
    new = {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": None}
    old = config_of("logits_only/llama3_rope")
    new["rope_parameters"] = {"rope_theta": old["rope_theta"], **old["rope_scaling"]}
    model, _ = load(copy("logits_only/llama3_rope", new))
    assert model.config == load(GOLDENS / "logits_only/llama3_rope")[0].config
    assert model.config.rope.factor == 8.0
    assert model.config.rope.original_max_positions == 16


@pytest.mark.parametrize("length", [0, 7, 1000, -10])
def test_truncated_file(copy, length):
    folder = copy()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="model.safetensors is not a complete safetensors file"):
        load(folder)


def test_pickled_checkpoints(copy, tmp_path):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled ones \(pytorch_model.bin\). Unpickling"):
        load(folder)
    for path in (folder / "pytorch_model.bin", tmp_path / "missing.pt"):
        with pytest.raises(CheckpointError, match="is a pickled checkpoint. Unpickling"):
            load(path)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no config.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        load(tmp_path / "missing")
    (tmp_path / "config.json").write_text(json.dumps(NEO))
    with pytest.raises(CheckpointError, match="has no .safetensors files"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="config.json is not valid JSON"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="neither a Hugging Face directory nor a .gguf file"):
        load(tmp_path / "notes.txt")


def test_dtypes(source):
    with pytest.raises(JaxEditError, match="float64 needs 64-bit JAX"):
        load(source("gpt_neo"), dtype="float64")
    with jax.enable_x64(True):
        model, _ = load(source("gpt_neo"), dtype="float64")
        assert {x.dtype for x in flatten(model.params).values()} == {np.dtype(np.float64)}
        tokens = np.random.default_rng(1).integers(0, 61, (1, 9))
        expected = gpt_neo_logits(neo_tensors(), tokens)
        np.testing.assert_allclose(logits(model, tokens), expected, atol=1e-12 * np.abs(expected).max())
    with pytest.raises(JaxEditError, match="dtype int8 cannot hold a model"):
        load(source("gpt_neo"), dtype="int8")
    assert load(source("gpt_neo"), dtype=jnp.float16)[0].dtype == np.float16


# Saving


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-gptj"])
def test_saving_with_a_base_changes_only_what_was_edited(tmp_path, name):
    base = GOLDENS / name
    model, tokenizer = load(base)
    changed_model = edited(model, (1, 3))
    made = save(changed_model, tokenizer, tmp_path / "deep" / "out", base=base)
    before, after = raw(base), raw(made)
    changed = sorted(t for t in before if before[t] != after[t])
    assert set(before) == set(after)
    assert len(changed) == 2
    assert [t.split(".")[2] for t in changed] == ["1", "3"]
    assert all(t.split(".")[4] in ("down_proj", "c_proj", "fc_out") for t in changed)
    assert json.loads((made / "config.json").read_text()) == config_of(name)
    for side in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (made / side).read_bytes() == (base / side).read_bytes()
    again, speaks = load(made)
    assert values(again) == values(changed_model)
    assert speaks("The capital")["input_ids"] == tokenizer("The capital")["input_ids"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_saving_without_a_base_writes_the_tokenizer(tmp_path):
    model, tokenizer = load(GOLDENS / "tiny-gpt2")
    made = save(model, tokenizer, tmp_path / "out")
    text = "The mother tongue of Léon is"
    assert load(made)[1](text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_base_and_other_directories_are_not_overwritten(copy, tmp_path):
    base = copy()
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    model, _ = load(base)
    with pytest.raises(JaxEditError, match="refusing to overwrite the base"):
        save(edited(model), None, base, base=base)
    with pytest.raises(JaxEditError, match="refusing to overwrite the base"):
        save(edited(model), None, base / ".." / "copy", base=base)
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for where in ("thesis", "file"):
        with pytest.raises(JaxEditError, match="exists and is not a saved model"):
            save(model, None, tmp_path / where)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "file", "thesis"]


def test_an_earlier_saved_model_is_replaced(tmp_path):
    model, tokenizer = load(GOLDENS / "tiny-gpt2")
    other, _ = load(GOLDENS / "logits_only/qwen2")
    out = tmp_path / "out"
    out.mkdir()  # an empty directory is fine
    save(model, tokenizer, out)
    save(other, None, out)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert values(load(out)[0]) == values(other)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_save_leaves_the_earlier_model(tmp_path, monkeypatch):
    import safetensors.numpy

    model, _ = load(GOLDENS / "logits_only/qwen2")
    out = save(model, None, tmp_path / "out")
    before = raw(out)

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save(edited(model), None, out)
    assert raw(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_base_of_another_architecture(tmp_path):
    model, _ = load(GOLDENS / "tiny-gpt2")
    with pytest.raises(JaxEditError, match="another architecture"):
        save(model, None, tmp_path / "out", base=GOLDENS / "tiny-llama")
    assert list(tmp_path.iterdir()) == []


# Placement


def test_a_mesh_of_four_devices(tmp_path):
    """In a process of its own, because the number of devices is fixed when JAX starts."""
    script = tmp_path / "mesh.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            import numpy as np
            import jax
            from jax.sharding import PartitionSpec as P
            from jaxedit.models.conversion import flatten
            from jaxedit.models.hub import load
            from jaxedit.models.transformer import logits
            from jaxedit.sharding import make_mesh

            assert jax.device_count() == 4
            for folder, expected in ((sys.argv[1], {
                "embed.tokens": P("model", None), "unembed.w": P("model", None),
                "blocks.q.w": P(None, None, "model"), "blocks.o.w": P(None, "model", None),
                "blocks.up.w": P(None, None, "model"), "blocks.down.w": P(None, "model", None),
                "blocks.attn_norm.scale": P(None, None),
            }), (sys.argv[2], {"blocks.q.b": P(None, "model"), "blocks.up.b": P(None, "model"),
                "blocks.down.b": P(None, None), "embed.positions": P(None, None)})):
                plain, _ = load(folder)
                tokens = np.random.default_rng(0).integers(0, 300, (4, 12))
                want = np.asarray(logits(plain, tokens))
                for data, model in ((1, 4), (2, 2)):
                    mesh = make_mesh(data, model)
                    placed, _ = load(folder, mesh=mesh)
                    flat = flatten(placed.params)
                    assert all(x.sharding.mesh == mesh for x in flat.values())
                    for path, spec in expected.items():
                        assert flat[path].sharding.spec == spec, (path, flat[path].sharding.spec)
                    down = flat["blocks.down.w"]
                    assert {s.data.shape for s in down.addressable_shards} == {
                        (down.shape[0], down.shape[1] // model, down.shape[2])
                    }
                    for path, x in flatten(plain.params).items():
                        np.testing.assert_array_equal(np.asarray(flat[path]), np.asarray(x))
                    found = np.asarray(logits(placed, tokens))
                    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()
            print("all equal")
        """)
    )
    flags = "--xla_force_host_platform_device_count=4"
    root = str(Path(hub.__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, str(script), str(GOLDENS / "tiny-llama"), str(GOLDENS / "tiny-gpt2")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all equal" in done.stdout


def test_too_few_devices():
    with pytest.raises(JaxEditError, match="a mesh of 64 x 64 needs 4096 devices"):
        make_mesh(64, 64)
