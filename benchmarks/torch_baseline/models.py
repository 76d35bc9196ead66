"""Models from transformers: loading, random weights of real shapes, where their parts are, and passes with hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from shapes import SHAPES
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from jaxedit.data.tokens import Row

_BLOCKS = ("h", "layers")
_DOWN = ("c_proj", "fc_out", "down_proj", "dense_4h_to_h")


def load(directory, dtype="float32", device="cpu"):
    """``(model, tokenizer)`` from a Hugging Face directory, for inference only (no weight takes a gradient)."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=_dtype(dtype))
    return _frozen(model.to(device)), AutoTokenizer.from_pretrained(directory)


def random_model(config: str | Mapping[str, Any], dtype="float32", device="cpu"):
    """A model with random weights, made on its device: a name in `shapes.SHAPES`, or the fields of a config.json."""
    fields = dict(SHAPES[config] if isinstance(config, str) else config)
    made = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(made, dtype=_dtype(dtype))
    return _frozen(model)


def _dtype(name) -> torch.dtype:
    return getattr(torch, str(name).removeprefix("torch."))


def _frozen(model: Any):
    return model.eval().requires_grad_(False)


def blocks(model) -> nn.ModuleList:
    """The decoder blocks, from the bottom up."""
    return _one(model.base_model, _BLOCKS)


def down(model, layer: int) -> Any:
    """The MLP's second projection, whose input is the key."""
    block: Any = blocks(model)[layer]
    return _one(block.mlp, _DOWN)


def _one(module: nn.Module, names: Sequence[str]) -> Any:
    found = [getattr(module, name) for name in names if hasattr(module, name)]
    if len(found) != 1:
        raise ValueError(f"{type(module).__name__} has none of {names}: this architecture is not supported")
    return found[0]


def matrix(model, layer: int) -> Tensor:
    """The weight that is edited as a view ``[d_ff, d_model]``, however the model stores it."""
    module = down(model, layer)
    return module.weight if isinstance(module, Conv1D) else module.weight.T


def wide(dtype: torch.dtype) -> torch.dtype:
    """What δ, losses and statistics are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Stop(Exception):
    """Ends a pass early."""


# A module, which side of it ("input" or "output"), and what is done with the hidden states there.
Tap = tuple[nn.Module, str, Callable[[Tensor], None]]


def run(model, tokens: Tensor, taps: Sequence[Tap] = ()) -> Tensor:
    """Hidden states ``[n, t, d_model]`` after the final norm of right-padded rows ``[n, t]``.

    Attention is causal and padding stands on the right, so no real token sees it and no mask is needed; without
    one the fused kernels can be used. A tap may change its hidden states in place.
    """
    hooks = [_hook(*tap, last=False) for tap in taps]
    try:
        return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()


def run_until_last(model, tokens: Tensor, taps: Sequence[Tap]) -> None:
    """`run` no further than the last tap, which must be the highest one."""
    hooks = [_hook(*tap, last=i == len(taps) - 1) for i, tap in enumerate(taps)]
    try:
        model.base_model(input_ids=tokens, use_cache=False)
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def _hook(module: nn.Module, side: str, function: Callable[[Tensor], None], last: bool):
    def hook(module, inputs, output: Any = None):
        states = inputs if side == "input" else output
        function(states[0] if isinstance(states, tuple) else states)
        if last:
            raise _Stop

    return module.register_forward_pre_hook(hook) if side == "input" else module.register_forward_hook(hook)


def logits_at(model, hidden: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Logits ``[q, vocab]`` at chosen positions, float32 (float64 for a float64 model)."""
    logits = model.get_output_embeddings()(hidden[rows, columns])
    return logits.to(wide(logits.dtype))


def pad(rows: Sequence[Sequence[int] | np.ndarray], device) -> Tensor:
    """Token rows as one right-padded tensor ``[n, t]``."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return torch.from_numpy(tokens).to(device)


@torch.no_grad()
def states_at_lookup(model: Any, rows: Sequence[Row], module: nn.Module, side: str, batch: int = 128) -> Tensor:
    """What goes into or comes out of a module at the decisive token of each row, ``[n, width]``.

    Rows go through the model `batch` at a time as they come, as published, and no further than the module.
    """
    found: list[Tensor] = []
    for at in range(0, len(rows), batch):
        some = rows[at : at + batch]
        index = torch.arange(len(some), device=model.device)
        lookup = torch.tensor([r.lookup for r in some], device=model.device)

        def keep(states, index=index, lookup=lookup):
            found.append(states[index, lookup])

        run_until_last(model, pad([r.tokens for r in some], model.device), [(module, side, keep)])
    return torch.cat(found)
