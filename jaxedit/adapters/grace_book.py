"""GRACE's codebook on the host: where new balls go, and what becomes of them when edits are withdrawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.adapters.codebook import Distances, widened
from jaxedit.adapters.rows import FREE, ROOM
from jaxedit.evaluation.batching import bucket

CASES = ("new", "split", "covered", "inside", "overwritten")
GAP = 1e-5  # between two balls after a split


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
    given: int

    @classmethod
    def of(cls, state: Any, more: int = 0, longest: int = 0) -> Book:
        """A copy of the state's arrays with room for so many more rows and edits, and labels of so many tokens."""
        found = {f.name: np.array(getattr(state, f.name)) for f in dataclasses.fields(cls)}
        given = int(found.pop("given"))
        rows, edits = bucket(int((found["owner"] >= 0).sum()) + more, ROOM), bucket(given + more, ROOM)
        fills = {"keys": 0, "values": 0, "radii": 0, "labels": -1, "owner": FREE}
        made = {name: widened(found[name], rows, fill) for name, fill in fills.items()}
        made |= {
            name: widened(found[name], edits, fill) for name, fill in (("row", -1), ("resized", -1), ("before", 0))
        }
        spare = max(0, longest - made["labels"].shape[1])
        made["labels"] = np.pad(made["labels"], [(0, 0), (0, spare)], constant_values=-1)
        return cls(**made, given=given)

    def arrays(self) -> dict[str, jax.Array]:
        made = {f.name: jnp.asarray(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "given"}
        return made | {"given": jnp.asarray(self.given, jnp.int32)}

    def insert(
        self, label: np.ndarray, radius: float, query: int, distances: Distances, rounding: float
    ) -> tuple[str, int, float]:
        """Take in the next edit: which case it is, its row, and the distance to the nearest key there was.

        rounding: of the query, as a share of its size. A ball that is split has half the distance, as the paper has it,
        also where it was smaller before; one that is widened holds its query up to rounding. Where two keys are the
        same up to rounding and their targets are not, the later edit takes the place of those that use the row: a split
        would leave neither a ball that holds it.
        """
        same = rounding * float(np.linalg.norm(distances.queries[query]))
        row, distance = nearest = distances.nearest(query, self.owner >= 0)
        while row >= 0 and distance <= same and not np.array_equal(self.labels[row], label):
            for old in np.flatnonzero(self.row == row).tolist():
                self.withdraw(old)
            row, distance = distances.nearest(query, self.owner >= 0)
        case, at = self._place(label, radius, query, distances, row, distance, same)
        return case if (row, distance) == nearest else "overwritten", at, nearest[1]

    def _place(self, label, radius: float, query: int, distances: Distances, row: int, distance: float, same: float):
        edit, self.given = self.given, self.given + 1
        if row < 0 or distance > radius + self.radii[row]:
            return "new", self._add(edit, label, radius, query, distances)
        if not np.array_equal(self.labels[row], label):
            self._resize(edit, row, distance / 2 - GAP)
            return "split", self._add(edit, label, distance / 2, query, distances)
        self.row[edit] = row
        if distance <= self.radii[row]:
            return "inside", row
        self._resize(edit, row, distance + same)
        return "covered", row

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
        left = np.flatnonzero(self.row == row)
        if len(left):
            self.owner[row] = left[0]
        else:
            self.owner[row], self.keys[row], self.values[row], self.radii[row] = FREE, 0, 0, 0
            self.labels[row] = -1
            self.resized[self.resized == row] = -1
