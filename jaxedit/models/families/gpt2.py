"""GPT-2: learned positions, fused attention projections stored as [in, out]."""

from jaxedit.models.config import ModelConfig
from jaxedit.models.conversion import Family, Rule
from jaxedit.models.fields import ACTIVATIONS, Fields


def config_from_hf(config: dict, where: str) -> ModelConfig:
    f = Fields(config, where)
    d_model, n_head = f.take("n_embd", "hidden_size"), f.take("n_head", "num_attention_heads")
    n_layer = f.take("n_layer", "num_hidden_layers")
    f.expect("scale_attn_weights", True, absent=True)
    f.expect("scale_attn_by_inverse_layer_idx", False, absent=False)
    made = ModelConfig(
        family="gpt2",
        vocab=f.take("vocab_size"),
        d_model=d_model,
        d_ff=f.take("n_inner", default=None) or 4 * d_model,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_head,
        head_dim=d_model // n_head,
        max_positions=f.take("n_positions", "max_position_embeddings"),
        norm="layer",
        norm_eps=f.take("layer_norm_epsilon", default=1e-5),
        act=f.choose("activation_function", of=ACTIVATIONS, default="gelu_new"),
        gated=False,
        learned_positions=True,
        attn_scale=(d_model // n_head) ** -0.5,
        windows=(0,) * n_layer,
        q_bias=True,
        o_bias=True,
        mlp_bias=True,
        tied=f.take("tie_word_embeddings", default=True),
    )
    f.finish(*SUMMARY, "n_ctx", "reorder_and_upcast_attn")
    return made


SUMMARY = (
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
)
_H = "transformer.h.{}."
RULES = (
    Rule("transformer.wte.weight", "embed.tokens", "v d -> v d"),
    Rule("transformer.wpe.weight", "embed.positions", "p d -> p d"),
    Rule(_H + "ln_1.weight", "blocks.attn_norm.scale", "d -> d"),
    Rule(_H + "ln_1.bias", "blocks.attn_norm.bias", "d -> d"),
    Rule(_H + "ln_2.weight", "blocks.mlp_norm.scale", "d -> d"),
    Rule(_H + "ln_2.bias", "blocks.mlp_norm.bias", "d -> d"),
    Rule(_H + "attn.c_attn.weight", "blocks.q.w blocks.k.w blocks.v.w", "i (q+k+v) -> i (q+k+v)"),
    Rule(_H + "attn.c_attn.bias", "blocks.q.b blocks.k.b blocks.v.b", "(q+k+v) -> (q+k+v)"),
    Rule(_H + "attn.c_proj.weight", "blocks.o.w", "i o -> i o"),
    Rule(_H + "attn.c_proj.bias", "blocks.o.b", "o -> o"),
    Rule(_H + "mlp.c_fc.weight", "blocks.up.w", "i o -> i o"),
    Rule(_H + "mlp.c_fc.bias", "blocks.up.b", "o -> o"),
    Rule(_H + "mlp.c_proj.weight", "blocks.down.w", "i o -> i o"),
    Rule(_H + "mlp.c_proj.bias", "blocks.down.b", "o -> o"),
    Rule("transformer.ln_f.weight", "final_norm.scale", "d -> d"),
    Rule("transformer.ln_f.bias", "final_norm.bias", "d -> d"),
    Rule("lm_head.weight", "unembed.w", "v d -> v d"),
)
BUFFERS = (r".*\.attn\.bias", r".*\.attn\.masked_bias")
FAMILY = Family(config_from_hf, RULES, BUFFERS, "transformer.")
