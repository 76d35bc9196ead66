"""The rows of many edits as arrays, and where things lie in them: what the anchor optimiser is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.data.tokens import EditTokens, Row, round_up

Array = Any  # NumPy's on the host, JAX's within a program


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of n edits: the prompt and target in each context, and last the row of the KL term.

    tokens: ``[n, rows, longest]``; lengths, lookups: ``[n, rows]`` tokens of a row, and the index of its decisive
    token; starts: ``[n, rows]`` the position of its first token. targets: ``[n, most]``, `n_target` of them. real:
    False where there is no edit. forget: ``[n]``, or None where no edit is to make the model forget its target.
    """

    tokens: Array
    lengths: Array
    lookups: Array
    starts: Array
    targets: Array
    n_target: Array
    real: Array
    forget: Array | None = None


def rows_of(edit: EditTokens) -> tuple[Row, ...]:
    """All rows of an edit; of the KL term's nothing is read after the decisive token."""
    last = edit.essence
    return (*edit.contexts, dataclasses.replace(last, tokens=last.tokens[: last.lookup + 1]))


def suffix_tokens(edit: EditTokens) -> int:
    """Tokens of one edit that depend on δ: from the decisive token on in each context, and one of the KL row."""
    return sum(len(r.tokens) - r.lookup for r in edit.contexts) + 1


def n_asks(edit: EditTokens) -> int:
    """Target tokens that are predicted: each one in each context."""
    return len(edit.target) * len(edit.contexts)


def buckets(sizes: Sequence[int], growth: float, tokens: int) -> list[list[int]]:
    """Group edits by suffix size, largest first: what is optimised by one program.

    The largest of a bucket is at most about `growth` · the smallest, so that the room that an edit leaves is not
    much too large for the next one; edits that fit into one step of `tokens` stay together whatever their sizes.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    groups: list[list[int]] = []
    held = 0
    for i in order:
        if not groups or (held + sizes[i] > tokens and sizes[groups[-1][0]] > growth * sizes[i] + 4):
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += sizes[i]
    return groups


class Shape(NamedTuple):
    """The largest edit of a bucket in each respect, so that one compiled program serves them all.

    rows: of an edit; longest, prefix, tail: tokens of a row, before the decisive token, and from it on. packed,
    before, suffix: the same three summed over the rows of an edit. asks: target tokens predicted; targets: of them
    in one row.
    """

    rows: int
    longest: int
    prefix: int
    tail: int
    packed: int
    before: int
    suffix: int
    asks: int
    targets: int


def shape_of(edits: Sequence[EditTokens]) -> Shape:
    every = [rows_of(e) for e in edits]
    rows = [r for each in every for r in each]
    return Shape(
        rows=len(every[0]),
        longest=round_up(max(len(r.tokens) for r in rows), 8),
        prefix=round_up(max(r.lookup for r in rows) or 1, 8),
        tail=round_up(max(len(r.tokens) - r.lookup for r in rows), 4),
        packed=max(sum(len(r.tokens) for r in each) for each in every),
        before=max(sum(r.lookup for r in each) for each in every),
        suffix=max(map(suffix_tokens, edits)),
        asks=max(map(n_asks, edits)),
        targets=max(len(e.target) for e in edits),
    )


def make_plan(edits: Sequence[EditTokens], shape: Shape, n: int, left_padded: bool = False) -> Plan:
    """The plan of `edits`, filled up to `n` with edits that are done from the start.

    left_padded: positions as if all rows of an edit were padded on the left to the longest of them.
    """
    tokens = np.zeros((n, shape.rows, shape.longest), np.int32)
    lengths, lookups, starts = (np.zeros((n, shape.rows), np.int32) for _ in range(3))
    targets, n_target = np.zeros((n, shape.targets), np.int32), np.zeros(n, np.int32)
    for i, edit in enumerate(edits):
        for j, row in enumerate(rows_of(edit)):
            tokens[i, j, : len(row.tokens)] = row.tokens
            lengths[i, j], lookups[i, j] = len(row.tokens), row.lookup
        if left_padded:
            whole = [len(r.tokens) for r in (*edit.contexts, edit.essence)]
            starts[i] = max(whole) - np.asarray(whole)
        targets[i, : len(edit.target)], n_target[i] = edit.target, len(edit.target)
    forget = np.zeros(n, bool)
    forget[: len(edits)] = [e.goal == "forget" for e in edits]
    real = np.arange(n) < len(edits)
    return Plan(tokens, lengths, lookups, starts, targets, n_target, real, forget if forget.any() else None)


class Places(NamedTuple):
    """Items of several owners end to end in one array of a fixed length.

    owner, index: ``[length]`` whose item a place holds, and which of its items; in range, but without meaning, where
    the place is not `used`. slots: ``[owners, most]`` the place of each item, and back: ``[length]`` the flat index
    into `slots` of each place; both out of range, each in its own way, where there is none.
    """

    owner: jax.Array
    index: jax.Array
    used: jax.Array
    slots: jax.Array
    back: jax.Array


def places(counts: jax.Array, length: int, most: int) -> Places:
    """Where items stand: ``counts[i]``, at most `most`, of owner i; together at most `length`. May be traced."""
    owners = len(counts)
    ends = jnp.cumsum(counts)
    starts = ends - counts
    place, item = jnp.arange(length), jnp.arange(most)
    owner = jnp.minimum(jnp.searchsorted(ends, place, side="right"), owners - 1)
    index, used = place - starts[owner], place < ends[-1]
    none = length + jnp.arange(owners * most).reshape(owners, most)
    slots = jnp.where(item < counts[:, None], starts[:, None] + item, none)
    back = jnp.where(used, owner * most + index, owners * most + place)
    return Places(owner, jnp.minimum(index, most - 1), used, slots, back)
