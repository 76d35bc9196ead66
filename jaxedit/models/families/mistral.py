"""Mistral: Llama with a sliding attention window."""

from jaxedit.models.config import ModelConfig
from jaxedit.models.conversion import Family
from jaxedit.models.families import llama
from jaxedit.models.fields import Fields


def config_from_hf(config: dict, where: str) -> ModelConfig:
    f = Fields(config, where)
    window = f.take("sliding_window", default=None) or 0
    f.expect("attention_bias", False, absent=False)
    made = llama.read(f, family="mistral", windows=(window,) * config["num_hidden_layers"])
    f.finish()
    return made


FAMILY = Family(config_from_hf, llama.RULES, llama.BUFFERS)
