"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from jaxedit.models.config import ModelConfig
from jaxedit.models.conversion import Family
from jaxedit.models.families import llama
from jaxedit.models.fields import Fields


def windows(f: Fields, n_layer: int) -> tuple[int, ...]:
    """Layers from `max_window_layers` on have the window, if it is switched on."""
    use, window = f.take("use_sliding_window", default=False), f.take("sliding_window", default=None)
    first, kinds = f.take("max_window_layers", default=n_layer), f.take("layer_types", default=None)
    if not use or not window:
        return (0,) * n_layer
    if kinds is not None:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return tuple(window if l >= first else 0 for l in range(n_layer))


def config_from_hf(config: dict, where: str) -> ModelConfig:
    f = Fields(config, where)
    made = llama.read(f, family="qwen2", q_bias=True, windows=windows(f, config["num_hidden_layers"]))
    f.finish("use_mrope")
    return made


FAMILY = Family(config_from_hf, llama.RULES, llama.BUFFERS)
