"""Rows that edits own: which of them are in use, which one answers a query, and room for more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxedit.data.tokens import EditTokens
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.batching import MIN_LENGTH, batches, bucket, pad
from jaxedit.layer_loop import Progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import Context, Decoder, Params
from jaxedit.sharding import data_shards, mesh_of, over_data, place_rows

FREE = -1  # the owner of a row that nobody uses
ROOM = 16  # rows of the smallest state
NOTHING, EVERYTHING = -1, -2  # in the place of an edit that is withheld from a row of a batch
_SCORES = 2**23  # at a time
_TIE = 1e-4
_BATCH_TOKENS = 8192
Asked = tuple[tuple[int, ...], int]  # a row of tokens, and how many of its last ones are asked about


def in_use(owner: jax.Array, withheld: jax.Array | None) -> jax.Array:
    """Which rows may answer: ``[n]``, or ``[b, n]`` where each of b queries has an edit withheld from it."""
    used = owner >= 0
    if withheld is None:
        return used
    kept = (owner != withheld[:, None]) & (withheld[:, None] != EVERYTHING)
    return used & kept


def rounding(dtype) -> float:
    """How far apart two passes of different shapes may leave the same state of a model, relative to its size.

    Thirty layers of a float32 model leave 4e-6, of a bfloat16 one 0.035. Of keys that are nearer to each other than
    this, the later one counts.
    """
    eps = float(jnp.finfo(dtype).eps)
    return 8 * eps if jnp.dtype(dtype).itemsize == 2 else 1000 * eps


def latest_best(scores: jax.Array, dtype, scale: jax.Array | float | None = None) -> jax.Array:
    """The row ``[q]`` with the largest of ``scores [q, n]``; of several that are so up to rounding, the last.

    A prompt that is edited again has nearly the key it had before, and the later edit must win. Rounding is taken as a
    share of `scale`, by default of the largest score itself: 1e-4, or more where states have a 16-bit `dtype`. (Scores
    fall with the square of the distance between keys.)
    """
    best = jnp.max(scores, -1, keepdims=True)
    tie = max(_TIE, 2 * rounding(dtype) ** 2)
    least = best - tie * (jnp.abs(best) if scale is None else scale)
    return jnp.max(jnp.where(scores >= least, jnp.arange(scores.shape[-1]), 0), -1)


def owners(owner: jax.Array | np.ndarray) -> np.ndarray:
    """The edits that own rows, ascending."""
    every = np.unique(np.asarray(owner))
    return every[every >= 0]


def check_held(edits: Collection[int], held: np.ndarray):
    """Raise JaxEditError naming edits that are not among those `held`."""
    unknown = sorted(set(map(int, edits)) - set(held.tolist()))
    if unknown:
        raise JaxEditError(f"edits {unknown[:10]} are not held; they were withdrawn before or replaced, or never made")


def withdrawn(owner: jax.Array, edits: Collection[int]) -> np.ndarray:
    """Boolean ``[n]``: the rows of some edits. Raises JaxEditError naming edits that have none."""
    check_held(edits, owners(owner))
    return np.isin(np.asarray(owner), list(edits))


def append(old: dict[str, jax.Array] | None, new: dict[str, jax.Array], least: int = ROOM) -> dict[str, jax.Array]:
    """Columns of rows, ``new`` behind those of ``old`` that are in use; "owner" is one of them.

    There is room for up to half as many rows again, and for `least`, so that the same programs serve a growing number.
    Where the old columns have room left behind their last row, new rows go there and old ones keep their places.
    """
    n = len(new["owner"])
    owner = np.zeros(0, np.int32) if old is None else np.asarray(old["owner"])
    kept = np.flatnonzero(owner >= 0)
    end = int(kept[-1]) + 1 if len(kept) else 0
    if old is not None and end + n <= len(owner):
        return {name: x.at[end : end + n].set(new[name]) for name, x in old.items()}
    size = bucket(len(kept) + n, least)
    made = {}
    for name, x in new.items():
        room = jnp.full((size, *x.shape[1:]), FREE if name == "owner" else 0, x.dtype)
        if old is not None and len(kept):
            room = room.at[: len(kept)].set(old[name][kept])
        made[name] = room.at[len(kept) : len(kept) + n].set(x)
    return made


def asked(edits: Sequence[EditTokens]) -> list[Asked]:
    """Each edit's prompt and target, asked for every token of the target."""
    return [(edit.contexts[0].tokens, len(edit.target)) for edit in edits]


