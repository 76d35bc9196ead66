"""Reading GGUF: against files written here, with the converter's own permutation of queries and keys."""

import gguf
import numpy as np
import pytest

from jaxedit.errors import CheckpointError
from jaxedit.models import gguf_tokenizer as tokenizers_of_gguf
from jaxedit.models.families import FAMILIES
from jaxedit.models.gguf import open_gguf, read_gguf


def gguf_tokenizer(path):
    return tokenizers_of_gguf.gguf_tokenizer(open_gguf(path)[0], path)


D, FF, LAYERS, HEADS, KV, HEAD = 32, 64, 2, 4, 2, 8
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(moved)) for b in range(256)]


MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "2 0", "20 0", "200 9", "' s"]
TOKENS = [*CONTROL, *byte_alphabet(), *(m.replace(" ", "") for m in MERGES), "<think>", "<unused>"]
TYPES = [3] * len(CONTROL) + [1] * (256 + len(MERGES)) + [4, 5]


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does: row r of a head's first half goes to 2r, of its second half to 2r + 1."""
    out, half = np.empty_like(weight), HEAD // 2
    for h in range(heads):
        for r in range(half):
            out[h * HEAD + 2 * r] = weight[h * HEAD + r]
            out[h * HEAD + 2 * r + 1] = weight[h * HEAD + half + r]
    return out


def hf_weights(biases: bool = False, head_norms: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    w = {"model.embed_tokens.weight": (len(TOKENS), D), "model.norm.weight": (D,)}
    for l in range(LAYERS):
        p = f"model.layers.{l}."
        w |= {p + "input_layernorm.weight": (D,), p + "post_attention_layernorm.weight": (D,)}
        for x, rows in (("q", HEADS * HEAD), ("k", KV * HEAD), ("v", KV * HEAD)):
            w[p + f"self_attn.{x}_proj.weight"] = (rows, D)
            if biases:
                w[p + f"self_attn.{x}_proj.bias"] = (rows,)
            if head_norms and x != "v":
                w[p + f"self_attn.{x}_norm.weight"] = (HEAD,)
        w |= {p + "self_attn.o_proj.weight": (D, HEADS * HEAD), p + "mlp.gate_proj.weight": (FF, D)}
        w |= {p + "mlp.up_proj.weight": (FF, D), p + "mlp.down_proj.weight": (D, FF)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in w.items()}


PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "lm_head": "output",
}


def stored(weights: dict[str, np.ndarray], arch: str) -> dict[str, np.ndarray]:
    out = {}
    for name, weight in weights.items():
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = permuted(weight, HEADS if "q_proj" in name else KV)
        for hf, ggml in PARTS.items():
            name = name.replace(hf, ggml)
        out[name] = weight
    return out


def write(path, tensors, arch="llama", kind=None, keys=None, **tokenizer):
    """A GGUF file; `keys` adds metadata, in which None leaves a default out."""
    w = gguf.GGUFWriter(path, arch)
    metadata = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": D,
        "feed_forward_length": FF,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5e5,
        "rope.dimension_count": HEAD,
    } | (keys or {})
    for key, value in metadata.items():
        key = key if key.startswith("general.") else f"{arch}.{key}"
        if isinstance(value, bool):
            w.add_bool(key, value)
        elif isinstance(value, int):
            w.add_uint32(key, value)
        elif isinstance(value, float):
            w.add_float32(key, value)
        elif isinstance(value, list):
            w.add_array(key, value)
        elif value is not None:
            w.add_string(key, value)
    about = {"model": "gpt2", "pre": "smollm", "tokens": TOKENS, "types": TYPES, "merges": MERGES} | tokenizer
    w.add_tokenizer_model(about["model"])
    if about["pre"]:
        w.add_tokenizer_pre(about["pre"])
    w.add_token_list(about["tokens"])
    w.add_token_types(about["types"])
    w.add_token_merges(about["merges"])
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if name in about:
            getattr(w, f"add_{name}")(about[name])
    w.add_bos_token_id(about.get("bos", 1))
    w.add_eos_token_id(2)
    w.add_pad_token_id(2)
    w.add_unk_token_id(0)
    w.add_chat_template("{{ messages }}")
    for name, tensor in tensors.items():
        if kind is not None and tensor.ndim == 2:
            w.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            w.add_tensor(name, tensor)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture
def make(tmp_path):
    def made(arch="llama", extra=None, without=(), biases=False, head_norms=False, **options):
        tensors = stored(hf_weights(biases, head_norms), arch) | (extra or {})
        tensors = {n: t for n, t in tensors.items() if n not in without}
        return write(tmp_path / "model.gguf", tensors, arch, **options)

    return made


