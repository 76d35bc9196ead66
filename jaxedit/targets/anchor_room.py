"""What the anchor optimiser runs together: programs, their sizes, and what of them fits the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxedit.config import AnchorConfig
from jaxedit.data.tokens import EditTokens, round_up
from jaxedit.memory import USABLE, anchor_cost, free_bytes, lanes_that_fit, tokens_per_step
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import Params
from jaxedit.sharding import data_shards, mesh_of
from jaxedit.targets.anchor_plan import Shape, buckets, n_asks, rows_of, shape_of, suffix_tokens

_CPU_TOKENS, _ACCELERATOR_TOKENS = 640, 16384  # suffix tokens a step beyond which products get hardly faster
# What of a layer is kept for the backward pass, from most memory and least work to least memory and most work
KEPT = (("q", "k", "v", "o", "gate", "up"), ("q", "k", "v", "o", "gate"), ("q", "k", "v", "o"), ())
_ROOM, _ROOM_GROWTH = 8, 1.5  # suffix tokens of the smallest program of a stream, and from one to the next larger


class Sizes(NamedTuple):
    """What a program is compiled for, on each shard: edits optimised together, suffix tokens and asks of a step,
    tokens of so many edits and those before the decisive ones, and the longest prefix and suffix of a row."""

    lanes: int
    tokens: int
    asks: int
    packed: int
    before: int
    prefix: int
    tail: int


class Bucket(NamedTuple):
    """Edits that one program optimises: `members` of them, largest first, of which at most `held` are on the device
    (a shard each); keep: see `run`."""

    members: list[int]
    shape: Shape
    sizes: Sizes
    held: int
    keep: tuple[str, ...]


def arrange(
    params: Params,
    config: ModelConfig,
    edits: Sequence[EditTokens],
    layer: int,
    settings: AnchorConfig,
    rooms: Rooms | None = None,
) -> list[Bucket]:
    """The programs that `find_anchors` runs, by what the device has room for."""
    shards = data_shards(mesh_of(params))
    sizes = [suffix_tokens(e) for e in edits]
    free = free_bytes(next(iter(params["embed"]["tokens"].devices())))
    wanted = settings.tokens_per_step or (_CPU_TOKENS if free is None else _ACCELERATOR_TOKENS)
    made = []
    for members in buckets(sizes, settings.bucket_growth, wanted * shards):
        some = [edits[i] for i in members]
        share = [sizes[i] for i in members[::shards]]
        most = max(1, int(np.searchsorted(np.cumsum(share), wanted, side="right")))
        shape = shape_of(some)
        lanes, held, keep = _room(params, config, layer, shape, settings, len(share), most, free)

        def most_of(count, some=some, lanes=lanes) -> int:
            return sum(sorted(map(count, some))[-lanes:])

        step = Sizes(
            lanes=lanes,
            tokens=round_up(sum(share[:lanes]), 8),
            asks=most_of(n_asks),
            packed=most_of(lambda e: sum(len(r.tokens) for r in rows_of(e))),
            before=max(1, most_of(lambda e: sum(r.lookup for r in rows_of(e)))),
            prefix=shape.prefix,
            tail=shape.tail,
        )
        made.append(Bucket(members, shape, step, held, keep))
    if rooms is not None and len(made) == 1:
        made = [rooms.fit(layer, made[0])]
    return made


class Rooms:
    """The programs that a stream of small batches has compiled, so that batches of other sizes that fit into one use it
    too. Whoever edits batch after batch holds one and passes it on.

    A layer has several, for steps of up to 8, 12, 20, … tokens: a step costs what its program is for, so one long batch
    must not set the size for all that come after it.
    """

    def __init__(self):
        self._known: dict[tuple, tuple[Shape, Sizes]] = {}

    def fit(self, layer: int, bucket: Bucket) -> Bucket:
        """The bucket with the sizes of a program that has room for it: an earlier one, or one for both."""
        if bucket.held != bucket.sizes.lanes:
            return bucket  # edits wait for lanes: worth a program of their own
        most = _ROOM
        while most < bucket.sizes.tokens:
            most = round_up(int(_ROOM_GROWTH * most), 4)
        key = (layer, bucket.shape.rows, bucket.keep, most)
        shape, sizes = bucket.shape, bucket.sizes._replace(tokens=most)
        if key in self._known:
            before, room = self._known[key]
            fits = all(a <= b for a, b in zip((*shape, *sizes), (*before, *room), strict=True))
            if not fits:
                before = Shape(*map(max, shape, before))
                room = Sizes(*map(max, sizes, room))
                room = room._replace(**{f: 5 * getattr(room, f) // 4 for f in ("asks", "packed", "before")})
            shape, sizes = before, room
        self._known[key] = shape, sizes
        return bucket._replace(shape=shape, sizes=sizes, held=sizes.lanes)


def _room(params, config: ModelConfig, layer: int, shape: Shape, settings: AnchorConfig, share: int, most: int, free):
    """How many of `share` edits to optimise together, at most `most`, how many to hold, and what to keep of a layer.

    As many as memory allows, and then as little work done twice as it allows.
    """
    dtype, keep = params["embed"]["tokens"].dtype, KEPT[0]
    costs = [anchor_cost(config, dtype, layer, shape, keep) for keep in KEPT]
    if free is not None:
        enough = (i for i, cost in enumerate(costs) if lanes_that_fit(cost, free) >= min(most, share))
        chosen = next(enough, len(KEPT) - 1)
        keep, costs = KEPT[chosen], costs[chosen:]
        most = min(most, tokens_per_step(costs[0], shape.suffix, free) // shape.suffix)
    rounds = -(-share // most)
    lanes = -(-share // rounds)  # even rounds: lanes that run empty still cost their tokens
    held = min(settings.resident_rounds, rounds)
    if free is not None:
        held = next((r for r in range(held, 1, -1) if costs[0].total(lanes, lanes * r) <= USABLE * free), 1)
    return lanes, lanes * held, keep
