"""MELO's index on the host: clusters of points, and which block of LoRA weights each point asks for."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.adapters.codebook import Distances, widened
from jaxedit.adapters.rows import FREE, ROOM
from jaxedit.evaluation.batching import bucket

CASES = ("new", "split", "joined", "overwritten")
GAP = 1e-5  # less than half the distance for the old cluster of a split, more for the new one


@dataclasses.dataclass
class Index:
    """Clusters and points, to be changed in place. Fields as in `jaxedit.adapters.melo.MeloState`."""

    centres: np.ndarray
    radii: np.ndarray
    labels: np.ndarray
    live: np.ndarray
    points: np.ndarray
    cluster: np.ndarray
    block: np.ndarray
    owner: np.ndarray
    given: int

    @classmethod
    def of(cls, state: Any, more: int = 0, longest: int = 0) -> Index:
        """A copy of the state's arrays with room for so many more points, and labels of so many tokens."""
        found = {f.name: np.array(getattr(state, f.name)) for f in dataclasses.fields(cls)}
        given = int(found.pop("given"))
        rows = {
            "live": bucket(int(found["live"].sum()) + more, ROOM),
            "cluster": bucket(int((found["cluster"] >= 0).sum()) + more, ROOM),
        }
        fills = {"centres": 0, "radii": 0, "labels": -1, "live": False}
        made = {name: widened(found[name], rows["live"], fill) for name, fill in fills.items()}
        fills = {"points": 0, "cluster": -1, "block": -1, "owner": FREE}
        made |= {name: widened(found[name], rows["cluster"], fill) for name, fill in fills.items()}
        spare = max(0, longest - made["labels"].shape[1])
        made["labels"] = np.pad(made["labels"], [(0, 0), (0, spare)], constant_values=-1)
        return cls(**made, given=given)

    def arrays(self) -> dict[str, jax.Array]:
        made = {f.name: jnp.asarray(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "given"}
        return made | {"given": jnp.asarray(self.given, jnp.int32)}

    def free_block(self) -> int:
        """The lowest block that no point asks for."""
        used = set(self.block[self.cluster >= 0].tolist())
        return next(i for i in range(len(used) + 1) if i not in used)

    def insert_batch(
        self, queries: np.ndarray, labels: np.ndarray, radius: float, block: int, rounding: float
    ) -> list[str]:
        """Take in the next edits, which share a block; returns which case each was.

        rounding: of queries, as a share of their size. The nearest clusters are those of the index as it was before the
        batch. Where a query lies on a centre and its target is another one, it takes the cluster over: no split could
        keep the two apart. Where it lies on a point and its target is the same, it takes the point over.
        """
        distances, same = Distances(queries, self.centres), rounding * np.linalg.norm(queries, axis=-1)
        near = [distances.nearest(i, self.live) for i in range(len(queries))]
        return [
            self._insert(query, label, radius, block, *found, float(least))
            for query, label, found, least in zip(queries, labels, near, same, strict=True)
        ]

    def _insert(self, query, label, radius: float, block: int, at: int, distance: float, same: float) -> str:
        edit, self.given = self.given, self.given + 1
        if at < 0 or distance > self.radii[at] + radius:
            self._add(query, label, radius, block, edit)
            return "new"
        if np.array_equal(self.labels[at], label):
            apart = np.linalg.norm((self.points - query).astype(np.float64), axis=-1)
            self._clear(np.flatnonzero((self.cluster == at) & (apart <= same)))
            self._point(query, at, block, edit)
            self._fit(at, radius, same)
            return "joined"
        if distance <= same:
            self._clear(np.flatnonzero(self.cluster == at))
            self.centres[at], self.labels[at], self.radii[at] = query, label, max(self.radii[at], distance)
            self._point(query, at, block, edit)
            return "overwritten"
        self.radii[at] = distance / 2 - GAP
        self._forget_outside(at)
        self._add(query, label, distance / 2 + GAP, block, edit)
        return "split"

    def _add(self, query, label, radius: float, block: int, edit: int):
        at = int(np.flatnonzero(~self.live)[0])
        self.centres[at], self.radii[at], self.labels[at], self.live[at] = query, radius, label, True
        self._point(query, at, block, edit)

    def _point(self, query, at: int, block: int, edit: int):
        row = int(np.flatnonzero(self.cluster < 0)[0])
        self.points[row], self.cluster[row], self.block[row], self.owner[row] = query, at, block, edit

    def _fit(self, at: int, radius: float, same: float):
        """Put the centre at the mean of the cluster's points, and widen it to hold them all up to rounding."""
        members = self.points[self.cluster == at].astype(np.float64)
        self.centres[at] = members.mean(0)
        self.radii[at] = max(radius, same + np.linalg.norm(members - members.mean(0), axis=-1).max())

    def _forget_outside(self, at: int):
        """Forget points beyond the radius; where none is left, one without a block stays at the centre."""
        rows = np.flatnonzero(self.cluster == at)
        apart = np.linalg.norm((self.points[rows] - self.centres[at]).astype(np.float64), axis=-1)
        outside = apart > self.radii[at]
        if outside.all():
            self.points[rows[0]], self.block[rows[0]], self.owner[rows[0]] = self.centres[at], -1, FREE
            outside[0] = False
        self._clear(rows[outside])

    def _clear(self, rows):
        self.points[rows], self.cluster[rows], self.block[rows], self.owner[rows] = 0, -1, -1, FREE

    def withdraw(self, edit: int):
        """The edit's point asks for no block any more; a cluster in which none does is dropped."""
        for row in np.flatnonzero(self.owner == edit):
            at = self.cluster[row]
            self.block[row], self.owner[row] = -1, FREE
            if (self.block[self.cluster == at] < 0).all():
                self._clear(np.flatnonzero(self.cluster == at))
                self.centres[at], self.radii[at], self.labels[at], self.live[at] = 0, 0, -1, False
