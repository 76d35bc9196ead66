"""GPT-NeoX and Pythia: parallel residual, partial rotary, queries, keys and values interleaved by head."""

from jaxedit.models.config import ModelConfig
from jaxedit.models.conversion import Family, Rule
from jaxedit.models.fields import ACTIVATIONS, Fields


def config_from_hf(config: dict, where: str) -> ModelConfig:
    f = Fields(config, where)
    d_model, n_head = f.take("hidden_size"), f.take("num_attention_heads")
    n_layer, max_positions = f.take("num_hidden_layers"), f.take("max_position_embeddings")
    bias = bool(f.take("attention_bias", default=True))
    made = ModelConfig(
        family="gpt_neox",
        vocab=f.take("vocab_size"),
        d_model=d_model,
        d_ff=f.take("intermediate_size"),
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_head,
        head_dim=d_model // n_head,
        max_positions=max_positions,
        norm="layer",
        norm_eps=f.take("layer_norm_eps", default=1e-5),
        act=f.choose("hidden_act", of=ACTIVATIONS, default="gelu"),
        gated=False,
        parallel="separate" if f.take("use_parallel_residual", default=True) else "none",
        rope=f.rope(d_model // n_head, max_positions, partial=0.25),
        attn_scale=(d_model // n_head) ** -0.5,
        windows=(0,) * n_layer,
        q_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        tied=f.take("tie_word_embeddings", default=False),
    )
    f.finish()
    return made


_L = "gpt_neox.layers.{}."
_QKV = _L + "attention.query_key_value."
RULES = (
    Rule("gpt_neox.embed_in.weight", "embed.tokens", "v d -> v d"),
    Rule(_L + "input_layernorm.weight", "blocks.attn_norm.scale", "d -> d"),
    Rule(_L + "input_layernorm.bias", "blocks.attn_norm.bias", "d -> d"),
    Rule(_L + "post_attention_layernorm.weight", "blocks.mlp_norm.scale", "d -> d"),
    Rule(_L + "post_attention_layernorm.bias", "blocks.mlp_norm.bias", "d -> d"),
    Rule(_QKV + "weight", "blocks.q.w blocks.k.w blocks.v.w", "(n three h) i -> three i (n h)"),
    Rule(_QKV + "bias", "blocks.q.b blocks.k.b blocks.v.b", "(n three h) -> three (n h)"),
    Rule(_L + "attention.dense.weight", "blocks.o.w", "o i -> i o"),
    Rule(_L + "attention.dense.bias", "blocks.o.b", "o -> o"),
    Rule(_L + "mlp.dense_h_to_4h.weight", "blocks.up.w", "o i -> i o"),
    Rule(_L + "mlp.dense_h_to_4h.bias", "blocks.up.b", "o -> o"),
    Rule(_L + "mlp.dense_4h_to_h.weight", "blocks.down.w", "o i -> i o"),
    Rule(_L + "mlp.dense_4h_to_h.bias", "blocks.down.b", "o -> o"),
    Rule("gpt_neox.final_layer_norm.weight", "final_norm.scale", "d -> d"),
    Rule("gpt_neox.final_layer_norm.bias", "final_norm.bias", "d -> d"),
    Rule("embed_out.weight", "unembed.w", "v d -> v d"),
)
BUFFERS = (r".*\.attention\.bias", r".*\.attention\.masked_bias", r".*rotary_emb\.inv_freq")
FAMILY = Family(config_from_hf, RULES, BUFFERS, "gpt_neox.")
