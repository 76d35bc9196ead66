"""A whole edit as published: anchors, then keys, residuals, solve and write in each layer from the bottom up."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from jaxedit.config import AnchorConfig
from jaxedit.data.tokens import Row, check_templates, edit_tokens, prompt_row, template_weights
from jaxedit.types import EditRequest

from . import solve
from .anchors import optimise
from .models import blocks, down, matrix, pad, run_until_last, states_at_lookup


def apply(
    model,
    tokenizer,
    requests: Sequence[EditRequest],
    method: str,
    layers: Sequence[int],
    anchor: AnchorConfig,
    cov_weight: float,
    templates,
    second_moments: Mapping[int, Any],
) -> dict[str, Any]:
    """Edit the model in place with "memit" or "fe"; `restore` takes the result and undoes it.

    Returns a dict of ``deltas``, by layer, float64 ``[d_ff, d_model]``; ``anchors``, one an edit; ``originals``;
    and ``seconds`` of anchors (optimisation), replay (FE's targets), keys (keys and current states), solve (solve and
    write) and total. On a GPU the device is waited for at the end of each stage.

    second_moments: by layer ``[d_ff, d_ff]``; put them on the model's device to leave their copy out of the time.
    """
    if method not in ("memit", "fe"):
        raise ValueError(f"method must be 'memit' or 'fe', got {method!r}")
    clock = _Clock(model.device)
    originals = {l: down(model, l).weight.clone() for l in layers}
    with clock("anchors"):
        groups = check_templates(templates)
        edits = [edit_tokens(tokenizer, r, groups) for r in requests]
        anchor_layer = layers[0] if method == "fe" else layers[-1]
        anchors = [optimise(model, e, anchor_layer, anchor) for e in edits]
        values = torch.stack([a.value for a in anchors])
    clean = [prompt_row(tokenizer, r) for r in requests]
    contexts = [prompt_row(tokenizer, r, t) for r in requests for group in groups for t in group]
    weights = torch.tensor(template_weights(groups), dtype=values.dtype, device=model.device)
    targets = dict.fromkeys(layers, values)
    if method == "fe":
        with clock("replay"):
            targets = replay(model, clean, layers, values)
    deltas: dict[int, Tensor] = {}
    for i, l in enumerate(layers):
        with clock("keys"):
            keys = states_at_lookup(model, contexts, down(model, l), "input").to(values.dtype)
            keys = torch.einsum("npf,p->nf", keys.unflatten(0, (len(requests), -1)), weights)
            seen = l if method == "fe" else anchor_layer
            now = states_at_lookup(model, clean, blocks(model)[seen], "output")
            residuals = targets[l] - now.to(values.dtype)
            if method == "memit":
                residuals = residuals / (len(layers) - i)
        with clock("solve"):
            deltas[l] = solve.updates(second_moments[l], keys, residuals, cov_weight)
            matrix(model, l).copy_(matrix(model, l) + deltas[l])
    clock.seconds["total"] = sum(clock.seconds.values())
    return {"deltas": deltas, "anchors": anchors, "originals": originals, "seconds": clock.seconds}


def restore(model, result: dict[str, Any]):
    """Put back the weights that the model had before `apply`."""
    for l, weight in result["originals"].items():
        down(model, l).weight.copy_(weight)


@torch.no_grad()
def replay(model, rows: Sequence[Row], layers: Sequence[int], values: Tensor, batch: int = 128) -> dict[int, Tensor]:
    """Targets ``{layer: [n, d_model]}``: block outputs at the decisive token once the first layer's is its anchor."""
    found: dict[int, list[Tensor]] = {l: [] for l in layers}
    for at in range(0, len(rows), batch):
        some, wanted = rows[at : at + batch], values[at : at + batch]
        index = torch.arange(len(some), device=model.device)
        lookup = torch.tensor([r.lookup for r in some], device=model.device)

        def look(states: Tensor, l: int, index=index, lookup=lookup, wanted=wanted):
            if l == layers[0]:
                states[index, lookup] = wanted.to(states.dtype)
            found[l].append(states[index, lookup].to(values.dtype))

        taps = [(blocks(model)[l], "output", lambda states, l=l, look=look: look(states, l)) for l in layers]
        run_until_last(model, pad([r.tokens for r in some], model.device), taps)
    return {l: torch.cat(parts) if l != layers[0] else values for l, parts in found.items()}


class _Clock:
    """Seconds by stage, of the device's work too."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._cuda = device.type == "cuda"

    @contextmanager
    def __call__(self, stage: str):
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def _wait(self):
        if self._cuda:
            torch.cuda.synchronize()
