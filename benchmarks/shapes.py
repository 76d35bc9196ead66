"""Published shapes, for random weights and for plans; nothing is imported for them."""

from __future__ import annotations

from typing import Any

_GPT2_XL = {"n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024, "vocab_size": 50257}
_GPT_J = {"n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048, "vocab_size": 50400, "rotary_dim": 64}
_LLAMA_3 = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
}
_QWEN = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "vocab_size": 152064,
}
# Fields of the published config.json files.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-xl": {"model_type": "gpt2", **_GPT2_XL},
    "gpt-j-6b": {"model_type": "gptj", **_GPT_J, "tie_word_embeddings": False},
    "llama-3-8b": {"model_type": "llama", **_LLAMA_3, "tie_word_embeddings": False},
    "qwen2.5-7b": {"model_type": "qwen2", **_QWEN, "tie_word_embeddings": False},
}
