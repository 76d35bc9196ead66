"""The neurons of iReVa, as an adapter. See `jaxedit.adapters.ireva`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.adapters.rows import in_use, latest_best, owners, where_wanted, withdrawn
from jaxedit.models.layers import activation
from jaxedit.models.sites import Site, answering

SETTINGS = ("layers", "act", "alpha", "theta", "gate", "pool", "positions")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "biases", "owner", "given", "withheld"],
    meta_fields=[*SETTINGS, "site", "asks", "asks_at"],
)
@dataclasses.dataclass(frozen=True)
class Neurons:
    """The neurons of all edits, an `Adapter`.

    keys, values ``[n, d_model]``, biases ``[n]``; owner: int32 ``[n]``, which edit a neuron belongs to, -1 where there
    is none. given: how many edits there were, those withdrawn included. withheld: see `withholding`.
    The rest as in `IReVa`. Products with keys are float32 (float64) at the highest precision.
    """

    keys: jax.Array
    values: jax.Array
    biases: jax.Array
    owner: jax.Array
    given: jax.Array
    layers: tuple[int, ...]
    act: str
    alpha: float
    theta: float
    gate: str
    pool: str
    positions: str
    withheld: jax.Array | None = None
    site: Site = "mlp_out"
    asks: int | None = None
    asks_at: Site | None = None

    def decide(self, seen, context, carried):
        """Nothing: whether a neuron fires depends on one token alone."""
        return None, None

    def change(self, layer, seen, context, decision):
        """The MLP's output and what neurons add to it."""
        out, wanted = seen.mlp_out, answering(context, self.positions == "last")
        add = where_wanted(self.added, seen.mlp_in, wanted, len(self.owner))
        return jnp.where(wanted[..., None], out.astype(add.dtype) + add, out.astype(add.dtype)).astype(out.dtype)

    def added(self, x: jax.Array, index: jax.Array) -> jax.Array:
        """What neurons add ``[q, d_model]`` where the MLP reads `x`, of that shape, in row ``index [q]`` of a batch."""
        used = in_use(self.owner, None if self.withheld is None else self.withheld[index])
        fired = self.fired(self.potentials(x))
        if self.pool == "sum":
            return self.alpha * _product(jnp.where(used, fired, 0), self.values)
        fired = jnp.where(used, fired, -jnp.inf)
        best = latest_best(fired, x.dtype)
        amount = jnp.take_along_axis(fired, best[:, None], 1)
        return self.alpha * jnp.where(jnp.isfinite(amount), amount, 0) * self.values[best]

    def potentials(self, x: jax.Array) -> jax.Array:
        """``z [q, n]`` of MLP inputs ``x [q, d_model]``."""
        return self.potentials_of(standardised(x.astype(self.keys.dtype)))

    def potentials_of(self, s: jax.Array) -> jax.Array:
        """``z [q, n]`` of MLP inputs that are standardised already."""
        return _product(s, self.keys.T) - self.biases

    def fired(self, z: jax.Array) -> jax.Array:
        """``g(z)``, gated."""
        made = activation(z, self.act)
        return jnp.where(z > 0, made, 0) if self.gate == "hard" else made

    def edits(self) -> np.ndarray:
        """The numbers of the edits still held, ascending."""
        return owners(self.owner)

    def without(self, edits: Collection[int], how: Literal["delete", "mask"] = "delete") -> Neurons:
        """Edits withdrawn, by their numbers. "delete" takes their neurons away. "mask" sets their values to zero
        (published): such a neuron can still be the one that fires most, and then keeps others from answering.

        Raises JaxEditError naming edits that are not held.
        """
        gone = withdrawn(self.owner, edits)
        if how == "mask":
            return dataclasses.replace(self, values=jnp.where(gone[:, None], 0, self.values))
        return dataclasses.replace(self, owner=jnp.where(gone, -1, self.owner))

    def withholding(self, edits: jax.Array | None) -> Neurons:
        """For a batch whose row i does without edit ``edits [b]`` (int32): the same as without that edit, for every row
        at once. See `jaxedit.adapters.rows` for the numbers that mean none and all."""
        return dataclasses.replace(self, withheld=edits)


def standardised(x: jax.Array) -> jax.Array:
    """``(x - mean) / sqrt(var + 1e-8)`` over features, with the sample variance: ‖·‖² is d - 1."""
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) / (x.shape[-1] - 1) + 1e-8)


def _product(x, w):
    return jnp.matmul(x, w, precision="highest")
