"""Where things stand in the packed rows of many edits: what the anchor optimiser's arrays are indexed with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxedit.data.tokens import EditTokens, Packed, pack, round_up

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where things stand in the packed rows of n edits; the leading axis of every field is the edit.

    suffix, prefix: indices into the packed row, -1 where there is none. asks: indices into the suffix at which a
    target token `answers` is predicted, with `weights` that make the sum over asks the published mean. essence:
    index into the suffix of the KL row's decisive token.
    """

    tokens: Array
    positions: Array
    segments: Array
    suffix: Array
    prefix: Array
    is_lookup: Array
    asks: Array
    answers: Array
    weights: Array
    essence: Array
    real: Array


def suffix_tokens(edit: EditTokens) -> int:
    """Tokens of one edit that depend on δ: from the decisive token on in each context, and one of the KL row."""
    return sum(len(r.tokens) - r.lookup for r in edit.contexts) + 1


def buckets(sizes: Sequence[int], growth: float) -> list[tuple[list[int], int]]:
    """Group edits by suffix size: ``(members, largest size)``. The largest is at most about `growth` · the smallest."""
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    groups: list[list[int]] = []
    for i in order:
        if not groups or sizes[i] > growth * sizes[groups[-1][0]] + 4:
            groups.append([])
        groups[-1].append(i)
    return [(sorted(g), max(sizes[i] for i in g)) for g in groups]


class Shape(NamedTuple):
    """Sizes that all rounds of a bucket share, so that one compiled loop serves them."""

    packed: int
    prefix: int
    suffix: int
    asks: int


def shape_of(edits: Sequence[EditTokens], suffix: int) -> Shape:
    rows = [(*e.contexts, e.essence) for e in edits]
    return Shape(
        packed=round_up(max(sum(len(r.tokens) for r in each) for each in rows), 16),
        prefix=round_up(max(sum(r.lookup for r in each) for each in rows) or 1, 16),
        suffix=suffix,
        asks=max(len(e.target) for e in edits) * len(edits[0].contexts),
    )


def make_plan(edits: Sequence[EditTokens], shape: Shape, n: int) -> Plan:
    """The plan of `edits`, filled up to `n` with edits that are done from the start."""
    rows: Packed = pack([(*e.contexts, e.essence) for e in edits], multiple=shape.packed)
    n_context, size, n_prefix, n_asks = len(edits[0].contexts), shape.suffix, shape.prefix, shape.asks
    suffix, prefix = np.full((n, size), -1, np.int32), np.full((n, n_prefix), -1, np.int32)
    asks, answers = np.zeros((n, n_asks), np.int32), np.zeros((n, n_asks), np.int32)
    weights, essence = np.zeros((n, n_asks), np.float64), np.zeros(n, np.int32)
    for i, edit in enumerate(edits):
        s = p = a = 0
        begin = rows.lookup[i] - [r.lookup for r in (*edit.contexts, edit.essence)]
        for j, row in enumerate(edit.contexts):
            tail = len(row.tokens) - row.lookup
            suffix[i, s : s + tail] = rows.lookup[i, j] + np.arange(tail)
            prefix[i, p : p + row.lookup] = begin[j] + np.arange(row.lookup)
            s, p, t = s + tail, p + row.lookup, len(edit.target)
            asks[i, a : a + t] = s - t + np.arange(t)
            answers[i, a : a + t] = edit.target
            weights[i, a : a + t] = 1 / (t * n_context)
            a += t
        suffix[i, s], essence[i] = rows.lookup[i, -1], s
        prefix[i, p : p + edit.essence.lookup] = begin[-1] + np.arange(edit.essence.lookup)
    spare = n - len(edits)

    def padded(x):
        return np.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1))

    is_lookup = (suffix[:, :, None] == padded(rows.lookup)[:, None, :]).any(-1) & (suffix >= 0)
    return Plan(
        tokens=padded(rows.tokens),
        positions=padded(rows.positions),
        segments=padded(rows.segments),
        suffix=suffix,
        prefix=prefix,
        is_lookup=is_lookup,
        asks=asks,
        answers=answers,
        weights=weights,
        essence=essence,
        real=np.arange(n) < len(edits),
    )
