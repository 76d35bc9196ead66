"""The whole study of backward spreading and forward replay on one model and one set of edits, in one call: Tables 1, 2
and 5 and Figure 3 of Liu et al. 2026 (see `jaxedit.analysis.spreading`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from jaxedit.analysis.jacobian import stretch
from jaxedit.analysis.spreading import SCALES, Premises, StepSizes, Walk, premises, step_sizes, walk
from jaxedit.config import BackwardSpread, Method, PerLayer
from jaxedit.data.templates import sample_templates
from jaxedit.edit import EditResult, apply_edits, find_targets
from jaxedit.errors import JaxEditError
from jaxedit.layer_loop import Progress
from jaxedit.models.transformer import Decoder
from jaxedit.plain import finite
from jaxedit.presets import resolve
from jaxedit.statistics import SecondMoments, second_moments
from jaxedit.targets.strategies import Targets
from jaxedit.types import EditRequest

METHODS = ("memit", "memit_no_divide", "one_layer", "fe")


@dataclasses.dataclass(frozen=True)
class Spread:
    """walks, targets: by method, what each layer's edit did, and what it was aimed at. studied: the first method that
    spreads a residual over several layers, whose edit the rest is of; None, and the rest empty, where there is none.
    premises: of the two theorems at its layers below the last. steps: for each of these, steering by parts of its
    residual on the unedited model. below: what remains at its last layer when only the uppermost 1, 2, … layers are
    edited, mean over the edits."""

    layers: tuple[int, ...]
    walks: dict[str, Walk]
    studied: str | None
    premises: Premises | None
    steps: tuple[StepSizes, ...]
    below: dict[tuple[int, ...], float]
    targets: dict[str, Targets]

    def to_dict(self) -> dict[str, Any]:
        """Means over the edits, as plain data for JSON; None for what is not a number."""
        steps = [
            {
                "layer": s.layer,
                "scales": list(s.scales),
                "size": float(s.size.mean()),
                **{name: [float(v) for v in getattr(s, name).mean(1)] for name in ("error", "remaining", "cosine")},
                "radius": float(s.radius().mean()),
            }
            for s in self.steps
        ]
        return finite(
            {
                "layers": list(self.layers),
                "edits": len(next(iter(self.walks.values())).residual[0]),
                "walks": {name: w.to_dict() for name, w in self.walks.items()},
                "studied": self.studied,
                "premises": None if self.premises is None else self.premises.to_dict(),
                "steps": steps,
                "below": [{"layers": list(layers), "remaining": x} for layers, x in self.below.items()],
            }
        )

    def table(self) -> str:
        """Tables 1, 2 and 5, the theorems' premises and the radii as aligned text."""
        names = [f"layer {l}" for l in self.layers]
        blocks = [
            ("cosine of a layer's change and what it becomes at the last one", "cosine"),
            ("cosine of that and the residual left before it", "aim"),
            ("residual that remains at the last layer, in parts of what it was", "remaining"),
        ]
        text = []
        for title, name in blocks:
            rows = [(method, self._by_layer(w, name)) for method, w in self.walks.items()]
            text.append(_block(title, names, rows))
        if self.premises is not None:
            p = self.premises
            rows = [
                ("J δ and δ: cosine", p.cosine.mean(1)),
                ("  Rayleigh quotient", p.rayleigh.mean(1)),
                ("  misfit to an eigenvector", p.misfit.mean(1)),
                ("  misfit, random directions", p.random_misfit.mean(1)),
                ("  closest eigenvector, cosine", p.eigenvector_cosine.mean(1)),
                ("(J + Jᵀ)/2: smallest eigenvalue", p.smallest.mean(1)),
                ("  positive definite, share", p.definite.mean(1)),
                ("  random v, positive, share", (p.random_cosine > 0).mean((1, 2))),
                ("measured cosine positive, share", (p.measured > 0).mean(1)),
                ("  although not definite", p.counterexamples.mean(1)),
                ("linear within 10 % up to ‖δ‖/‖h‖", np.asarray([s.radius().mean() for s in self.steps])),
            ]
            title = f"premises of the theorems, edits of {self.studied}"
            text.append(_block(title, names[:-1], [(n, [float(v) for v in x]) for n, x in rows]))
        if self.below:
            rows = [(_span(layers), [x]) for layers, x in self.below.items()]
            text.append(_block(f"{self.studied} with fewer layers below the last", ["remaining"], rows))
        return "\n\n".join(text)

    def _by_layer(self, of: Walk, name: str) -> list[float | None]:
        found = dict(zip(of.layers, np.nanmean(getattr(of, name), 1), strict=True))
        return [float(found[l]) if l in found else None for l in self.layers]


