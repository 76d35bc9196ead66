"""Device memory: what is free, and how much of it the anchor optimiser takes.

The estimate is linear in the number of edits optimised together. ``benchmarks/memory_plan.py`` compares it with what
the compiler allocates.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from jaxedit.errors import JaxEditError
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide

if TYPE_CHECKING:
    from jaxedit.targets.anchor_plan import Shape

# Of the memory that is free, what may be planned with: the rest is for fragments and for libraries' workspaces.
USABLE = 0.9


def free_bytes(device) -> int | None:
    """Bytes that can still be allocated on a `jax.Device`, or None where it does not say (the CPU)."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


@dataclasses.dataclass(frozen=True)
class AnchorCost:
    """Device bytes beside the weights: once, for each edit that is held on the device, for each that is being
    optimised (a lane), and for the copy that a lane has of its edit's prefix where more edits are held than lanes."""

    fixed: int
    held: int
    lane: int
    copy: int

    def total(self, lanes: int, held: int) -> int:
        """Of `lanes` optimised together while `held` edits, these included, are on the device."""
        return self.fixed + held * self.held + lanes * (self.lane + (self.copy if held > lanes else 0))


def anchor_cost(config: ModelConfig, dtype, layer: int, shape: Shape, keep: tuple[str, ...]) -> AnchorCost:
    """What `jaxedit.targets.anchor` takes for anchors at the output of `layer`.

    shape: tokens of one edit. keep: the products kept for the backward pass (see `transformer.run`).

    An edit that is held has the keys and values of its prefixes in every layer above, and the base model's
    distribution for the KL term. A lane has for each suffix token what `keep` names and the hidden state, in every
    layer; and on top of that either one layer at work or the logits at each ask and their gradient. Preparing an
    edit has one layer at work on all of its rows, which is half as much without a backward pass.
    """
    c, b, w = config, np.dtype(dtype).itemsize, np.dtype(wide(dtype)).itemsize
    q, kv, above = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_layer - layer - 1
    widths = {"q": q, "k": kv, "v": kv, "o": c.d_model, "up": c.d_ff, "gate": c.d_ff if c.gated else 0}
    saved = c.d_model + sum(widths[name] for name in keep)
    cache = 2 * above * shape.rows * shape.prefix * kv * b

    def work(tokens: int, own: int, seen: int) -> int:
        return tokens * _WIDE * c.d_ff * b + shape.rows * own * _SCORES * c.n_head * seen * w

    at_work = work(shape.suffix, shape.tail, shape.prefix + shape.tail)
    step = above * shape.suffix * saved * b + max(at_work, 2 * (shape.asks + 1) * c.vocab * w)
    return AnchorCost(
        fixed=_COPIES * max(c.d_ff, q) * c.d_model * b,
        held=cache + shape.rows * shape.tail * c.d_model * b + c.vocab * w,
        lane=max(step, work(shape.packed, shape.longest, shape.longest) // 2),
        copy=cache,
    )


# A layer at work: so many arrays as wide as the MLP, matrices of attention scores, and copies of a weight matrix.
_WIDE, _SCORES, _COPIES = 4, 2, 2


def lanes_that_fit(cost: AnchorCost, free: int, *, held_per_lane: int = 1) -> int:
    """How many edits can be optimised together in `free` bytes; 0 where not even one can.

    held_per_lane: edits that are on the device for each one that is being optimised, itself included.
    """
    each = cost.total(1, held_per_lane) - cost.fixed
    return max(0, math.floor((USABLE * free - cost.fixed) / each))


def tokens_per_step(cost: AnchorCost, suffix: int, free: int, *, held_per_lane: int = 1) -> int:
    """Suffix tokens to optimise together in `free` bytes, a multiple of `suffix` (see `lanes_that_fit`).

    Raises JaxEditError where not even one edit fits.
    """
    lanes = lanes_that_fit(cost, free, held_per_lane=held_per_lane)
    if lanes < 1:
        raise JaxEditError(
            f"optimising one anchor takes {cost.total(1, held_per_lane) / 1e9:.2f} GB of device memory beside the "
            f"weights; {USABLE * free / 1e9:.2f} GB can be used. Use a smaller dtype, fewer or shorter context "
            "templates, or a mesh with more devices to split the weights"
        )
    return lanes * suffix
