"""The matrix products of an anchor step and nothing else: what a step would cost if all the rest were free.

Each weight is read from memory as in a real step: there are as many different ones as there are layers, or as fit
in `_ENOUGH` bytes, which no cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from flops import Product
from harness import measure
from records import Timing

_ENOUGH = 600_000_000


def _distinct(products: Sequence[Product], itemsize: int) -> list[int]:
    """Which weight each product uses: equal shapes share weights only once all of them hold `_ENOUGH` bytes."""
    used: dict[tuple[int, int], list[int]] = {}
    turn: dict[tuple[int, int], int] = {}
    held, made, found = 0, 0, []
    for p in products:
        shape = (p.into, p.out)
        mine = used.setdefault(shape, [])
        if not mine or held < _ENOUGH:
            mine.append(made)
            found.append(made)
            made, held = made + 1, held + itemsize * p.into * p.out
        else:
            turn[shape] = turn.get(shape, -1) + 1
            found.append(mine[turn[shape] % len(mine)])
    return found


def jax_seconds(products: Sequence[Product], dtype: str, repeats: int) -> Timing:
    import jax
    import jax.numpy as jnp

    which = _distinct(products, jnp.dtype(dtype).itemsize)
    shapes = dict(zip(which, ((p.into, p.out) for p in products), strict=True))
    weights = [jnp.full(shapes[i], 0.01, dtype) for i in range(len(shapes))]
    inputs = {(p.rows, p.into): jnp.ones((p.rows, p.into), dtype) for p in products}

    @jax.jit
    def run(weights, inputs):
        inputs = dict(inputs)
        for p, i in zip(products, which, strict=True):
            x = inputs[p.rows, p.into]
            y = x @ weights[i]
            more = y @ weights[i].T if p.back else y[:, :1]
            inputs[p.rows, p.into] = x + more * 1e-9  # so that nothing is left out
        return inputs

    return measure(lambda: run(weights, inputs), repeats, jax.block_until_ready)


def torch_seconds(products: Sequence[Product], dtype: str, repeats: int, device: str, wait) -> Timing:
    import torch

    kind = getattr(torch, dtype)
    which = _distinct(products, torch.empty(0, dtype=kind).element_size())
    shapes = dict(zip(which, ((p.into, p.out) for p in products), strict=True))
    weights = [torch.full(shapes[i], 0.01, dtype=kind, device=device) for i in range(len(shapes))]
    inputs = {(p.rows, p.into): torch.ones((p.rows, p.into), dtype=kind, device=device) for p in products}

    @torch.no_grad()
    def run():
        for p, i in zip(products, which, strict=True):
            y = inputs[p.rows, p.into] @ weights[i]
            if p.back:
                y @ weights[i].T

    return measure(run, repeats, wait)
