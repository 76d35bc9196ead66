"""GGUF files, read as the Hugging Face checkpoint that they were converted from.

Metadata becomes config.json, tensors get back their names and order of rows, and the tokenizer is rebuilt.
The `gguf` package parses the container and the quantisation formats.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxedit.errors import CheckpointError

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


class _Stored(NamedTuple):
    """A tensor as it lies in the file. `shape` is NumPy's order; `kind` numbers the quantisation format."""

    shape: tuple[int, ...]
    kind: int
    data: np.ndarray
    heads: int = 0  # > 0: rows of each head are interleaved


@dataclasses.dataclass(frozen=True)
class GgufCheckpoint:
    """What a Hugging Face directory would give: config.json's contents, tensor names, tensors on demand."""

    reads_parts: ClassVar[bool] = False
    config: dict
    names: tuple[str, ...]
    metadata: Mapping[str, Any] = dataclasses.field(repr=False)
    _stored: Mapping[str, _Stored] = dataclasses.field(repr=False)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def tensor(self, name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor of that Hugging Face name, or a part, dequantised to float32: linear weights are
        [d_out, d_in]."""
        stored = self._stored[name]
        tensor = _dequantised(name, stored)
        return (_split_halves(tensor, stored.heads) if stored.heads else tensor)[part]


def read_gguf(path: str | Path) -> GgufCheckpoint:
    """Read a GGUF file of one of `ARCHITECTURES`; tensors stay on disk until they are asked for.

    Raises CheckpointError on a file that is not complete GGUF, and, by name, on an architecture, tensor or
    metadata key that is not understood and could change what the model computes.
    """
    metadata, tensors = open_gguf(path)
    where = str(path)
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{where}: architecture {arch!r} is not supported; supported: {known}")
    if metadata.get("general.type", "model") != "model" or metadata.get("split.count", 1) > 1:
        raise CheckpointError(f"{where} is not a whole model, by its general.type or split.count; merge splits first")
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{where}: tensor 'token_embd.weight' is missing")
    config = _config(metadata, tensors, arch, where)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    stored = {}
    for name, tensor in tensors.items():
        if name == _ROPE_FACTORS and arch == "llama":
            continue  # it is in config["rope_scaling"]
        hf_name, part = _hf_name(name, arch, config["num_hidden_layers"], where)
        # Only the converter for Llama interleaves queries and keys, for another pairing of rotary channels.
        n = heads.get(part, 0) if arch == "llama" else 0
        if n and tensor.shape[0] % (2 * n):
            raise CheckpointError(f"{where}: tensor {name!r} of shape {list(tensor.shape)} does not have {n} heads")
        stored[hf_name] = tensor._replace(heads=n)
    return GgufCheckpoint(config, tuple(stored), metadata, stored)


def _hf_name(name: str, arch: str, n_layer: int, where: str) -> tuple[str, str]:
    """The Hugging Face name, and which part of a layer it is ("" outside the layers)."""
    if name in _TOP:
        return _TOP[name], ""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if found and found[2] in _LAYER and int(found[1]) < n_layer:
        is_norm, is_head_norm = found[2].endswith("_norm"), found[2] in ("attn_q_norm", "attn_k_norm")
        if not (is_norm and found[3] == "bias") and (arch == "qwen3" or not is_head_norm):
            return f"model.layers.{int(found[1])}.{_LAYER[found[2]]}.{found[3]}", found[2]
    raise CheckpointError(f"{where}: unknown tensor {name!r} for architecture {arch!r} with {n_layer} layers")


def _dequantised(name: str, stored: _Stored) -> np.ndarray:
    import gguf

    kind = gguf.GGMLQuantizationType(stored.kind)
    try:
        tensor = gguf.dequantize(stored.data.reshape(*stored.shape[:-1], -1), kind)
    except NotImplementedError:
        raise CheckpointError(f"tensor {name!r} has type {kind.name}, which cannot be dequantised") from None
    return np.array(tensor, np.float32).reshape(stored.shape)  # a copy, so that no array holds the file open


def _split_halves(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows (0, half, 1, half + 1, ...) of each head, put back as (0, 1, ..., half, half + 1, ...)."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


# --- config.json


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, _Stored], arch: str, where: str) -> dict:
    left = {k.removeprefix(f"{arch}."): v for k, v in metadata.items() if k.startswith(f"{arch}.")}
    required = object()

    def take(name: str, default: Any = required) -> Any:
        value = left.pop(name, default)
        if value is required:
            raise CheckpointError(f"{where}: metadata key '{arch}.{name}' is missing")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise CheckpointError(f"{where}: '{arch}.{name}' differs from layer to layer; not supported")
            value = value[0]
        # Floats are stored in 32 bits: config.json had the shortest decimal (1e-05, not 9.9999997e-06).
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def expect(name: str, *values: Any) -> None:
        value = take(name, values[0])
        if value not in values:
            raise CheckpointError(f"{where}: '{arch}.{name}' is {value!r}; only {values[0]!r} is supported")

    d_model, n_head = take("embedding_length"), take("attention.head_count")
    head_dim = take("attention.key_length", None)
    width = head_dim or d_model // n_head
    for name in ("attention.value_length", "rope.dimension_count"):
        expect(name, width)
    expect("expert_count", 0)
    expect("expert_used_count", 0)
    expect("attention.causal", True)
    expect("tensor_data_layout", "Meta AI original pth")
    take("vocab_size", None)  # the embedding itself tells
    theta = take("rope.freq_base", 10000.0)
    config = {
        "model_type": arch,
        "hidden_size": d_model,
        "intermediate_size": take("feed_forward_length"),
        "num_hidden_layers": take("block_count"),
        "num_attention_heads": n_head,
        "num_key_value_heads": take("attention.head_count_kv", n_head),
        "rms_norm_eps": take("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "max_position_embeddings": take("context_length"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "silu",
    }
    if head_dim is not None:
        config["head_dim"] = head_dim
    scaling = _linear_scaling(take, where, arch)
    if _ROPE_FACTORS in tensors and arch == "llama":
        if scaling:
            raise CheckpointError(f"{where}: has both rope.scaling and {_ROPE_FACTORS!r}; not supported")
        scaling = _llama3_scaling(_dequantised(_ROPE_FACTORS, tensors[_ROPE_FACTORS]), theta, where)
    if scaling:
        config["rope_scaling"] = scaling
    if arch == "llama" and (window := take("attention.sliding_window", 0)):
        config |= {"model_type": "mistral", "sliding_window": window}
    expect("attention.sliding_window", 0)
    if config["model_type"] in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if config["model_type"] == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if left:
        shown = ", ".join(f"'{arch}.{k}' = {v!r}" for k, v in sorted(left.items()))
        raise CheckpointError(f"{where}: unknown metadata {shown}; it may change what the model computes")
    ids = {f"{hf}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for hf, key in SPECIAL_TOKENS.items()}
    ids.pop("unk_token_id")
    config |= {k: v for k, v in ids.items() if v is not None}
    return config | {"architectures": [_CLASSES[config["model_type"]]]}


def _linear_scaling(take, where: str, arch: str) -> dict | None:
    factor = take("rope.scaling.factor", take("rope.scale_linear", 1.0))
    kind = take("rope.scaling.type", "linear")  # what a factor without a type means
    for name in ("original_context_length", "finetuned"):  # of YaRN; linear scaling and none do not use them
        take(f"rope.scaling.{name}", None)
    if kind not in ("none", "linear"):
        raise CheckpointError(f"{where}: '{arch}.rope.scaling.type' is {kind!r}; supported: 'none', 'linear'")
    if kind == "none" or factor in (0.0, 1.0):
        return None
    return {"rope_type": "linear", "factor": factor}


def _llama3_scaling(factors: np.ndarray, theta: float, where: str) -> dict | None:
    """The settings behind per-frequency divisors. Llama 3.1 to 3.3 differ only in `factor`, their largest."""
    if np.all(factors == 1):
        return None
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * theta ** (np.arange(factors.size) / factors.size)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise CheckpointError(f"{where}: tensor {_ROPE_FACTORS!r} is not the rope scaling of Llama 3; not supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


# --- the container, through the gguf package


def open_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """Metadata and tensors of a GGUF file. The tensors are views of the file."""
    import gguf

    path = Path(path)
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path} is not a GGUF file")
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            t.name: _Stored(tuple(int(n) for n in reversed(t.shape)), int(t.tensor_type), t.data)
            for t in reader.tensors
        }
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise ValueError("big-endian files are not supported")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a complete GGUF file: {error}") from error
    return metadata, tensors
