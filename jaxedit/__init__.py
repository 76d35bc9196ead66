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
    from jaxedit.adapters.apart import Apart
    from jaxedit.adapters.attached import adapters_of, attach, detach
    from jaxedit.adapters.caching import CachingEditor
    from jaxedit.adapters.editors import editor_for
    from jaxedit.adapters.grace import Grace
    from jaxedit.adapters.ireva import IReVa
    from jaxedit.adapters.melo import Melo
    from jaxedit.adapters.rep import Rep
    from jaxedit.adapters.wise import Wise
    from jaxedit.adapting import add_rep
    from jaxedit.analysis.jacobian import average_jacobian, jacobian, passive, stretch
    from jaxedit.analysis.key_bounds import Bounds, agreement, edit_bounds, verdicts_found
    from jaxedit.analysis.key_neighbours import nearest_prefixes
    from jaxedit.analysis.key_plots import (
        plot_bounds,
        plot_key_map,
        plot_neighbours,
        plot_similarities,
        plot_value_norms,
    )
    from jaxedit.analysis.keys import key_similarity, retrieval_weights, subject_keys, value_norms, whiten, whitening
    from jaxedit.analysis.plots import plot_trace
    from jaxedit.analysis.record import Trace
    from jaxedit.analysis.robustness_plots import plot_robustness
    from jaxedit.analysis.spread_plots import plot_spread
    from jaxedit.analysis.spreading import Premises, StepSizes, Walk, premises, step_sizes, walk
    from jaxedit.analysis.study import Spread, spread
    from jaxedit.analysis.suggest import read_preset, suggest_layers, tune, write_preset
    from jaxedit.analysis.tracing import trace
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
        RelativeSparsify,
        Ridge,
        SpectralClamp,
        SpectralSparsify,
    )
    from jaxedit.data.counterfact import read_references
    from jaxedit.data.facts import Fact, facts_from_requests, read_known_facts
    from jaxedit.data.knowedit import read_knowedit
    from jaxedit.data.mquake import read_mquake
    from jaxedit.data.queries import Halves, RobustQueries, read_rephrases, robust_queries
    from jaxedit.data.requests import read_requests
    from jaxedit.data.subject_forms import SubjectPrompt, other_forms, random_contexts, text_end
    from jaxedit.edit import apply_edits
    from jaxedit.edit import find_targets as targets
    from jaxedit.errors import CheckpointError, JaxEditError, PatchError, RequestError, StatisticsError
    from jaxedit.evaluation.consistency import fit_vectoriser, reference_scores
    from jaxedit.evaluation.fluency import fluency
    from jaxedit.evaluation.generation import generate
    from jaxedit.evaluation.metrics import evaluate
    from jaxedit.evaluation.multihop import Asking, evaluate_multihop
    from jaxedit.evaluation.perplexity import PerplexityProbe, perplexity
    from jaxedit.evaluation.portability import evaluate_knowedit
    from jaxedit.evaluation.report import Report
    from jaxedit.evaluation.robustness import Robustness, evaluate_robustness, robustness_table
    from jaxedit.evaluation.withdrawal import edit_scores, evaluate_withdrawal
    from jaxedit.evaluation.zsre import evaluate_zsre
    from jaxedit.export.lora import LoraInfo, apply_lora, check_lora, load_lora, save_lora
    from jaxedit.export.merge import MergeReport, merge_patches
    from jaxedit.export.patch import EditPatch, apply_patch, withdraw_patch
    from jaxedit.groups import EditGroup, apply_groups
    from jaxedit.hparams import HyperParameters, read_hyperparameters
    from jaxedit.info import EditInfo, LayerInfo
    from jaxedit.ledger import Ledger
    from jaxedit.models.hub import load, save
    from jaxedit.models.stretch import Stretch, pull, push
    from jaxedit.models.transformer import Decoder, hidden_states, logits
    from jaxedit.presets import EDITORS, METHODS, TUNERS, method_for
    from jaxedit.result import EditResult
    from jaxedit.sharding import make_mesh
    from jaxedit.solvers.prepare import prepare
    from jaxedit.solvers.ridge import factorise
    from jaxedit.statistics import SecondMoment, SecondMoments, second_moments
    from jaxedit.stream import CollapseGuard, StreamResult, StreamStep, edit_stream
    from jaxedit.targets.strategies import Targets
    from jaxedit.tuning.finetune import FineTune
    from jaxedit.tuning.lora import LoraEditor
    from jaxedit.types import EditRequest

    __version__: str

