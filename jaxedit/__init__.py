"""jaxedit: knowledge editing for large language models in JAX.

import jaxedit as je

model, tokenizer = je.load("smollm2-135m")
result = je.apply_edits(model, tokenizer, je.read_requests("facts.jsonl"), method="fe")
"""

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