def _span(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _block(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    width = max(len(name) for name, _ in rows)
    lines = [title, " " * width + "".join(f"{c:>11}" for c in columns)]
    for name, values in rows:
        lines.append(f"{name:<{width}}" + "".join(f"{'-':>11}" if v is None else f"{v:>11.3f}" for v in values))
    return "\n".join(line.rstrip() for line in lines)


def spread(
    model: Decoder,
    tokenizer,
    requests: Sequence[EditRequest],
    methods: Sequence[str | Method] = METHODS,
    layers: Sequence[int] | None = None,
    stats: SecondMoments | None = None,
    templates=None,
    *,
    directions: int = 32,
    scales: Sequence[float] = SCALES,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Spread:
    """Edit `model` with each method and follow the edits layer by layer.

    layers, stats, templates, seed: as in `apply_edits`. Anchors are found once for all methods that have the same.
    directions: random ones a prompt for the theorems. scales: of the steps.

    Raises what `apply_edits` raises, and JaxEditError for methods whose anchors are found as they edit (ROME, BLUE),
    which have no target at the last layer before they begin.
    """
    names = [m if isinstance(m, str) else m.name for m in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        raise JaxEditError(f"methods named {', '.join(twice)} twice" if twice else "there are no methods to study")
    chosen = {name: resolve(m, model.config, layers) for name, m in zip(names, methods, strict=True)}
    late = [n for n, m in chosen.items() if m.at_once is not None or isinstance(m.targets, PerLayer)]
    if late:
        raise JaxEditError(f"{', '.join(late)}: anchors are found on the model as edited so far, and nothing is spread")
    every = tuple(sorted({l for m in chosen.values() for l in m.layers}))
    templates = sample_templates(model, tokenizer, seed) if templates is None else templates
    if stats is None:
        report = None if on_progress is None else partial(on_progress, "statistics")
        stats = second_moments(model, tokenizer, None, every, on_progress=report)
    found: dict[tuple, Targets] = {}
    results: dict[str, EditResult] = {}
    for name, method in chosen.items():
        like = _anchors_of(method)
        if like not in found:
            found[like] = find_targets(model, tokenizer, requests, method, templates=templates, on_progress=on_progress)
        results[name] = apply_edits(
            *(model, tokenizer, requests, method),
            stats=stats,
            targets=found[like],
            templates=templates,
            on_progress=on_progress,
        )
    aims = {name: found[_anchors_of(method)] for name, method in chosen.items()}
    walks = {name: walk(model, tokenizer, requests, result) for name, result in results.items()}
    spreads = [n for n, m in chosen.items() if isinstance(m.targets, BackwardSpread) and len(m.layers) > 1]
    if not spreads:
        return Spread(every, walks, None, None, (), {}, aims)
    studied = spreads[0]
    method, result = chosen[studied], results[studied]
    first = walks[studied]
    asked = premises(model, tokenizer, requests, result, directions=directions, seed=seed, followed=first)
    steps = tuple(
        step_sizes(
            stretch(model, tokenizer, requests, l, method.layers[-1], site=first.site),
            first.residual[0],
            l,
            scales=scales,
        )
        for l in method.layers[:-1]
    )
    below = {method.layers: float(np.nanmean(first.remaining[-1]))}
    for i in range(1, len(method.layers)):
        fewer = dataclasses.replace(method, layers=method.layers[i:])
        result = apply_edits(
            model, tokenizer, requests, fewer, stats=stats, targets=found[_anchors_of(method)], templates=templates
        )
        below[fewer.layers] = float(result.info.layers[-1].residual_after)
    return Spread(every, walks, studied, asked, steps, dict(reversed(below.items())), aims)


def _anchors_of(method: Method) -> tuple:
    """What its anchors and targets depend on."""
    backward = isinstance(method.targets, BackwardSpread)
    kind = BackwardSpread if backward else type(method.targets)
    return kind, method.layers[-1:] if backward else method.layers, method.anchor, method.keys
