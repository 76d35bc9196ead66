"""GRACE's codebook on the host: where new balls go, and what becomes of them when edits are withdrawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.adapters.codebook import Distances, room, widened

CASES = ("new", "split", "covered", "inside", "overwritten")
GAP = 1e-5  # between two balls after a split
SAME = 1e-4  # keys nearer than this are one key
SLACK = 1e-3  # of a distance that a ball is widened to, so that rounding leaves its query inside


@dataclasses.dataclass
class Book:
    """The codebook on the host, to be changed in place. Fields as in `jaxedit.adapters.grace.GraceState`."""

    keys: np.ndarray
    values: np.ndarray
    radii: np.ndarray
    labels: np.ndarray
    owner: np.ndarray
    row: np.ndarray
    resized: np.ndarray
    before: np.ndarray
    count: int

    @classmethod
    def of(cls, state: Any, more: int = 0, longest: int = 0) -> Book:
        """A copy of the state's arrays with room for so many more rows and edits, and labels of so many tokens."""
        found = {f.name: np.array(getattr(state, f.name)) for f in dataclasses.fields(cls)}
        count = int(found.pop("count"))
        rows, edits = room(int((found["owner"] >= 0).sum()) + more), room(count + more)
        fills = {"keys": 0, "values": 0, "radii": 0, "labels": -1, "owner": -1}
        made = {name: widened(found[name], rows, fill) for name, fill in fills.items()}
        made |= {
            name: widened(found[name], edits, fill) for name, fill in (("row", -1), ("resized", -1), ("before", 0))
        }
        spare = max(0, longest - made["labels"].shape[1])
        made["labels"] = np.pad(made["labels"], [(0, 0), (0, spare)], constant_values=-1)
        return cls(**made, count=count)

    def arrays(self) -> dict[str, jax.Array]:
        made = {f.name: jnp.asarray(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "count"}
        return made | {"count": jnp.asarray(self.count, jnp.int32)}

    def insert(self, label: np.ndarray, radius: float, query: int, distances: Distances) -> tuple[str, int, float]:
        """Take in the next edit: which case it is, its row, and the distance to the nearest key there was.

        A ball that is split has half the distance, as the paper has it, also where it was smaller before. Where two
        keys are the same and their targets are not, the later edit takes the row over: a split would leave the
        nearest key to the earlier one, and the later edit would never be seen.
        """
        edit, self.count = self.count, self.count + 1
        row, distance = distances.nearest(query, self.owner >= 0)
        if row < 0 or distance > radius + self.radii[row]:
            return "new", self._add(edit, label, radius, query, distances), distance
        agrees = np.array_equal(self.labels[row], label)
        if not agrees and distance >= SAME:
            self._resize(edit, row, distance / 2 - GAP)
            return "split", self._add(edit, label, distance / 2, query, distances), distance
        self.row[edit] = row
        case = "inside"
        if not agrees:
            self.row[:edit][self.row[:edit] == row] = -1
            self.labels[row], self.owner[row] = label, edit
            case = "overwritten"
        if distance > self.radii[row]:
            self._resize(edit, row, distance * (1 + SLACK))
            case = "covered" if agrees else case
        return case, row, distance

    def _add(self, edit: int, label, radius: float, query: int, distances: Distances) -> int:
        row = int(np.flatnonzero(self.owner < 0)[0])
        self.keys[row], self.radii[row], self.labels[row] = distances.queries[query], radius, label
        self.owner[row], self.row[edit] = edit, row
        distances.put(row, query)
        return row

    def _resize(self, edit: int, row: int, radius: float):
        self.resized[edit], self.before[edit], self.radii[row] = row, self.radii[row], radius

    def withdraw(self, edit: int):
        row, ball = self.row[edit], self.resized[edit]
        self.row[edit] = self.resized[edit] = -1
        if ball >= 0:
            later = np.flatnonzero(self.resized[edit:] == ball) + edit
            if len(later):
                self.before[later[0]] = self.before[edit]
            else:
                self.radii[ball] = self.before[edit]
        if row >= 0:
            left = np.flatnonzero(self.row == row)
            if len(left):
                self.owner[row] = left[0]
            else:
                self.owner[row], self.keys[row], self.values[row], self.radii[row] = -1, 0, 0, 0
                self.labels[row] = -1
                self.resized[self.resized == row] = -1
