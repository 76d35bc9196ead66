"""The adaptors of REP: a gate and a low-rank projection on a key, one of each for every edit and layer. See
`jaxedit.adapters.rep`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxedit.adapters.rows import withdrawn
from jaxedit.errors import JaxEditError
from jaxedit.models.sites import Seen, Site

_NUMBERS = 2**24  # that the gates of all edits take at a time


class Adaptor(NamedTuple):
    """One adaptor, or several on leading axes: down ``[r, d_ff]`` and up ``[d_ff, r]``, the projection; into
    ``[h, d_ff]``, bias ``[h]``, out ``[h]`` and shift ``[]``, the gate."""

    down: Any
    up: Any
    into: Any
    bias: Any
    out: Any
    shift: Any

    def gate(self, keys):
        """The gate's logit ``[…]`` at keys ``[…, d_ff]``: the gate is its sigmoid."""
        hidden = jax.nn.gelu(_product(keys, self.into.T) + self.bias, approximate=False)
        return _product(hidden, self.out) + self.shift

    def projection(self, keys):
        """What is added to keys ``[…, d_ff]`` where the gate is open."""
        return _product(_product(keys, self.down.T), self.up.T)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RepState:
    """The adaptors of all edits, an `Adapter`: `Adaptor`'s fields with leading axes ``[n, layers]``.

    owner: int32 ``[n]``, which edit an adaptor belongs to, -1 where there is none. given: how many edits there were,
    those withdrawn included. tau: a gate above it is open. `at` gives another one, for which nothing is compiled anew.
    rows: see `for_rows`; by default all edits are in one model, and at each token only the adaptor with the largest
    open gate acts, of all layers by itself.

    The gates of n edits cost ``n · h · d_ff`` multiplications a token and layer, h a tenth of d_ff: a hundred edits
    cost more than the MLP itself. Everything is float32 (float64) at the highest precision.
    """

    down: jax.Array
    up: jax.Array
    into: jax.Array
    bias: jax.Array
    out: jax.Array
    shift: jax.Array
    owner: jax.Array
    given: jax.Array
    tau: jax.Array
    layers: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    rows: jax.Array | None = None

    site: ClassVar[Site] = "mlp_key"
    asks: ClassVar[int | None] = None
    asks_at: ClassVar[Site | None] = None

    def decide(self, seen: Seen, context, carried):
        """Nothing: whether a gate opens depends on one token alone."""
        return None, None

    def change(self, layer: int, seen: Seen, context, decision):
        """The key ``[b, s, d_ff]``, moved where a gate is open; elsewhere its own bits."""
        assert seen.mlp_key is not None
        key, mine = seen.mlp_key, self.adaptors(self.layers.index(layer))
        moved, is_open = self.acting(mine, key.astype(self.down.dtype))
        return jnp.where(is_open[..., None], moved.astype(key.dtype), key)

    def acting(self, every: Adaptor, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys ``[b, s, d_ff]`` as the open gates of one layer's adaptors move them, and whether any is open
        ``[b, s]``."""
        if self.rows is not None:
            own = (self.owner == self.rows[:, None]) & (self.rows >= 0)[:, None]
            mine = jax.tree.map(lambda x: x[own.argmax(1)], every)
            is_open = opens(jax.vmap(Adaptor.gate)(mine, keys), self.tau) & own.any(1)[:, None]
            return keys + jax.vmap(Adaptor.projection)(mine, keys), is_open
        flat = keys.reshape(-1, keys.shape[-1])
        most = max(1, _NUMBERS // (len(flat) * every.into.shape[1]))
        gates = lax.map(lambda one: one.gate(flat), every, batch_size=min(most, len(self.owner)))
        gates = jnp.where((self.owner >= 0)[:, None], gates, -jnp.inf)
        best = jnp.where(opens(gates.max(0), self.tau), gates.argmax(0), -1)

        def apply(moved, numbered):
            index, one = numbered
            here = best == index
            change = lambda: jnp.where(here[:, None], moved + one.projection(flat), moved)  # noqa: E731
            return lax.cond(here.any(), change, lambda: moved), None

        moved, _ = lax.scan(apply, flat, (jnp.arange(len(self.owner)), every))
        return moved.reshape(keys.shape), (best >= 0).reshape(keys.shape[:-1])

    def adaptors(self, place: int) -> Adaptor:
        """The adaptors ``[n]`` of one of the layers, by its place among them."""
        return Adaptor(*(getattr(self, name)[:, place] for name in Adaptor._fields))

    def for_rows(self, rows) -> RepState:
        """For a batch whose row i is about edit ``rows [b]`` alone (int32; -1: about none): what as many models with
        one edit each would do. A withdrawn edit's adaptor is none."""
        return dataclasses.replace(self, rows=jnp.asarray(rows, jnp.int32))

    def at(self, tau: float) -> RepState:
        """The same with another threshold, from 0 (gates are open) to 1 (they are closed)."""
        if not 0 <= tau <= 1:
            raise JaxEditError(f"tau is a gate's value, from 0 to 1, got {tau}")
        return dataclasses.replace(self, tau=jnp.asarray(tau, self.tau.dtype))

    def without(self, edits: Collection[int]) -> RepState:
        """Edits withdrawn, by their numbers: their gates are closed. The host's own update stays; withdraw it too."""
        gone = withdrawn(self.owner, edits)
        return dataclasses.replace(self, owner=jnp.where(gone, -1, self.owner))


def opens(gates: jax.Array, tau) -> jax.Array:
    """Whether gates are open, given their logits: their sigmoids are above tau. (A sigmoid is 1 long before its logit
    is at its end, so of open gates the largest is known by its logit alone.)"""
    return gates > jnp.log(tau) - jnp.log1p(-tau)


def _product(x, w):
    return jnp.matmul(x, w, precision="highest")
