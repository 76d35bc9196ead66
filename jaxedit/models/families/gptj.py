"""GPT-J: attention and MLP in parallel from one norm, interleaved partial rotary, a bias on the unembedding."""

from jaxedit.models.config import ModelConfig, Rope
from jaxedit.models.conversion import Family, Rule
from jaxedit.models.families import gpt2
from jaxedit.models.fields import ACTIVATIONS, Fields


def config_from_hf(config: dict, where: str) -> ModelConfig:
    f = Fields(config, where)
    d_model, n_head = f.take("n_embd", "hidden_size"), f.take("n_head", "num_attention_heads")
    n_layer, head_dim = f.take("n_layer", "num_hidden_layers"), d_model // n_head
    f.expect("scale_attn_weights", True, absent=True)
    f.expect("rotary", True, absent=True)
    f.expect("tie_word_embeddings", False, absent=False)
    made = ModelConfig(
        family="gptj",
        vocab=f.take("vocab_size"),
        d_model=d_model,
        d_ff=f.take("n_inner", default=None) or 4 * d_model,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_head,
        head_dim=head_dim,
        max_positions=f.take("n_positions", "max_position_embeddings"),
        norm="layer",
        norm_eps=f.take("layer_norm_epsilon", default=1e-5),
        act=f.choose("activation_function", of=ACTIVATIONS, default="gelu_new"),
        gated=False,
        parallel="shared",
        rope=Rope(dim=f.take("rotary_dim", default=64) or head_dim, pairing="interleaved"),
        attn_scale=head_dim**-0.5,
        windows=(0,) * n_layer,
        mlp_bias=True,
        unembed_bias=True,
    )
    f.finish(*gpt2.SUMMARY, "n_ctx")
    return made


_H = "transformer.h.{}."
RULES = (
    Rule("transformer.wte.weight", "embed.tokens", "v d -> v d"),
    Rule(_H + "ln_1.weight", "blocks.attn_norm.scale", "d -> d"),
    Rule(_H + "ln_1.bias", "blocks.attn_norm.bias", "d -> d"),
    *(Rule(_H + f"attn.{x}_proj.weight", f"blocks.{x}.w", "o i -> i o") for x in "qkv"),
    Rule(_H + "attn.out_proj.weight", "blocks.o.w", "o i -> i o"),
    Rule(_H + "mlp.fc_in.weight", "blocks.up.w", "o i -> i o"),
    Rule(_H + "mlp.fc_in.bias", "blocks.up.b", "o -> o"),
    Rule(_H + "mlp.fc_out.weight", "blocks.down.w", "o i -> i o"),
    Rule(_H + "mlp.fc_out.bias", "blocks.down.b", "o -> o"),
    Rule("transformer.ln_f.weight", "final_norm.scale", "d -> d"),
    Rule("transformer.ln_f.bias", "final_norm.bias", "d -> d"),
    Rule("lm_head.weight", "unembed.w", "v d -> v d"),
    Rule("lm_head.bias", "unembed.b", "v -> v"),
)
FAMILY = Family(config_from_hf, RULES, gpt2.BUFFERS, "transformer.")