@pytest.mark.parametrize(
    "arch, biases, head_norms",
    [("llama", False, False), ("llama", True, False), ("qwen2", True, False), ("qwen3", False, True)],
)
def test_tensors_come_back_as_they_were(make, arch, biases, head_norms):
    read = read_gguf(make(arch, biases=biases, head_norms=head_norms))
    expected = hf_weights(biases, head_norms)
    assert set(read.names) == set(expected)
    for name, weight in expected.items():
        tensor = read.tensor(name)
        assert tensor.dtype == np.float32 and tensor.flags.writeable
        np.testing.assert_array_equal(tensor, weight, err_msg=name)


def test_config(make):
    config = read_gguf(make()).config
    assert config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": D,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "max_position_embeddings": 128,
        "vocab_size": len(TOKENS),
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


@pytest.mark.parametrize(
    "arch, options, family",
    [
        ("llama", {}, "llama"),
        ("llama", {"keys": {"attention.sliding_window": 16}}, "mistral"),
        ("qwen2", {"biases": True}, "qwen2"),
        ("qwen3", {"head_norms": True, "keys": {"attention.key_length": HEAD}}, "qwen3"),
    ],
)
def test_config_is_understood_by_the_family(make, arch, options, family):
    config = read_gguf(make(arch, **options)).config
    made = FAMILIES[family].config_from_hf(config, "here")
    assert made.family == config["model_type"] == family
    assert made.head_dim == HEAD and made.tied
    assert made.windows == ((16, 16) if family == "mistral" else (0, 0))


def test_untied(make):
    unembedding = np.ones((len(TOKENS), D), np.float32)
    read = read_gguf(make(extra={"output.weight": unembedding}))
    assert not read.config["tie_word_embeddings"]
    np.testing.assert_array_equal(read.tensor("lm_head.weight"), unembedding)


@pytest.mark.parametrize(
    "kind, bound",
    [("Q8_0", 0.02), ("Q4_1", 0.25), ("F16", 2e-3), ("BF16", 2e-2)],
)
def test_quantised_types(make, kind, bound):
    read = read_gguf(make(kind=gguf.GGMLQuantizationType[kind]))
    for name, weight in hf_weights().items():
        tensor = read.tensor(name)
        assert tensor.dtype == np.float32 and tensor.shape == weight.shape
        assert np.abs(tensor - weight).max() < bound
    assert np.abs(read.tensor("model.layers.0.self_attn.q_proj.weight")).max() > 1


