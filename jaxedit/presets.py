"""Methods by name, with the settings published for a model.

| model | from |
|---|---|
| GPT-2-XL, GPT-J | files of MEMIT, ROME, EMMET, NSE, of BLUE for PMET, and of the FE repository for the others |
| Llama-3-8B | AlphaEdit's (MEMIT), EasyEdit's (ROME, EMMET), NSE's, and the FE repository's (the others) |
| Llama-2-7B, Mistral-7B, Qwen2.5-7B | EasyEdit's MEMIT and ROME files, for every method; EMMET's for Llama-2 |
| SmolLM2-135M | chosen on a validation split of CounterFact by ``benchmarks/choose_presets.py`` |
"""

from __future__ import annotations

import dataclasses
import difflib

from jaxedit.config import (
    AnchorConfig,
    BackwardSpread,
    EqualityConstrained,
    ForwardReplay,
    JacobianSpread,
    Method,
    NeuronSubset,
    NullSpace,
    PerLayer,
    Regulariser,
    RelativeSparsify,
    Ridge,
    Solver,
    SpectralClamp,
    SpectralSparsify,
    Strategy,
)
from jaxedit.errors import JaxEditError
from jaxedit.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a method is, apart from a model's settings. layers: "all" of the preset's, the "last" one, or both "ends";
    anchor, fields: of `AnchorConfig` and `Method`."""

    targets: Strategy
    solver: Solver = Ridge()
    regulariser: Regulariser | None = None
    layers: str = "all"
    anchor: dict = dataclasses.field(default_factory=dict)
    fields: dict = dataclasses.field(default_factory=dict)


_ROME = {"key_average": "flat", "at_once": 1, "protect": False}
RECIPES: dict[str, Recipe] = {
    "fe": Recipe(ForwardReplay()),
    "memit": Recipe(BackwardSpread()),
    "memit_no_divide": Recipe(BackwardSpread(divide=False)),
    "one_layer": Recipe(BackwardSpread(), layers="last"),
    "jacobian_spread": Recipe(JacobianSpread()),
    "blue": Recipe(PerLayer(), layers="ends"),
    "alphaedit": Recipe(BackwardSpread(), NullSpace()),
    "rect": Recipe(BackwardSpread(), regulariser=RelativeSparsify()),
    "prune": Recipe(BackwardSpread(), regulariser=SpectralClamp()),
    "adaedit": Recipe(BackwardSpread(), regulariser=SpectralSparsify(), anchor={"site": "attention_and_mlp"}),
    "pmet": Recipe(BackwardSpread(divide="sqrt"), anchor={"site": "attention_and_mlp"}),
    "namet": Recipe(BackwardSpread(), anchor={"left_padded": True}),
    "nse": Recipe(BackwardSpread(), NeuronSubset()),
    "emmet": Recipe(BackwardSpread(), EqualityConstrained(slack=0.1), layers="last"),
    "r_rome": Recipe(BackwardSpread(), EqualityConstrained(), layers="last", anchor={"site": "mlp_out"}, fields=_ROME),
    "rome": Recipe(
        BackwardSpread(),
        EqualityConstrained(denominator="clean"),
        layers="last",
        anchor={"site": "mlp_out"},
        fields=_ROME,
    ),
}
METHODS = tuple(RECIPES)
EDITORS = ("ireva", "cache", "grace", "melo", "wise")  # that add parameters: see `jaxedit.adapters.editors`
REP = "+rep"  # behind the name of a method: with REP's adaptors, see `jaxedit.adapting.add_rep`
TUNERS = ("ft", "ft_l", "ft_m", "lora")  # that descend on the edits themselves: see `jaxedit.tuning.named`


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of one model. `layers`, `anchor` and `cov_weight` are MEMIT's; `others` replaces them for the methods
    it names, whole or, for `anchor`, field by field, and adds fields of their solvers."""

    layers: tuple[int, ...]
    anchor: AnchorConfig
    cov_weight: float
    others: dict[str, dict] = dataclasses.field(default_factory=dict)


_FE_PAPER = ("fe", "memit_no_divide", "one_layer", "blue", "alphaedit", "rect", "prune", "adaedit", "pmet", "namet")


def _for(names, **fields) -> dict[str, dict]:
    return {name: fields for name in names}


_WIDE_CLAMP = AnchorConfig(steps=25, lr=0.5, clamp=4.0, weight_decay=1e-3)
_LLAMA3 = AnchorConfig(steps=25, lr=0.1)
# ROME's own settings: the weight of the second moments does not matter without slack
_ROME_ANCHOR = {"lr": 0.5, "clamp": 4.0}
_PLAIN_ROME = {"cov_weight": 0.0, "l2": 1.0}  # without second moments, as EasyEdit's files have it


def _rome(layer: int, steps: int, weight_decay: float, **solver) -> dict[str, dict]:
    anchor = {**_ROME_ANCHOR, "steps": steps, "weight_decay": weight_decay}
    return _for(("rome", "r_rome"), layers=(layer,), anchor=anchor, **solver)


