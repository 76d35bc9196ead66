"""Qwen3: Llama with norms on each head's queries and keys."""

from jaxedit.models.config import ModelConfig
from jaxedit.models.conversion import Family, Rule
from jaxedit.models.families import llama, qwen2
from jaxedit.models.fields import Fields


def config_from_hf(config: dict, where: str) -> ModelConfig:
    f = Fields(config, where)
    bias = bool(f.take("attention_bias", default=False))
    layers = qwen2.windows(f, config["num_hidden_layers"])
    made = llama.read(f, family="qwen3", qk_norm=True, q_bias=bias, o_bias=bias, windows=layers)
    f.finish()
    return made


_L = "model.layers.{}.self_attn."
RULES = (
    *llama.RULES,
    Rule(_L + "q_norm.weight", "blocks.q_norm.scale", "h -> h"),
    Rule(_L + "k_norm.weight", "blocks.k_norm.scale", "h -> h"),
)
FAMILY = Family(config_from_hf, RULES, llama.BUFFERS)
