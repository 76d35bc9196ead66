"""jaxedit: knowledge editing for large language models in JAX.

import jaxedit as je

model, tokenizer = je.load("smollm2-135m")
result = je.apply_edits(model, tokenizer, je.read_requests("facts.jsonl"), method="fe")

A name is imported when it is first used, so that ``import jaxedit`` takes milliseconds and reading requests does not
wait for JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxedit.config import (
        AnchorConfig,
        BackwardSpread,
        ForwardReplay,
        Method,
        PerLayer,
        Ridge,
    )
    from jaxedit.data.requests import read_requests
    from jaxedit.edit import EditResult, apply_edits
    from jaxedit.edit import find_targets as targets
    from jaxedit.errors import (
        CheckpointError,
        JaxEditError,
        PatchError,
        RequestError,
        StatisticsError,
    )
    from jaxedit.evaluation.generation import generate
    from jaxedit.evaluation.metrics import evaluate
    from jaxedit.evaluation.report import Report
    from jaxedit.export.patch import EditPatch, apply_patch, withdraw_patch
    from jaxedit.info import EditInfo, LayerInfo
    from jaxedit.models.hub import load, save
    from jaxedit.models.transformer import Decoder, hidden_states, logits
    from jaxedit.presets import METHODS, method_for
    from jaxedit.sharding import make_mesh
    from jaxedit.solvers.ridge import factorise
    from jaxedit.statistics import SecondMoment, SecondMoments, second_moments
    from jaxedit.targets.strategies import Targets
    from jaxedit.types import EditRequest

    __version__: str

# Module to the names that come from it, the same as above.
_MODULES = {
    "config": "AnchorConfig BackwardSpread ForwardReplay Method PerLayer Ridge",
    "data.requests": "read_requests",
    "edit": "EditResult apply_edits",
    "errors": "CheckpointError JaxEditError PatchError RequestError StatisticsError",
    "evaluation.generation": "generate",
    "evaluation.metrics": "evaluate",
    "evaluation.report": "Report",
    "export.patch": "EditPatch apply_patch withdraw_patch",
    "info": "EditInfo LayerInfo",
    "models.hub": "load save",
    "models.transformer": "Decoder hidden_states logits",
    "presets": "METHODS method_for",
    "sharding": "make_mesh",
    "solvers.ridge": "factorise",
    "statistics": "SecondMoment SecondMoments second_moments",
    "targets.strategies": "Targets",
    "types": "EditRequest",
}
_HOMES = {name: (module, name) for module, names in _MODULES.items() for name in names.split()}
_HOMES["targets"] = ("edit", "find_targets")

__all__ = [
    "METHODS",
    "AnchorConfig",
    "BackwardSpread",
    "CheckpointError",
    "Decoder",
    "EditInfo",
    "EditPatch",
    "EditRequest",
    "EditResult",
    "ForwardReplay",
    "JaxEditError",
    "LayerInfo",
    "Method",
    "PatchError",
    "PerLayer",
    "Report",
    "RequestError",
    "Ridge",
    "SecondMoment",
    "SecondMoments",
    "StatisticsError",
    "Targets",
    "apply_edits",
    "apply_patch",
    "evaluate",
    "factorise",
    "generate",
    "hidden_states",
    "load",
    "logits",
    "make_mesh",
    "method_for",
    "read_requests",
    "save",
    "second_moments",
    "targets",
    "withdraw_patch",
]

# `targets` is the function, and also a subpackage. Python binds a subpackage to its parent when it is first imported
# and never again, so it is imported here (it is empty) and the binding is taken back before anyone sees it.
import_module("jaxedit.targets")
globals().pop("targets")


def __getattr__(name: str):
    if name in _HOMES:
        module, there = _HOMES[name]
        value = getattr(import_module(f"jaxedit.{module}"), there)
    elif name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value = version("jaxedit")
        except PackageNotFoundError:  # run from its source folder
            value = "0+unknown"
    else:
        raise AttributeError(f"module 'jaxedit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__, "__version__"})