PRESETS: dict[str, Preset] = {
    "gpt2-xl": Preset(
        (13, 14, 15, 16, 17),
        AnchorConfig(steps=20, lr=0.5),
        20000.0,
        _for(_FE_PAPER, anchor={"steps": 35}, cov_weight=15000.0)
        | {
            "pmet": {"anchor": {"clamp": 2.0}, "cov_weight": 10000.0},
            "emmet": {"cov_weight": 1000.0},
            "nse": {"cov_weight": 10000.0, "lower": 35.0, "upper": 150.0, "share": 1.0},
        }
        | _rome(17, 20, 0.5),
    ),
    "gpt-j-6b": Preset(
        (3, 4, 5, 6, 7, 8),
        AnchorConfig(steps=25, lr=0.5),
        15000.0,
        {
            "pmet": {"anchor": {"lr": 0.2, "steps": 30, "kl_weight": 1.0}, "cov_weight": 6000.0},
            "emmet": {"layers": (5,), "cov_weight": 1.0},
            "nse": {"lower": 15.0, "upper": 100.0, "share": 0.8},
        }
        | _rome(5, 20, 0.5),
    ),
    "llama-3-8b": Preset(
        (4, 5, 6, 7, 8),
        _LLAMA3,
        15000.0,
        _for(_FE_PAPER, anchor={"steps": 35})
        | {
            "pmet": {},
            "emmet": {"layers": (5,), "cov_weight": 100000.0},
            "nse": {"lower": 2.5, "upper": 50.0, "share": 1.0},
        }
        | _rome(5, 25, 1e-3, **_PLAIN_ROME),
    ),
    "llama-2-7b": Preset(
        (4, 5, 6, 7, 8),
        _WIDE_CLAMP,
        15000.0,
        {"emmet": {"layers": (5,), "cov_weight": 1.0}} | _rome(5, 25, 1e-3, **_PLAIN_ROME),
    ),
    "mistral-7b": Preset((4, 5, 6, 7, 8), _WIDE_CLAMP, 15000.0, _rome(5, 25, 1e-3, **_PLAIN_ROME)),
    "qwen2.5-7b": Preset((4, 5, 6, 7, 8), _WIDE_CLAMP, 15000.0, _rome(5, 25, 1e-3, **_PLAIN_ROME)),
    "smollm2-135m": Preset(
        (3, 4, 5, 6, 7),
        AnchorConfig(steps=25, lr=0.5),
        500.0,
        {
            "fe": {"cov_weight": 1500.0},
            "memit_no_divide": {"cov_weight": 5000.0},
            "alphaedit": {"measure": "energy", "threshold": 0.1, "l2": 1.0},
            "alphaedit+fe": {"threshold": 0.2, "l2": 10.0},
            "pmet": {"cov_weight": 1500.0},
            "emmet": {"cov_weight": 10.0},
        }
        | _rome(5, 25, 0.5),
    ),
}

# Which preset a model gets: (family, layers, d_model, d_ff).
_SHAPES = {
    ("gpt2", 48, 1600, 6400): "gpt2-xl",
    ("gptj", 28, 4096, 16384): "gpt-j-6b",
    ("llama", 32, 4096, 14336): "llama-3-8b",
    ("llama", 32, 4096, 11008): "llama-2-7b",
    ("mistral", 32, 4096, 14336): "mistral-7b",
    ("qwen2", 28, 3584, 18944): "qwen2.5-7b",
    ("llama", 30, 576, 1536): "smollm2-135m",
}


def preset_name(config: ModelConfig) -> str | None:
    """Which preset a model has, by its shape; None if none."""
    return _SHAPES.get((config.family, config.n_layer, config.d_model, config.d_ff))


def method_for(name: str, config: ModelConfig, layers: tuple[int, ...] | None = None) -> Method:
    """The method `name` with the preset of a model, or with MEMIT's general settings at `layers`.

    name: one of METHODS, or one of them with "+fe", as in "alphaedit+fe": with targets made by ForwardReplay.

    Raises JaxEditError on an unknown method, a model without a preset and no `layers`, and layers out of range.
    """
    known, plus, replay = name.partition("+")
    if known not in RECIPES or (plus and replay != "fe"):
        near = difflib.get_close_matches(known.lower(), (*METHODS, *EDITORS, *TUNERS), 1)
        meant = f"; did you mean {near[0]!r}?" if near and near[0] != known else ""
        raise JaxEditError(
            f"unknown method {name!r}{meant}\nknown, also followed by '+fe': {', '.join(METHODS)}\n"
            f"with REP's adaptors: any of these followed by '{REP}'\nadding parameters: {', '.join(EDITORS)}\n"
            f"fine-tuning: {', '.join(TUNERS)}"
        )
    found = preset_name(config)
    if found is None and layers is None:
        first = max(1, config.n_layer // 8)
        example = tuple(range(first, min(first + 5, config.n_layer)))
        raise JaxEditError(
            f"there is no preset for this {config.family} model ({config.n_layer} layers, d_model "
            f"{config.d_model}); pass layers=, for example layers={example}"
        )
    preset = PRESETS[found] if found else Preset((), AnchorConfig(), 15000.0)
    recipe, own = RECIPES[known], preset.others.get(known, {})
    if replay:
        if isinstance(recipe.targets, PerLayer) or recipe.layers == "last":
            raise JaxEditError(f"{known!r} has no layers to replay forward to; '+fe' does not go with it")
        own = {**own, **preset.others.get("fe", {}), **preset.others.get(name, {})}
    chosen = tuple(layers if layers is not None else own.get("layers", preset.layers))
    if recipe.layers == "last":
        chosen = chosen[-1:]
    elif recipe.layers == "ends":
        chosen = tuple(sorted({chosen[0], chosen[-1]})) if chosen else ()
    settings = {"cov_weight": preset.cov_weight} | own
    fields = {f.name for f in dataclasses.fields(recipe.solver)}
    return Method(
        name=name,
        targets=ForwardReplay() if replay else recipe.targets,
        layers=chosen,
        solver=dataclasses.replace(recipe.solver, **{k: v for k, v in settings.items() if k in fields}),
        regulariser=recipe.regulariser,
        anchor=dataclasses.replace(preset.anchor, **{**recipe.anchor, **own.get("anchor", {})}),
        **recipe.fields,
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
