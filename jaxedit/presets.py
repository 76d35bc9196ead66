"""Methods by name, with the settings published for a model.

| model | from |
|---|---|
| GPT-2-XL, GPT-J | MEMIT's hyper-parameter files; for the other methods the FE repository's |
| Llama-3-8B | AlphaEdit's (MEMIT) and the FE repository's (the others) |
| Mistral-7B, Qwen2.5-7B | EasyEdit's MEMIT files, for every method |
| SmolLM2-135M | chosen on a validation split of CounterFact by ``benchmarks/choose_presets.py`` |
"""

from __future__ import annotations

import dataclasses

from jaxedit.config import AnchorConfig, BackwardSpread, ForwardReplay, Method, PerLayer, Ridge
from jaxedit.errors import JaxEditError
from jaxedit.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of one model. `published` are MEMIT's; `others` replaces fields for the methods it names."""

    layers: tuple[int, ...]
    anchor: AnchorConfig
    cov_weight: float
    others: dict[str, dict] = dataclasses.field(default_factory=dict)


METHODS = ("fe", "memit", "memit_no_divide", "one_layer", "blue")
_NOT_MEMIT = ("fe", "memit_no_divide", "one_layer", "blue")


def _for(names, **fields) -> dict[str, dict]:
    return {name: fields for name in names}


_WIDE_CLAMP = AnchorConfig(steps=25, lr=0.5, clamp=4.0, weight_decay=1e-3)
_LLAMA3 = AnchorConfig(steps=25, lr=0.1)

PRESETS: dict[str, Preset] = {
    "gpt2-xl": Preset(
        (13, 14, 15, 16, 17),
        AnchorConfig(steps=20, lr=0.5),
        20000.0,
        _for(_NOT_MEMIT, anchor=AnchorConfig(steps=35, lr=0.5), cov_weight=15000.0),
    ),
    "gpt-j-6b": Preset((3, 4, 5, 6, 7, 8), AnchorConfig(steps=25, lr=0.5), 15000.0),
    "llama-3-8b": Preset(
        (4, 5, 6, 7, 8), _LLAMA3, 15000.0, _for(_NOT_MEMIT, anchor=dataclasses.replace(_LLAMA3, steps=35))
    ),
    "mistral-7b": Preset((4, 5, 6, 7, 8), _WIDE_CLAMP, 15000.0),
    "qwen2.5-7b": Preset((4, 5, 6, 7, 8), _WIDE_CLAMP, 15000.0),
    "smollm2-135m": Preset(
        (3, 4, 5, 6, 7),
        AnchorConfig(steps=25, lr=0.5),
        500.0,
        _for(("fe",), cov_weight=1500.0) | _for(("memit_no_divide",), cov_weight=5000.0),
    ),
}

# Which preset a model gets: (family, layers, d_model, d_ff).
_SHAPES = {
    ("gpt2", 48, 1600, 6400): "gpt2-xl",
    ("gptj", 28, 4096, 16384): "gpt-j-6b",
    ("llama", 32, 4096, 14336): "llama-3-8b",
    ("mistral", 32, 4096, 14336): "mistral-7b",
    ("qwen2", 28, 3584, 18944): "qwen2.5-7b",
    ("llama", 30, 576, 1536): "smollm2-135m",
}


def preset_name(config: ModelConfig) -> str | None:
    """Which preset a model has, by its shape; None if none."""
    return _SHAPES.get((config.family, config.n_layer, config.d_model, config.d_ff))


def method_for(name: str, config: ModelConfig, layers: tuple[int, ...] | None = None) -> Method:
    """The method `name` with the preset of a model, or with MEMIT's general settings at `layers`.

    Raises JaxEditError on an unknown method, a model without a preset and no `layers`, and layers out of range.
    """
    if name not in METHODS:
        raise JaxEditError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    found = preset_name(config)
    if found is None and layers is None:
        first = max(1, config.n_layer // 8)
        example = tuple(range(first, min(first + 5, config.n_layer)))
        raise JaxEditError(
            f"there is no preset for this {config.family} model ({config.n_layer} layers, d_model "
            f"{config.d_model}); pass layers=, for example layers={example}"
        )
    preset = PRESETS[found] if found else Preset((), AnchorConfig(), 15000.0)
    own = preset.others.get(name, {})
    chosen = tuple(layers if layers is not None else own.get("layers", preset.layers))
    if name == "one_layer":
        chosen = chosen[-1:]
    elif name == "blue":
        chosen = tuple(sorted({chosen[0], chosen[-1]})) if chosen else ()
    strategies = {
        "fe": ForwardReplay(),
        "memit": BackwardSpread(),
        "memit_no_divide": BackwardSpread(divide=False),
        "one_layer": BackwardSpread(),
        "blue": PerLayer(),
    }
    return Method(
        name=name,
        targets=strategies[name],
        layers=chosen,
        solver=Ridge(cov_weight=own.get("cov_weight", preset.cov_weight)),
        anchor=own.get("anchor", preset.anchor),
    )


def resolve(method: str | Method, config: ModelConfig, layers=None) -> Method:
    """A Method from a name or a Method, at `layers` where given. Raises JaxEditError where it does not fit."""
    if isinstance(method, Method):
        made = method if layers is None else dataclasses.replace(method, layers=tuple(layers))
    elif isinstance(method, str):
        made = method_for(method, config, None if layers is None else tuple(layers))
    else:
        raise JaxEditError(f"method must be a name or a Method, got {type(method).__name__}")
    beyond = [l for l in made.layers if l >= config.n_layer]
    if beyond:
        raise JaxEditError(f"layers {beyond} are out of range: the model has layers 0 to {config.n_layer - 1}")
    return made
