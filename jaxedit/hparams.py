"""Hyper-parameter files of EasyEdit (YAML) and of ROME, MEMIT, AlphaEdit and NSE (JSON) as methods.

Every key of a file is accounted for: it sets something, is about the PyTorch model (module names, devices) or about the
statistics, or the file is refused with the keys that nothing is known of.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxedit.config import AnchorConfig, EqualityConstrained, Method, NeuronSubset
from jaxedit.errors import JaxEditError
from jaxedit.presets import RECIPES

_ALGORITHMS = {
    "memit": "memit",
    "rome": "rome",
    "r-rome": "r_rome",
    "pmet": "pmet",
    "emmet": "emmet",
    "alphaedit": "alphaedit",
    "nse": "nse",
    "namet": "namet",
}
_ANCHOR = {
    "v_num_grad_steps": "steps",
    "v_lr": "lr",
    "clamp_norm_factor": "clamp",
    "kl_factor": "kl_weight",
    "v_weight_decay": "weight_decay",
}
_SOLVER = {
    "mom2_update_weight": "cov_weight",
    "nullspace_threshold": "threshold",
    "L2": "l2",
    "alpha": "lower",
    "upper_bound": "upper",
    "neuron_threshold": "share",
    "max_iterations": "rounds",
    "inv_coef": "slack",
}
# What has one value that can be carried out here
_FIXED = {"fact_token": ("subject_last",), "layer_selection": ("all",)}
_STATISTICS = ("mom2_dataset", "mom2_n_samples", "mom2_dtype", "mom2_maxseqlen", "stats_dir")
_NAMES = (
    "rewrite_module_tmp",
    "layer_module_tmp",
    "mlp_module_tmp",
    "attn_module_tmp",
    "ln_f_module",
    "lm_head_module",
)
_UNUSED = (
    *_NAMES,
    *(
        "rewrite_module_tmps",
        "emb_module",
        "v_loss_layer",
        "model_parallel",
        "device",
        "fp16",
        "max_length",
        "batch_size",
    ),
    *("P_loc", "context_template_length_params", "mom2_adjustment", "alg_name", "model_name", "name", "layers", "gpu"),
    *("results_dir", "data_dir", "sequential_edit", "tokenizer_class", "tokenizer_name"),
)


@dataclasses.dataclass(frozen=True)
class HyperParameters:
    """What a file says: the method, the model it was written for (None where it does not say), what it says of the
    statistics, and the keys that have no meaning here."""

    method: Method
    model_name: str | None
    statistics: dict[str, Any]
    unused: tuple[str, ...]


def read_hyperparameters(path: str | Path, method: str | None = None) -> HyperParameters:
    """Read a hyper-parameter file.

    method: what the file is for, where neither `alg_name` nor its keys say so; "fe" reads MEMIT's file for FE.

    Raises JaxEditError naming unknown keys, values that cannot be carried out, and missing ones.
    """
    path = Path(path)
    given = _parse(path)
    name = method or _method_of(given, path)
    if name not in RECIPES:
        raise JaxEditError(f"{path}: unknown method {name!r}; known: {', '.join(RECIPES)}")
    unknown = [k for k in given if k not in {*_ANCHOR, *_SOLVER, *_FIXED, *_STATISTICS, *_UNUSED}]
    if unknown:
        raise JaxEditError(
            f"{path}: nothing is known of {', '.join(map(repr, unknown))}; remove what you can do without"
        )
    problems = [
        f"{k} is {given[k]!r}, and can only be {v[0]!r}" for k, v in _FIXED.items() if given.get(k, v[0]) not in v
    ]
    if "layers" not in given:
        problems.append("there are no layers")
    if problems:
        raise JaxEditError(f"{path}: {'; '.join(problems)}")
    recipe = RECIPES[name]
    anchor = {ours: given[theirs] for theirs, ours in _ANCHOR.items() if theirs in given}
    try:
        made = Method(
            name=name,
            targets=recipe.targets,
            layers=tuple(int(l) for l in given["layers"]),
            solver=dataclasses.replace(recipe.solver, **_solver(recipe.solver, given, path)),
            regulariser=recipe.regulariser,
            anchor=dataclasses.replace(AnchorConfig(), **recipe.anchor, **anchor),
            **recipe.fields,
        )
    except (TypeError, ValueError) as error:
        raise JaxEditError(f"{path}: a value has the wrong type: {error}") from None
    statistics = {k: given[k] for k in _STATISTICS if k in given}
    unused = tuple(
        k for k in given if k in _UNUSED and k not in ("layers", "alg_name", "model_name", "mom2_adjustment")
    )
    return HyperParameters(made, given.get("model_name") or given.get("name"), statistics, unused)


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JaxEditError(f"cannot read {path}: {error}") from None
    if path.suffix == ".json":
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise JaxEditError(f"{path} is not JSON: {error}") from None
    else:
        import yaml

        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise JaxEditError(f"{path} is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise JaxEditError(f"{path} holds no hyper-parameters: expected names with values")
    return {k: _number(v) for k, v in found.items()}


def _number(value):
    """YAML reads 5e-1 as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _method_of(given: dict[str, Any], path: Path) -> str:
    said = str(given.get("alg_name", "")).lower()
    if said in _ALGORITHMS:
        return _ALGORITHMS[said]
    if said:
        raise JaxEditError(f"{path} is for {given['alg_name']!r}; known: {', '.join(sorted(_ALGORITHMS))}")
    for key, name in (
        ("nullspace_threshold", "alphaedit"),
        ("neuron_threshold", "nse"),
        ("mom2_update_weight", "memit"),
    ):
        if key in given:
            return name
    if "context_template_length_params" in given:
        return "rome"
    raise JaxEditError(f"{path} does not say which method it is for: pass method=")


def _solver(solver, given: dict[str, Any], path: Path) -> dict[str, Any]:
    fields = {f.name for f in dataclasses.fields(solver)}
    made = {ours: given[theirs] for theirs, ours in _SOLVER.items() if theirs in given and ours in fields}
    weight = made.get("cov_weight")
    if isinstance(weight, (list, tuple)):
        if len(set(map(float, weight))) != 1:
            raise JaxEditError(f"{path}: mom2_update_weight is not the same for all layers: {weight}")
        made["cov_weight"] = float(weight[0])
    if isinstance(solver, NeuronSubset) and "rounds" in made:
        made["rounds"] = int(made["rounds"]) - 1  # published code ends at the beginning of its last iteration
    if isinstance(solver, EqualityConstrained) and given.get("mom2_adjustment") is False:
        made |= {"cov_weight": 0.0, "l2": 1.0}
    return made
