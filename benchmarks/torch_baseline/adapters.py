"""iReVa and GRACE, one edit at a time (Zhu et al. 2024; Hartvigsen et al. 2023), on transformers' Llama models.

The published order and arithmetic, but nothing is computed twice that an edit does not change: prefixes of a target
share a pass, passes end at the layer that is edited, and a training step runs only the layers above it, for iReVa only
at the token that its neuron answers, on attention keys and values of earlier tokens that were computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jaxedit.data.tokens import EditTokens

from .models import blocks, down, pad, run_until_last


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-8)


@torch.no_grad()
def ireva(model, edits: Sequence[EditTokens], layer: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Keys and values ``[neurons, d_model]`` without training; as published `batch` is 1."""
    keys: list[Tensor] = []
    table = model.get_output_embeddings().weight
    for at in range(0, len(edits), batch):
        some, found = edits[at : at + batch], []
        rows = [e.contexts[0].tokens for e in some]
        run_until_last(model, pad(rows, model.device), [(blocks(model)[layer].mlp, "input", found.append)])
        keys += [
            standardised(x[len(row) - len(e.target) : len(row)]) for x, row, e in zip(found[0], rows, some, strict=True)
        ]
    return torch.cat(keys), table[[t for e in edits for t in e.target]].clone()


