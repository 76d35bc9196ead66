"""Second moments of keys: a pass for each layer as published, and all layers in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .models import down, pad, run_until_last, wide


def per_layer(model, rows: Sequence[np.ndarray], layers: Sequence[int], batch: int) -> dict[int, Tensor]:
    """The published procedure: the text runs once for each layer, up to that layer.

    rows: token arrays ``[length]``, each a document that sees no other; batch: rows in a pass.
    Returns the mean of ``k kᵀ`` over all tokens, ``{layer: [d_ff, d_ff]}``, on the model's device.
    """
    return {l: one_pass(model, rows, [l], batch)[l] for l in layers}


@torch.no_grad()
def one_pass(model, rows: Sequence[np.ndarray], layers: Sequence[int], batch: int) -> dict[int, Tensor]:
    """The same for all layers in one pass, which ends at the keys of the last of them."""
    width = down(model, layers[0]).weight.numel() // model.config.hidden_size
    sums = {l: torch.zeros((width, width), dtype=wide(model.dtype), device=model.device) for l in layers}
    for tokens, real in _batches(rows, batch, model.device):

        def add(keys: Tensor, total: Tensor, real=real):
            _add_gram(total, keys.flatten(0, 1) if real is None else keys[real])

        taps = [(down(model, l), "input", lambda keys, l=l, add=add: add(keys, sums[l])) for l in sorted(layers)]
        run_until_last(model, tokens, taps)
    count = sum(map(len, rows))
    return {l: total.div_(count) for l, total in sums.items()}


def _add_gram(total: Tensor, keys: Tensor):
    """Add ``keysᵀ keys``, summed in the dtype of `total`."""
    if keys.dtype == total.dtype:
        total.addmm_(keys.T, keys)
    elif keys.is_cuda:
        total += torch.mm(keys.T, keys, out_dtype=total.dtype)  # products of bfloat16 are exact in float32
    else:
        keys = keys.to(total.dtype)
        total.addmm_(keys.T, keys)


def _batches(rows: Sequence[np.ndarray], batch: int, device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Right-padded batches, longest rows first so that little is padding, and which tokens are real (None: all)."""
    order = sorted(rows, key=len, reverse=True)
    for at in range(0, len(order), batch):
        some = order[at : at + batch]
        tokens, lengths = pad(some, device), torch.tensor([len(r) for r in some], device=device)
        full = len(some[0]) == len(some[-1])
        yield tokens, None if full else torch.arange(tokens.shape[1], device=device) < lengths[:, None]