def test_linear_rope_scaling(make):
    config = read_gguf(make(keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    config = read_gguf(make(keys={"rope.scaling.type": "none"})).config
    assert "rope_scaling" not in config


def llama3_factors(factor=32.0) -> np.ndarray:
    out = []
    for frequency in 5e5 ** -(np.arange(0, HEAD, 2) / HEAD):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / 3
        between = 1 / ((1 - smooth) / factor + smooth)
        out.append(1.0 if wavelength < 2048 else factor if wavelength > 8192 else between)
    return np.array(out, np.float32)


def test_llama3_rope_scaling(make):
    read = read_gguf(make(extra={"rope_freqs.weight": llama3_factors()}))
    assert not any("rope" in name for name in read.names)
    assert read.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert FAMILIES["llama"].config_from_hf(read.config, "here").rope.scaling == "llama3"
    assert "rope_scaling" not in read_gguf(make(extra={"rope_freqs.weight": np.ones(4, np.float32)})).config


@pytest.mark.parametrize(
    "options, named",
    [
        ({"arch": "gpt2"}, "architecture 'gpt2' is not supported; supported: llama, qwen2, qwen3"),
        ({"extra": {"blk.0.ffn_gate_inp.weight": np.ones((2, D), np.float32)}}, "blk.0.ffn_gate_inp.weight"),
        ({"extra": {"blk.2.attn_norm.weight": np.ones(D, np.float32)}}, "blk.2.attn_norm.weight"),
        ({"extra": {"blk.0.attn_norm.bias": np.ones(D, np.float32)}}, "blk.0.attn_norm.bias"),
        ({"head_norms": True}, "blk.0.attn_q_norm.weight"),
        ({"extra": {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}}, "rope_freqs.weight"),
        ({"arch": "qwen2", "extra": {"rope_freqs.weight": llama3_factors()}}, "rope_freqs.weight"),
        ({"keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}}, "rope.scaling.type' is 'yarn'"),
        ({"keys": {"rope.scaling.attn_factor": 2.0}}, "llama.rope.scaling.attn_factor"),
        ({"keys": {"expert_count": 8}}, "llama.expert_count"),
        ({"keys": {"rope.dimension_count": HEAD // 2}}, "llama.rope.dimension_count"),
        ({"keys": {"attention.value_length": 16}}, "llama.attention.value_length"),
        ({"keys": {"attention.head_count_kv": [1, 2]}}, "llama.attention.head_count_kv"),
        ({"keys": {"logit_scale": 0.5}}, "llama.logit_scale"),
        ({"keys": {"block_count": None}}, "llama.block_count"),
        ({"arch": "qwen2", "keys": {"attention.sliding_window": 8}}, "qwen2.attention.sliding_window"),
        ({"keys": {"general.type": "adapter"}}, "general.type"),
        ({"without": ("token_embd.weight",)}, "token_embd.weight"),
    ],
)
def test_refused_by_name(make, options, named):
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
        read_gguf(make(**options))


def test_not_gguf(tmp_path, make):
    other = tmp_path / "other.gguf"
    for content in (b"", b"GG", b"not a model at all", b"GGUF", b"GGUF\x00\x00\x00\x03" + bytes(40)):
        other.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"other\.gguf"):
            read_gguf(other)
    with pytest.raises(CheckpointError, match=r"missing\.gguf"):
        read_gguf(tmp_path / "missing.gguf")
    whole = make().read_bytes()
    for end in [*range(0, 3000, 97), *range(3000, len(whole), len(whole) // 50), len(whole) - 33]:
        other.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"other\.gguf"):
            read_gguf(other)


TEXTS = [
    "hello world",
    "In 2009, it's 1,234½",
    "naïve 日本語 🙂",
    "  two  spaces\n\n\ttab ",
    "<|im_start|>user\nhello<|im_end|>",
]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(make, pre, text):
    tokenizer = gguf_tokenizer(make(pre=pre, add_bos_token=False))
    encoded = tokenizer(text)
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert tokenizer.decode(encoded["input_ids"]) == text


@pytest.mark.parametrize(
    "pre, cut",
    [
        ("smollm", ["In", "Ġ", "2", "0", "0", "9", "'s", "Ġx"]),
        ("gpt-2", ["In", "Ġ2009", "'s", "Ġx"]),
        ("qwen2", ["In", "Ġ", "2", "0", "0", "9", "'s", "Ġx"]),
        ("llama-bpe", ["In", "Ġ", "200", "9", "'s", "Ġx"]),
    ],
)
def test_pre_tokenizers(make, pre, cut):
    tokenizer = gguf_tokenizer(make(pre=pre))
    assert [t for t, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("In 2009's x")] == cut


def test_digits_split_in_four(make):
    tokens = gguf_tokenizer(make()).tokenize("2009")
    assert tokens == ["2", "0", "0", "9"]
    assert gguf_tokenizer(make(pre="gpt-2")).tokenize("2009") == ["2009"]


def test_special_and_added_tokens(make):
    tokenizer = gguf_tokenizer(make())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token == "<|endoftext|>" and tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.model_max_length == 128 and len(tokenizer) == len(TOKENS)
    ids = tokenizer("<|im_start|>hello<think>")["input_ids"]
    assert ids == [1, TOKENS.index("hello"), TOKENS.index("<think>")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<think>"
    assert tokenizer.decode(tokenizer("he 's , .")["input_ids"]) == "he 's , ."  # no clean-up of spaces


@pytest.mark.parametrize(
    "options, ends",
    [
        ({}, (False, False)),
        ({"add_bos_token": True}, (True, False)),
        ({"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ({"pre": "llama-bpe"}, (True, False)),
        ({"pre": "llama-bpe", "add_bos_token": False}, (False, False)),
    ],
)
def test_bos_and_eos(make, tmp_path, options, ends):
    from transformers import AutoTokenizer

    tokenizer = gguf_tokenizer(make(**options))
    hello = TOKENS.index("hello")
    expected = [1] * ends[0] + [hello] + [2] * ends[1]
    assert tokenizer("hello")["input_ids"] == expected
    assert tokenizer("hello", add_special_tokens=False)["input_ids"] == [hello]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ["hello", *TEXTS]:
        assert dict(again(text)) == dict(tokenizer(text))


@pytest.mark.parametrize(
    "options, named",
    [
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'"),
        ({"pre": None}, "tokenizer.ggml.pre is None"),
        ({"model": "llama"}, "tokenizer.ggml.model 'llama'"),
        ({"add_space_prefix": True}, "add_space_prefix"),
        ({"merges": ["he llo"]}, "merges"),
        ({"merges": ["hello"]}, "merges"),
        ({"bos": 10**6}, "token ids"),
        ({"tokens": ["a"] * len(TOKENS)}, "repeats a token"),
    ],
)
def test_tokenizer_refused_by_name(make, options, named):
    with pytest.raises(CheckpointError, match=named):
        gguf_tokenizer(make(**options))
