"""Gemma-2: four norms a block, soft caps, and a window on every other layer."""

from jaxedit.models.config import ModelConfig
from jaxedit.models.conversion import Family, Rule
from jaxedit.models.families import llama
from jaxedit.models.fields import ACTIVATIONS, Fields


def config_from_hf(config: dict, where: str) -> ModelConfig:
    f = Fields(config, where)
    n_layer, window = config["num_hidden_layers"], f.take("sliding_window", default=4096) or 0
    kinds = f.take("layer_types", default=None) or ["sliding_attention", "full_attention"] * n_layer
    f.expect("attention_bias", False, absent=False)
    f.expect("use_bidirectional_attention", False, absent=None)
    act = f.choose("hidden_activation", of=ACTIVATIONS | {None: "gelu_tanh"}, default=None)
    f.take("hidden_act", default=None)  # superseded by hidden_activation
    made = llama.read(
        f,
        family="gemma2",
        norm="rms_plus_one",
        act=act,
        attn_scale=f.take("query_pre_attn_scalar", default=256) ** -0.5,
        attn_softcap=f.take("attn_logit_softcapping", default=50.0),
        final_softcap=f.take("final_logit_softcapping", default=30.0),
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in kinds[:n_layer]),
        post_norms=True,
        embed_scale=config["hidden_size"] ** 0.5,
        tied=f.take("tie_word_embeddings", default=True),
    )
    f.finish()
    return made


_L = "model.layers.{}."
RULES = (
    *(r for r in llama.RULES if r.target != "blocks.mlp_norm.scale"),
    Rule(_L + "post_attention_layernorm.weight", "blocks.attn_post_norm.scale", "d -> d"),
    Rule(_L + "pre_feedforward_layernorm.weight", "blocks.mlp_norm.scale", "d -> d"),
    Rule(_L + "post_feedforward_layernorm.weight", "blocks.mlp_post_norm.scale", "d -> d"),
)
FAMILY = Family(config_from_hf, RULES, llama.BUFFERS)
