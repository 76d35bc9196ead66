"""Llama 1 to 3.x, and what has its architecture: SmolLM, TinyLlama, Vicuna, DeepSeek-LLM, Yi."""

from jaxedit.models.config import ModelConfig
from jaxedit.models.conversion import Family, Rule
from jaxedit.models.fields import ACTIVATIONS, Fields


def read(f: Fields, **overrides) -> ModelConfig:
    """The fields that Llama shares with Mistral and Qwen."""
    d_model, n_head = f.take("hidden_size"), f.take("num_attention_heads")
    max_positions = f.take("max_position_embeddings")
    head_dim = f.take("head_dim", default=None) or d_model // n_head
    n_layer = f.take("num_hidden_layers")
    known = dict(
        vocab=f.take("vocab_size"),
        d_model=d_model,
        d_ff=f.take("intermediate_size"),
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=f.take("num_key_value_heads", default=None) or n_head,
        head_dim=head_dim,
        max_positions=max_positions,
        norm="rms",
        norm_eps=f.take("rms_norm_eps", default=1e-6),
        act=f.choose("hidden_act", of=ACTIVATIONS, default="silu"),
        gated=True,
        rope=f.rope(head_dim, max_positions),
        attn_scale=head_dim**-0.5,
        windows=(0,) * n_layer,
        tied=f.take("tie_word_embeddings", default=False),
    )
    return ModelConfig(**(known | overrides))


def config_from_hf(config: dict, where: str) -> ModelConfig:
    f = Fields(config, where)
    bias = bool(f.take("attention_bias", default=False))
    made = read(f, family="llama", q_bias=bias, o_bias=bias, mlp_bias=bool(f.take("mlp_bias", default=False)))
    f.finish("rope_interleaved", "is_llama_config")
    return made


_L = "model.layers.{}."
RULES = (
    Rule("model.embed_tokens.weight", "embed.tokens", "v d -> v d"),
    Rule(_L + "input_layernorm.weight", "blocks.attn_norm.scale", "d -> d"),
    Rule(_L + "post_attention_layernorm.weight", "blocks.mlp_norm.scale", "d -> d"),
    *(Rule(_L + f"self_attn.{x}_proj.weight", f"blocks.{x}.w", "o i -> i o") for x in "qkvo"),
    *(Rule(_L + f"self_attn.{x}_proj.bias", f"blocks.{x}.b", "o -> o") for x in "qkvo"),
    *(Rule(_L + f"mlp.{x}_proj.weight", f"blocks.{x}.w", "o i -> i o") for x in ("gate", "up", "down")),
    *(Rule(_L + f"mlp.{x}_proj.bias", f"blocks.{x}.b", "o -> o") for x in ("gate", "up", "down")),
    Rule("model.norm.weight", "final_norm.scale", "d -> d"),
    Rule("lm_head.weight", "unembed.w", "v d -> v d"),
)
BUFFERS = (r".*rotary_emb\.inv_freq",)
FAMILY = Family(config_from_hf, RULES, BUFFERS)
