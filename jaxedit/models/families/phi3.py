"""Phi-3: Llama with fused projections. The long-context variants (rope type "longrope") are refused by name."""

from jaxedit.models.config import ModelConfig
from jaxedit.models.conversion import Family, Rule
from jaxedit.models.families import llama
from jaxedit.models.fields import Fields


def config_from_hf(config: dict, where: str) -> ModelConfig:
    f = Fields(config, where)
    window = f.take("sliding_window", default=None) or 0
    f.expect("attention_bias", False, absent=False)
    f.take("original_max_position_embeddings", default=None)
    made = llama.read(f, family="phi3", windows=(window,) * config["num_hidden_layers"])
    f.finish()
    return made


_L = "model.layers.{}."
_FUSED = (
    Rule(_L + "self_attn.qkv_proj.weight", "blocks.q.w blocks.k.w blocks.v.w", "(q+k+v) i -> i (q+k+v)"),
    Rule(_L + "mlp.gate_up_proj.weight", "blocks.gate.w blocks.up.w", "(g+u) i -> i (g+u)"),
)
_SPLIT = {"blocks.q.w", "blocks.k.w", "blocks.v.w", "blocks.gate.w", "blocks.up.w"}
RULES = (*(r for r in llama.RULES if r.target not in _SPLIT), *_FUSED)
FAMILY = Family(config_from_hf, RULES, llama.BUFFERS)