def retrofit(model, edits: Sequence[EditTokens], layer: int, scope, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`ireva`, then each neuron trained by itself, earlier ones frozen but taking part ("+L").

    scope: texts and numbers of other edits as in `jaxedit.adapters.ireva_retrofit.OutOfScope`. settings: alpha, theta,
    rec_weight, irr_weight, steps, lr, betas and weight_decay of `jaxedit.adapters.ireva.IReVa`.
    """
    clean, table = ireva(model, edits, layer)
    alpha, theta, act = settings["alpha"], settings["theta"], blocks(model)[layer].mlp.act_fn
    optimiser = {name: settings[name] for name in ("lr", "betas", "weight_decay")}
    biases = theta * (clean * clean).sum(-1)
    keys, values, n = torch.empty_like(clean), torch.empty_like(table), 0
    firsts = np.cumsum([0, *(len(e.target) for e in edits)])
    for edit, texts, others in zip(edits, *scope, strict=True):
        row = edit.contexts[0].tokens
        kept = Kept()
        with torch.no_grad():
            stands, entry = _pass(model, row, layer)
            run_above(model, stands, layer + 1, cache=kept)
            away = torch.cat([_entries(model, texts, layer), clean[firsts[others]]])
        for i, answer in enumerate(edit.target):
            at = len(row) - len(edit.target) + i
            s, cache, answers = standardised(entry[0, at]), Kept(kept, at), torch.tensor([answer])
            k0, b = clean[n], biases[n]
            base = stands[0, at] + alpha * act(keys[:n] @ s - biases[:n]) @ values[:n]
            k, v = (x.clone().requires_grad_() for x in (k0, table[n]))
            adam = torch.optim.AdamW([k, v], eps=1e-8, **optimiser)
            for _ in range(settings["steps"]):
                h = (base + alpha * act(k @ s - b) * v)[None, None]
                logits = model.get_output_embeddings()(run_above(model, h, layer + 1, at, cache)[0])
                loss = torch.nn.functional.cross_entropy(logits, answers)
                loss = loss + settings["rec_weight"] * (k0 @ (k - k0)) ** 2
                loss = loss + settings["irr_weight"] * (away @ k - b).clamp(min=0).mean()
                adam.zero_grad()
                loss.backward()
                adam.step()
            keys[n], values[n], n = k.detach(), v.detach(), n + 1
    return keys, values


def grace(model, edits: Sequence[EditTokens], layer: int, cold: np.ndarray, settings: dict[str, Any]):
    """A codebook at the MLP's second projection that changes the prompt's tokens but its last one.

    cold ``[n, d_model]``: what the values of new rows begin with. settings: radius, steps and lr of
    `jaxedit.adapters.grace.Grace`. Returns keys, values and radii of the rows, and losses ``[n, steps]``.
    """
    keys, values, radii, labels = [], [], [], []
    losses = np.zeros((len(edits), settings["steps"]))
    for i, edit in enumerate(edits):
        row, n = edit.contexts[0].tokens, len(edit.target)
        end, queries = len(row) - n, []
        with torch.no_grad():
            stands, out = _pass(model, row, layer, (down(model, layer), "input", queries.append), side="output")
            stream, query = stands - out, queries[0][0, end]
        at = _place(query, edit.target, keys, radii, labels, settings["radius"])
        fresh = at == len(values)
        value = (torch.tensor(cold[i], dtype=out.dtype) if fresh else values[at]).requires_grad_()
        adam = torch.optim.Adam([value], lr=settings["lr"])
        before = torch.arange(len(row))[None, :, None] < end
        targets = torch.tensor(edit.target)
        for step in range(settings["steps"]):
            h = run_above(model, stream + torch.where(before, value, out), layer + 1)
            logits = model.get_output_embeddings()(h[0, end:])
            loss = torch.nn.functional.cross_entropy(logits, targets)
            losses[i, step] = loss.item()
            adam.zero_grad()
            loss.backward()
            adam.step()
        values[at:] = [value.detach(), *values[at + 1 :]]
    return torch.stack(keys), torch.stack(values), torch.tensor(radii, dtype=torch.float64), losses


def _place(query: Tensor, label, keys: list, radii: list, labels: list, radius: float) -> int:
    """The row of an edit, with the balls as published: a new one, two halves of what lies between, or the same one."""
    size = radius
    if keys:
        distances = torch.linalg.vector_norm(torch.stack(keys) - query, dim=-1)
        at = int(distances.argmin())
        away = float(distances[at])
        if away <= radius + radii[at]:
            if labels[at] == label:
                radii[at] = max(radii[at], away)
                return at
            radii[at], size = away / 2 - 1e-5, away / 2
    keys.append(query)
    radii.append(size)
    labels.append(label)
    return len(keys) - 1


class Kept:
    """Attention keys and values by layer: those of a first pass, or of its first tokens with a step's own."""

    def __init__(self, earlier: Kept | None = None, length: int = 0):
        self.held = {} if earlier is None else {l: [x[:, :, :length] for x in kv] for l, kv in earlier.held.items()}
        self.first = earlier is None

    def update(self, k: Tensor, v: Tensor, layer: int, *_):
        if self.first:
            self.held[layer] = [k, v]
            return k, v
        return tuple(torch.cat([old, new], 2) for old, new in zip(self.held[layer], (k, v), strict=True))


def run_above(model, h: Tensor, first: int, start: int = 0, cache: Kept | None = None) -> Tensor:
    """Layers from `first` on and the final norm, of ``h [1, t, d_model]`` at places from `start` on."""
    base = model.base_model
    angles = base.rotary_emb(h, position_ids=start + torch.arange(h.shape[1])[None])
    for block in base.layers[first:]:
        h = block(h, position_embeddings=angles, past_key_values=cache)
    return base.norm(h)


def _pass(model, row, layer: int, *taps, side: str = "input") -> tuple[Tensor, Tensor]:
    """A block's output and its MLP's input or output, ``[1, t, d_model]``."""
    found: list[Tensor] = []
    block: Any = blocks(model)[layer]
    more = [(block.mlp, side, found.append), (block, "output", found.append)]
    run_until_last(model, pad([row], model.device), [*taps, *more])
    return found[1], found[0]


def _entries(model, texts, layer: int) -> Tensor:
    """Standardised MLP inputs of every token of some texts."""
    found: list[Tensor] = []
    run_until_last(model, pad(texts, model.device), [(blocks(model)[layer].mlp, "input", found.append)])
    return torch.cat([standardised(x[: len(t)]) for x, t in zip(found[0], texts, strict=True)])
