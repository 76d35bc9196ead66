"""One file a family: `config_from_hf` and the conversion rules. `FAMILIES` maps Hugging Face's `model_type`."""

from jaxedit.models.conversion import Family
from jaxedit.models.families import (
    gemma2,
    gpt2,
    gpt_neo,
    gpt_neox,
    gptj,
    llama,
    mistral,
    phi3,
    qwen2,
    qwen3,
)

FAMILIES: dict[str, Family] = {
    "gpt2": gpt2.FAMILY,
    "gpt_neo": gpt_neo.FAMILY,
    "gptj": gptj.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "phi3": phi3.FAMILY,
    "gemma2": gemma2.FAMILY,
}
