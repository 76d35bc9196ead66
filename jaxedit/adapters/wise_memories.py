"""WISE's side memories on the host: which one an edit goes to, and when they are merged."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.adapters.codebook import widened
from jaxedit.adapters.merging import MERGES
from jaxedit.adapters.rows import ROOM
from jaxedit.evaluation.batching import bucket


@dataclasses.dataclass
class Shelf:
    """The side memories on the host, to be changed in place. Fields as in `jaxedit.adapters.wise.WiseState`,
    deltas as a list."""

    deltas: list
    least: np.ndarray
    seeds: np.ndarray
    merged: np.ndarray
    memory: np.ndarray

    @classmethod
    def of(cls, state: Any, more: int) -> Shelf:
        rest = {name: np.array(getattr(state, name)) for name in ("least", "seeds", "merged", "memory")}
        rest["memory"] = widened(rest["memory"], bucket(int(state.given) + more, ROOM), -1)
        return cls(list(state.deltas), **rest)

    def edits(self, at: int) -> int:
        return int((self.memory == at).sum())

    def open(self, save_every: int, seed: int) -> int:
        """The memory that the next edit goes to: one that is not full, or a new one."""
        free = []
        for at in range(len(self.deltas)):
            n = self.edits(at)
            if 0 < n < save_every and not self.merged[at]:
                return at
            free += [at] if n == 0 else []
        if not free:
            free, n = [len(self.deltas)], len(self.deltas)
            zero = jnp.zeros_like(self.deltas[0])
            rows = n + max(1, n // 2)
            self.deltas += [zero] * (rows - n)
            self.least, self.seeds = widened(self.least, rows, np.inf), widened(self.seeds, rows, 0)
            self.merged = widened(self.merged, rows, False)
        self.seeds[free[0]] = seed
        return free[0]

    def merge(self, how: str, density: float, save_every: int, merge_every: int):
        """Merge the full shards into one memory, where there are as many as that takes."""
        full = [i for i in range(len(self.deltas)) if not self.merged[i] and self.edits(i) >= save_every]
        if how == "none" or len(full) * save_every < merge_every:
            return
        first = full[0]
        new = MERGES[how]([np.asarray(self.deltas[i]) for i in full], density)
        self.least[first] = self.least[full].min()
        self.memory[np.isin(self.memory, full)] = first
        for i in full[1:]:
            self.deltas[i], self.least[i] = jnp.zeros_like(self.deltas[i]), np.inf
        self.deltas[first], self.merged[first] = jnp.asarray(new), True

    def arrays(self) -> dict[str, jax.Array]:
        rest = {name: jnp.asarray(getattr(self, name)) for name in ("least", "seeds", "merged", "memory")}
        return {"deltas": jnp.stack(self.deltas), **rest}