def at_prompts(edits: Sequence[EditTokens]) -> list[Asked]:
    """Each edit's prompt, asked at its last token."""
    rows = asked(edits)
    return [(tokens[: len(tokens) - n + 1], 1) for tokens, n in rows]


def read_last(
    read: Callable, model: Decoder, rows: Sequence[Asked], *static, on_progress: Progress | None = None
) -> list[np.ndarray]:
    """What ``read(params, config, tokens [b, s], context, *static)`` gives ``[b, s, d]`` at the last n tokens of each
    row ``(tokens, n)``: arrays ``[n, d]``, float32 (float64). on_progress is told of "keys"."""
    mesh, done = mesh_of(model.params), 0
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    shapes = [(bucket(len(tokens), MIN_LENGTH), bucket(n)) for tokens, n in rows]
    for batch in batches(shapes, _BATCH_TOKENS, data_shards(mesh)):
        some, (length, width) = batch.take(rows), batch.shape
        placed = place_rows((*pad([tokens for tokens, _ in some], length), last_places(some, width)), mesh)
        made = np.asarray(_read(model.params, *placed, read, model.config, static, mesh))
        for i, (_, n), x in zip(batch.index, some, made, strict=False):
            found[i] = x[:n]
        done += len(batch.index)
        if on_progress is not None:
            on_progress("keys", done, len(rows))
    return found


@partial(jax.jit, static_argnames=("read", "config", "static", "mesh"))
def _read(params: Params, tokens, mask, at, read: Callable, config: ModelConfig, static: tuple, mesh: Mesh | None):
    def share(params, tokens, mask, at):
        x = read(params, config, tokens, Context.of_mask(mask), *static)
        return jnp.take_along_axis(x, at[..., None], 1).astype(wide(x.dtype))

    return over_data(share, mesh)(params, tokens, mask, at)


def last_places(rows: Sequence[Asked], width: int) -> np.ndarray:
    """The places of the last n tokens of each row, int32 ``[rows, width]``; the last one where there are no more."""
    return np.asarray([np.minimum(len(t) - n + np.arange(width), len(t) - 1) for t, n in rows], np.int32)


def where_wanted(function: Callable, x: jax.Array, wanted: jax.Array, rows: int, most: int | None = None) -> jax.Array:
    """``function(x [q, d], index [q])`` of the tokens of ``x [b, s, d]`` that are `wanted` ``[b, s]``.

    index: the row of the batch that a token is in. Returns ``[b, s, …]``; what stands at other tokens means nothing.
    No time is spent on them where there are no more wanted tokens than rows, as in a pass over prompts. Scores of all
    tokens against many rows would not fit, so tokens are otherwise taken some at a time, the wanted ones first, until
    there are none left. rows: how many scores a token has; most: tokens at a time.
    """
    b, s, d = x.shape
    flat, index, wanted = x.reshape(-1, d), jnp.repeat(jnp.arange(b), s), wanted.reshape(-1)
    most = max(64, _SCORES // max(rows, 1)) if most is None else most
    shape = jax.eval_shape(function, flat, index)

    def made(at):
        if len(at) <= most:
            return function(flat[at], index[at])
        filled = jnp.pad(at, (0, -len(at) % most), mode="edge").reshape(-1, most)

        def some(at):
            none = jnp.zeros((most, *shape.shape[1:]), shape.dtype)
            return lax.cond(jnp.any(wanted[at]), lambda: function(flat[at], index[at]), lambda: none)

        return lax.map(some, filled).reshape(-1, *shape.shape[1:])[: len(at)]

    if s == 1:
        return made(jnp.arange(b))[:, None]
    order = jnp.argsort(~wanted)
    few = order[:b]
    out = lax.cond(
        wanted.sum() <= b,
        lambda: jnp.zeros(shape.shape, shape.dtype).at[few].set(made(few)),
        lambda: made(order)[jnp.argsort(order)],
    )
    return out.reshape(b, s, *shape.shape[1:])
