"""Many edits of one model, each made alone, in one pass: every row of a batch is run with the updates of its own edit.

An edit by itself is a few outer products. Where hundreds of edited models would be compared with each other, the
updates are kept beside the weights instead: ``out + (key @ left) @ right``, with the factors that a row asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.adapters.rows import NOTHING
from jaxedit.errors import JaxEditError
from jaxedit.models.sites import Site

if TYPE_CHECKING:
    from jaxedit.export.patch import EditPatch


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["left", "right", "rows"],
    meta_fields=["layers", "site", "asks", "asks_at"],
)
@dataclasses.dataclass(frozen=True)
class Apart:
    """The updates of n edits that do not know of each other, an `Adapter`.

    left ``[n, len(layers), d_ff, r]``, right ``[n, len(layers), r, d_model]``: edit i adds ``left[i, j] @ right[i, j]``
    to the MLP's second matrix of ``layers[j]``. rows: int32 ``[b]``, which edit each row of a batch has, or NOTHING
    (-1), which leaves the MLP's output as it is, bit for bit.
    Products are in the factors' dtype, float32 (float64), at the highest precision, and added in it.
    """

    left: jax.Array
    right: jax.Array
    layers: tuple[int, ...]
    rows: jax.Array | None = None
    site: Site = "mlp_out"
    asks: int | None = None
    asks_at: Site | None = None

    @classmethod
    def of(cls, patches: Sequence[EditPatch]) -> Apart:
        """Patches made on one model, each an edit; factors of lower rank are filled up with zeros.

        Raises JaxEditError where there are none, where one has an adapter, or an update that is not in factors.
        """
        for i, patch in enumerate(patches):
            whole = [l for l, delta in patch.deltas.items() if delta.right is None]
            if whole or patch.adapters:
                why = f"its updates of layers {whole} are not in factors" if whole else "it has adapters"
                raise JaxEditError(f"patch {i} cannot be kept apart from others: {why}")
        deltas = [
            (i, l, d.left, d.right) for i, p in enumerate(patches) for l, d in p.deltas.items() if d.right is not None
        ]
        if not deltas:
            raise JaxEditError("there are no updates to keep apart")
        layers = tuple(sorted({l for _, l, _, _ in deltas}))
        rank = max(left.shape[1] for _, _, left, _ in deltas)
        _, _, one, other = deltas[0]
        lefts = np.zeros((len(patches), len(layers), len(one), rank), one.dtype)
        rights = np.zeros((len(patches), len(layers), rank, other.shape[1]), other.dtype)
        for i, l, left, right in deltas:
            lefts[i, layers.index(l), :, : left.shape[1]] = left
            rights[i, layers.index(l), : left.shape[1]] = right
        return cls(jnp.asarray(lefts), jnp.asarray(rights), layers)

    def for_rows(self, rows) -> Apart:
        """For a batch whose row i has edit ``rows [b]`` (int32), or NOTHING."""
        return dataclasses.replace(self, rows=jnp.asarray(rows, jnp.int32))

    def decide(self, seen, context, carried):
        """Nothing: each row has its edit."""
        return None, None

    def change(self, layer, seen, context, decision):
        """The MLP's output and what the row's own update adds to it. Raises JaxEditError where rows have no edits."""
        if self.rows is None:
            raise JaxEditError("edits that are apart need to know which row has which: use for_rows(rows)")
        at = self.layers.index(layer)
        left, right = self.left[:, at][self.rows], self.right[:, at][self.rows]
        product = partial(jnp.einsum, precision="highest")
        added = product("bsr,brd->bsd", product("bsf,bfr->bsr", seen.mlp_key.astype(left.dtype), left), right)
        mine = (self.rows != NOTHING)[:, None, None]
        return jnp.where(mine, seen.mlp_out.astype(added.dtype) + added, seen.mlp_out)
