"""Anchors, one edit at a time (Meng et al. 2023, ``compute_z``; the same loss as `jaxedit.targets.anchor`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from jaxedit.config import AnchorConfig
from jaxedit.data.tokens import EditTokens, check_templates, edit_tokens
from jaxedit.types import EditRequest

from .models import blocks, logits_at, pad, run, wide


class Anchor(NamedTuple):
    """The anchor of one edit at one layer.

    value, init: ``[d_model]`` on the model's device, the anchor and the unedited hidden state; losses:
    ``[updates + 1, 4]`` total, nll, weighted KL and weighted decay before each update and at the end; updates:
    Adam updates made.
    """

    value: Tensor
    init: Tensor
    losses: np.ndarray
    updates: int


def find_anchor(model, tokenizer, request: EditRequest, layer: int, settings: AnchorConfig, templates) -> Anchor:
    """Optimise the anchor of one request. templates: context templates, "{}" first, as for `jaxedit.apply_edits`."""
    return optimise(model, edit_tokens(tokenizer, request, check_templates(templates)), layer, settings)


def optimise(model, edit: EditTokens, layer: int, settings: AnchorConfig) -> Anchor:
    """Optimise the anchor of one tokenised edit at the output of `layer`.

    Every step runs all rows (each context, and the KL row) through the whole model; the gradient goes back to the
    layer, where δ was added at the decisive tokens. The loss is tested before each update.
    """
    device, dtype = model.device, wide(model.dtype)
    rows = (*edit.contexts, edit.essence)
    tokens = pad([r.tokens for r in rows], device)
    index = torch.arange(len(rows), device=device)
    lookup = torch.tensor([r.lookup for r in rows], device=device)
    at_rows, at_columns, answers = (torch.tensor(x, device=device) for x in _questions(edit))
    delta = torch.zeros(model.config.hidden_size, dtype=dtype, device=device, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.lr)
    init: list[Tensor] = []
    base: list[Tensor] = []
    losses: list[Tensor] = []

    def add_delta(states: Tensor):
        if not init:
            init.append(states[0, edit.contexts[0].lookup].to(dtype, copy=True))
        states[index, lookup] += delta

    tap = (blocks(model)[layer], "output", add_delta)
    while True:
        hidden = run(model, tokens, [tap])
        log_probs = log_softmax(logits_at(model, hidden, at_rows, at_columns), -1)
        if not base:
            base.append(log_probs[-1].detach())
        # every row has the same number of target tokens, so this is the mean over rows of their means
        nll = -log_probs[:-1].gather(1, answers[:, None]).mean()
        kl = settings.kl_weight * kl_div(base[0], log_probs[-1], log_target=True, reduction="sum")
        decay = settings.weight_decay * delta.norm() / init[0].norm() ** 2
        total = nll + kl + decay
        losses.append(torch.stack([total, nll, kl, decay]).detach())
        if len(losses) == settings.steps or total.item() < settings.threshold:
            break
        adam.zero_grad()
        total.backward()
        adam.step()
        with torch.no_grad():
            delta *= (settings.clamp * init[0].norm() / delta.norm()).clamp(max=1)
    return Anchor(init[0] + delta.detach(), init[0], torch.stack(losses).cpu().numpy(), len(losses) - 1)


def _questions(edit: EditTokens) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Rows and columns at which logits are needed, the last one the KL's, and the answers at all others."""
    n, at_rows, at_columns = len(edit.target), [], []
    for i, row in enumerate(edit.contexts):
        at_rows += [i] * n
        at_columns += range(len(row.tokens) - n, len(row.tokens))
    answers = list(edit.target) * len(edit.contexts)
    return [*at_rows, len(edit.contexts)], [*at_columns, edit.essence.lookup], answers
