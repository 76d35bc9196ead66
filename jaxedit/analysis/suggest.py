"""From a trace to settings: which layers to edit, how strongly, and a file that keeps the answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxedit.analysis.record import LAST_SUBJECT, ROLES, Trace, write_json
from jaxedit.config import Method, PerLayer
from jaxedit.data.templates import sample_templates
from jaxedit.edit import apply_edits, find_targets
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.metrics import evaluate
from jaxedit.evaluation.report import KINDS, Report, harmonic_mean
from jaxedit.layer_loop import Progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.fingerprint import whole_fingerprint
from jaxedit.models.transformer import Decoder
from jaxedit.plain import describe, finite, method_from_plain, refuse_unknown
from jaxedit.presets import preset_name, resolve
from jaxedit.statistics import SecondMoments, second_moments
from jaxedit.targets.strategies import Targets
from jaxedit.types import EditRequest

FORMAT = "jaxedit-preset-1"
LRS = (0.1, 0.5)
COV_WEIGHTS = (15.0, 150.0, 1500.0, 15000.0)


def suggest_layers(trace: Trace, count: int = 5) -> tuple[int, ...]:
    """The `count` consecutive layers whose MLPs matter most at the last subject token.

    Of all runs of `count` consecutive layers, the one over which the sum of the average indirect effects of the MLP
    at the last subject token is largest (ROME, §2.2; MEMIT, §4.1, edits the layers where that effect is high); of
    equal ones the lowest. At most half of the model's layers are taken. Left out are layer 0, whose keys say little
    more than which token it is, so that an edit there would be met by every prompt with that token, and the last
    layer, whose output at a token is not seen by later ones.

    Raises JaxEditError where the trace has no MLP effects or no fact has tokens after its subject.
    """
    if count < 1:
        raise JaxEditError(f"count must be at least 1, got {count}")
    mlp, n = trace.average("mlp"), trace.n_layer
    if not mlp.count[LAST_SUBJECT]:
        raise JaxEditError(f"no traced fact has a {ROLES[LAST_SUBJECT]} that is not also the prompt's last token")
    low, high = (1, n - 1) if n > 2 else (0, 1)
    size = min(count, max(1, n // 2), high - low)
    sums = [mlp.mean[l : l + size, LAST_SUBJECT].sum() for l in range(low, high - size + 1)]
    first = low + int(np.argmax(sums))
    return tuple(range(first, first + size))


@dataclasses.dataclass(frozen=True)
class Setting:
    """One method that was tried: `score` and `kl` as in `tune`, and the edited model's summaries by metric.

    default: whether it is what the method does without a suggestion.
    """

    method: Method
    default: bool
    score: float
    kl: float | None
    metrics: Mapping[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        weight = getattr(self.method.solver, "cov_weight", None)
        about = {"layers": list(self.method.layers), "lr": self.method.anchor.lr, "cov_weight": weight}
        return finite({**about, "default": self.default, "score": self.score, "kl": self.kl, "metrics": self.metrics})


@dataclasses.dataclass(frozen=True)
class Tuning:
    """All settings tried, the default first."""

    settings: tuple[Setting, ...]

    @property
    def best(self) -> Setting:
        """The setting of the highest score; of those the one of the lowest KL, then the first."""
        return max(self.settings, key=lambda s: (s.score, -(s.kl or 0.0)))

    @property
    def default(self) -> Setting:
        return self.settings[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"best": self.best.to_dict(), "settings": [s.to_dict() for s in self.settings]}


def objective(report: Report) -> float:
    """The harmonic mean of how well edits took, generalised, and left neighbours alone.

    Of each the success, where the requests' true targets are known, as in the report's score. Where they are not:
    the accuracy of the edited prompts and of the paraphrases, and the share of neighbourhood prompts whose likeliest
    next token is the base model's. What the requests have no prompts for is left out.
    """
    known = {**report.edited, "neighbourhood_accuracy": report.specificity["top1"]}
    parts = [next((known[f"{k}_{m}"] for m in ("success", "accuracy") if known[f"{k}_{m}"] is not None), None)
             for k in KINDS]  # fmt: skip
    return harmonic_mean([p for p in parts if p is not None]) or 0.0


def tune(
    model: Decoder,
    tokenizer,
    requests: Sequence[EditRequest],
    method: str | Method = "fe",
    layers: Sequence[int] | None = None,
    *,
    lrs: Sequence[float] = LRS,
    cov_weights: Sequence[float] = COV_WEIGHTS,
    stats: SecondMoments | None = None,
    templates=None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Tuning:
    """Try a grid of learning rates × weights of the second moment at `layers` on validation edits.

    requests: edits for validation, written all at once with each setting; use others to report results.
    method, layers, templates, seed: as in `apply_edits`. stats: second moments of those layers and of the default's,
        by default of the packaged corpus.

    The default is tried too: the method's preset for this model at its own layers, or, where the model has none, its
    general settings at `layers`. The best setting is the one of the highest `objective`, of those the one of the
    lowest KL(base ‖ edited) at neighbourhood prompts; so it is never worse than the default on these requests.

    Targets depend on learning rate and layers only and are found once for all weights, except with `PerLayer`, where
    later ones depend on what was written below. on_progress is told (stage, done, total).

    Raises as `apply_edits`, and JaxEditError where the method's solver has no cov_weight.
    """
    tried = candidates(method, model.config, layers, lrs, cov_weights)
    every = tuple(sorted({l for m in tried for l in m.layers}))
    stats = second_moments(model, tokenizer, None, every) if stats is None else stats
    templates = sample_templates(model, tokenizer, seed) if templates is None else templates
    targets: dict[Method, Targets | None] = {}
    settings = []
    for i, m in enumerate(tried):
        alike = dataclasses.replace(m, solver=tried[0].solver)
        if alike not in targets:
            later = isinstance(m.targets, PerLayer)
            targets[alike] = None if later else find_targets(model, tokenizer, requests, m, None, templates)
        edited = apply_edits(model, tokenizer, requests, m, None, stats, targets[alike], templates).model
        report = evaluate(model, edited, tokenizer, requests)
        settings.append(Setting(m, i == 0, objective(report), report.specificity["kl"], report.edited))
        if on_progress is not None:
            on_progress("settings", i + 1, len(tried))
    return Tuning(tuple(settings))


def candidates(
    method: str | Method, config: ModelConfig, layers: Sequence[int] | None, lrs=LRS, cov_weights=COV_WEIGHTS
) -> tuple[Method, ...]:
    """What `tune` tries: the default first, then the grid at `layers`, each method once."""
    general = isinstance(method, str) and preset_name(config) is None
    default, base = resolve(method, config, layers if general else None), resolve(method, config, layers)
    if not hasattr(base.solver, "cov_weight"):
        raise JaxEditError(f"{base.name} is solved by {type(base.solver).__name__}, which has no cov_weight to tune")
    grid = (
        dataclasses.replace(
            base,
            anchor=dataclasses.replace(base.anchor, lr=lr),
            solver=dataclasses.replace(base.solver, cov_weight=weight),
        )
        for lr in lrs
        for weight in cov_weights
    )
    return tuple(dict.fromkeys([default, *grid]))


def write_preset(path, model: Decoder, method: Method, validation: Mapping[str, Any] | None = None) -> Path:
    """Keep a method and the shape and fingerprint of the model it is for as JSON, whole or not at all.

    validation: what is known about it, as plain data, such as `Tuning.to_dict`.
    """
    about = _shape(model) | {"fingerprint": whole_fingerprint(model.params, model.config)}
    content = {"format": FORMAT, "model": about, "method": describe(method), "validation": validation}
    write_json(Path(path), content)
    return Path(path)


def read_preset(path, model: Decoder | None = None) -> Method:
    """The method that `write_preset` wrote.

    model: if given, its family and shape must be those that the preset was made for; its weights may be others, as
        those of a fine-tuned version are.

    Raises JaxEditError naming the field where the file is not such a preset, has fields that are not known, or values
    that a method does not take, and where the preset is for a model of another shape.
    """
    try:
        content = json.loads(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise JaxEditError(f"there is no preset at {path}") from None
    except (OSError, ValueError) as error:
        raise JaxEditError(f"{path} is not a preset: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise JaxEditError(f"{path} is not a preset: its format is not {FORMAT!r}")
    try:
        refuse_unknown("preset", content, {"format", "model", "method", "validation"})
        if model is not None:
            made_for = {name: content["model"][name] for name in _shape(model)}
            if made_for != _shape(model):
                raise JaxEditError(f"it was made for a model of shape {made_for}; this one has {_shape(model)}")
        return method_from_plain(content["method"])
    except (KeyError, TypeError, AttributeError) as error:
        raise JaxEditError(f"{path}: not a complete preset: {type(error).__name__}: {error}") from None
    except JaxEditError as error:
        raise JaxEditError(f"{path}: {error}") from None


def _shape(model: Decoder) -> dict[str, Any]:
    return {name: getattr(model.config, name) for name in ("family", "n_layer", "d_model", "d_ff")}
