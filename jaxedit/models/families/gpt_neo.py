"""GPT-Neo: like GPT-2, with unscaled attention and a window on the layers marked "local"."""

from jaxedit.models.config import ModelConfig
from jaxedit.models.conversion import Family, Rule
from jaxedit.models.families import gpt2
from jaxedit.models.fields import ACTIVATIONS, Fields


def config_from_hf(config: dict, where: str) -> ModelConfig:
    f = Fields(config, where)
    d_model, n_head = f.take("hidden_size"), f.take("num_heads", "num_attention_heads")
    n_layer, window = f.take("num_layers", "num_hidden_layers"), f.take("window_size", default=256)
    kinds = f.take("attention_layers", default=None)
    patterns = f.take("attention_types", default=[[["global"], n_layer]])
    kinds = kinds or [kind for pattern, times in patterns for _ in range(times) for kind in pattern]
    made = ModelConfig(
        family="gpt_neo",
        vocab=f.take("vocab_size"),
        d_model=d_model,
        d_ff=f.take("intermediate_size", default=None) or 4 * d_model,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_head,
        head_dim=d_model // n_head,
        max_positions=f.take("max_position_embeddings"),
        norm="layer",
        norm_eps=f.take("layer_norm_epsilon", default=1e-5),
        act=f.choose("activation_function", of=ACTIVATIONS, default="gelu_new"),
        gated=False,
        learned_positions=True,
        attn_scale=1.0,
        windows=tuple(window if kind == "local" else 0 for kind in kinds),
        q_bias=False,
        o_bias=True,
        mlp_bias=True,
        tied=f.take("tie_word_embeddings", default=True),
    )
    f.finish(*gpt2.SUMMARY)
    return made


_H = "transformer.h.{}."
RULES = (
    *(r for r in gpt2.RULES if ".attn." not in r.source and ".mlp." not in r.source),
    *(Rule(_H + f"attn.attention.{x}_proj.weight", f"blocks.{x}.w", "o i -> i o") for x in "qkv"),
    Rule(_H + "attn.attention.out_proj.weight", "blocks.o.w", "o i -> i o"),
    Rule(_H + "attn.attention.out_proj.bias", "blocks.o.b", "o -> o"),
    Rule(_H + "mlp.c_fc.weight", "blocks.up.w", "o i -> i o"),
    Rule(_H + "mlp.c_fc.bias", "blocks.up.b", "o -> o"),
    Rule(_H + "mlp.c_proj.weight", "blocks.down.w", "o i -> i o"),
    Rule(_H + "mlp.c_proj.bias", "blocks.down.b", "o -> o"),
)
BUFFERS = (r".*\.attention\.bias", r".*\.attention\.masked_bias")
FAMILY = Family(config_from_hf, RULES, BUFFERS, "transformer.")