# Module to the names that come from it, the same as above.
_MODULES = {
    "adapters.apart": "Apart",
    "adapters.attached": "adapters_of attach detach",
    "adapters.caching": "CachingEditor",
    "adapters.editors": "editor_for",
    "adapters.grace": "Grace",
    "adapters.ireva": "IReVa",
    "adapters.melo": "Melo",
    "adapters.rep": "Rep",
    "adapters.wise": "Wise",
    "adapting": "add_rep",
    "analysis.jacobian": "average_jacobian jacobian passive stretch",
    "analysis.key_bounds": "Bounds agreement edit_bounds verdicts_found",
    "analysis.key_neighbours": "nearest_prefixes",
    "analysis.key_plots": "plot_bounds plot_key_map plot_neighbours plot_similarities plot_value_norms",
    "analysis.keys": "key_similarity retrieval_weights subject_keys value_norms whiten whitening",
    "analysis.plots": "plot_trace",
    "analysis.record": "Trace",
    "analysis.robustness_plots": "plot_robustness",
    "analysis.spread_plots": "plot_spread",
    "analysis.spreading": "Premises StepSizes Walk premises step_sizes walk",
    "analysis.study": "Spread spread",
    "analysis.suggest": "read_preset suggest_layers tune write_preset",
    "analysis.tracing": "trace",
    "config": "AnchorConfig BackwardSpread EqualityConstrained ForwardReplay JacobianSpread Method "
    "NeuronSubset NullSpace PerLayer RelativeSparsify Ridge SpectralClamp SpectralSparsify",
    "data.counterfact": "read_references",
    "data.facts": "Fact facts_from_requests read_known_facts",
    "data.knowedit": "read_knowedit",
    "data.mquake": "read_mquake",
    "data.queries": "Halves RobustQueries read_rephrases robust_queries",
    "data.requests": "read_requests",
    "data.subject_forms": "SubjectPrompt other_forms random_contexts text_end",
    "edit": "apply_edits",
    "errors": "CheckpointError JaxEditError PatchError RequestError StatisticsError",
    "evaluation.consistency": "fit_vectoriser reference_scores",
    "evaluation.fluency": "fluency",
    "evaluation.generation": "generate",
    "evaluation.metrics": "evaluate",
    "evaluation.multihop": "Asking evaluate_multihop",
    "evaluation.perplexity": "PerplexityProbe perplexity",
    "evaluation.portability": "evaluate_knowedit",
    "evaluation.report": "Report",
    "evaluation.robustness": "Robustness evaluate_robustness robustness_table",
    "evaluation.withdrawal": "edit_scores evaluate_withdrawal",
    "evaluation.zsre": "evaluate_zsre",
    "export.lora": "LoraInfo apply_lora check_lora load_lora save_lora",
    "export.merge": "MergeReport merge_patches",
    "export.patch": "EditPatch apply_patch withdraw_patch",
    "groups": "EditGroup apply_groups",
    "hparams": "HyperParameters read_hyperparameters",
    "info": "EditInfo LayerInfo",
    "ledger": "Ledger",
    "models.hub": "load save",
    "models.stretch": "Stretch pull push",
    "models.transformer": "Decoder hidden_states logits",
    "presets": "EDITORS METHODS TUNERS method_for",
    "result": "EditResult",
    "sharding": "make_mesh",
    "solvers.prepare": "prepare",
    "solvers.ridge": "factorise",
    "statistics": "SecondMoment SecondMoments second_moments",
    "stream": "CollapseGuard StreamResult StreamStep edit_stream",
    "targets.strategies": "Targets",
    "tuning.finetune": "FineTune",
    "tuning.lora": "LoraEditor",
    "types": "EditRequest",
}
_HOMES = {name: (module, name) for module, names in _MODULES.items() for name in names.split()}
_HOMES["targets"] = ("edit", "find_targets")

__all__ = [
    "AnchorConfig",
    "Apart",
    "Asking",
    "BackwardSpread",
    "Bounds",
    "CachingEditor",
    "CheckpointError",
    "CollapseGuard",
    "Decoder",
    "EDITORS",
    "EditGroup",
    "EditInfo",
    "EditPatch",
    "EditRequest",
    "EditResult",
    "EqualityConstrained",
    "Fact",
    "FineTune",
    "ForwardReplay",
    "Grace",
    "Halves",
    "HyperParameters",
    "IReVa",
    "JacobianSpread",
    "JaxEditError",
    "LayerInfo",
    "Ledger",
    "LoraEditor",
    "LoraInfo",
    "METHODS",
    "Melo",
    "MergeReport",
    "Method",
    "NeuronSubset",
    "NullSpace",
    "PatchError",
    "PerLayer",
    "PerplexityProbe",
    "Premises",
    "RelativeSparsify",
    "Rep",
    "Report",
    "RequestError",
    "Ridge",
    "RobustQueries",
    "Robustness",
    "SecondMoment",
    "SecondMoments",
    "SpectralClamp",
    "SpectralSparsify",
    "Spread",
    "StatisticsError",
    "StepSizes",
    "StreamResult",
    "StreamStep",
    "Stretch",
    "SubjectPrompt",
    "TUNERS",
    "Targets",
    "Trace",
    "Walk",
    "Wise",
    "adapters_of",
    "add_rep",
    "agreement",
    "apply_edits",
    "apply_groups",
    "apply_lora",
    "apply_patch",
    "attach",
    "average_jacobian",
    "check_lora",
    "detach",
    "edit_bounds",
    "edit_scores",
    "edit_stream",
    "editor_for",
    "evaluate",
    "evaluate_knowedit",
    "evaluate_multihop",
    "evaluate_robustness",
    "evaluate_withdrawal",
    "evaluate_zsre",
    "factorise",
    "facts_from_requests",
    "fit_vectoriser",
    "fluency",
    "generate",
    "hidden_states",
    "jacobian",
    "key_similarity",
    "load",
    "load_lora",
    "logits",
    "make_mesh",
    "merge_patches",
    "method_for",
    "nearest_prefixes",
    "other_forms",
    "passive",
    "perplexity",
    "plot_bounds",
    "plot_key_map",
    "plot_neighbours",
    "plot_robustness",
    "plot_similarities",
    "plot_spread",
    "plot_trace",
    "plot_value_norms",
    "premises",
    "prepare",
    "pull",
    "push",
    "random_contexts",
    "read_hyperparameters",
    "read_knowedit",
    "read_known_facts",
    "read_mquake",
    "read_preset",
    "read_references",
    "read_rephrases",
    "read_requests",
    "reference_scores",
    "retrieval_weights",
    "robust_queries",
    "robustness_table",
    "save",
    "save_lora",
    "second_moments",
    "spread",
    "step_sizes",
    "stretch",
    "subject_keys",
    "suggest_layers",
    "targets",
    "text_end",
    "trace",
    "tune",
    "value_norms",
    "verdicts_found",
    "walk",
    "whiten",
    "whitening",
    "withdraw_patch",
    "write_preset",
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
