"""A codebook: keys with a ball around each, and the one that is nearest to a query.

Distances are Euclidean, in float32 (float64 for a float64 model). A matrix product finds the few nearest keys, and
their distances are then taken from differences: that of a product loses everything below a thousandth of a key's norm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxedit.models.sites import prompt_ends
from jaxedit.models.transformer import Context

CANDIDATES = 4  # keys whose distance to a query is taken from differences
ROOM = 8  # rows of the smallest codebook


def room(n: int) -> int:
    """How many rows to hold for `n`: 8, 12, 18, 27, …, so that few programs are compiled while a codebook grows."""
    rows = ROOM
    while rows < n:
        rows += rows // 2
    return rows


def widened(x: np.ndarray, rows: int, fill) -> np.ndarray:
    """A copy of `x` with at least so many rows, the new ones filled."""
    spare = [(0, max(0, rows - len(x)))] + [(0, 0)] * (x.ndim - 1)
    return np.pad(x, spare, constant_values=fill)


def nearest(queries, keys, live) -> tuple[jax.Array, jax.Array]:
    """The nearest live key of each query, the first among equals, and how far it is: int32 and float ``[n]``.

    queries ``[n, d]``, keys ``[m, d]``, live: boolean ``[m]``, or ``[n, m]`` where it is not the same for all queries.
    Where no key is live the distance is infinite.
    """
    queries = queries.astype(keys.dtype)
    rough = _rough(queries, keys)
    live = jnp.broadcast_to(live, rough.shape)
    _, at = lax.top_k(jnp.where(live, -rough, -jnp.inf), min(CANDIDATES, len(keys)))
    apart = queries[:, None] - keys[at]
    distance = jnp.where(jnp.take_along_axis(live, at, 1), jnp.sqrt(jnp.sum(apart * apart, -1)), jnp.inf)
    least = distance.min(-1)
    return jnp.where(distance == least[:, None], at, len(keys)).min(-1).astype(jnp.int32), least


def _rough(queries, keys):
    """Squared distances ``[n, m]`` less the squared norm of the query, from a product."""
    return jnp.sum(keys * keys, -1) - 2 * jnp.matmul(queries, keys.T, precision=lax.Precision.HIGHEST)


_rough_on_device = jax.jit(_rough)


class Distances:
    """Distances of a series of queries to keys that come and go, on the host.

    queries ``[n, d]``, keys ``[m, d]``. All products are made at once; `put` makes a query a key.
    """

    def __init__(self, queries: np.ndarray, keys: np.ndarray):
        self.queries, self.keys = queries, keys.copy()
        self._mutual = np.asarray(_rough_on_device(queries, queries))
        self._rough = np.array(_rough_on_device(queries, keys))

    def put(self, row: int, query: int):
        """From now on the key of `row` is the query with that number."""
        self.keys[row], self._rough[:, row] = self.queries[query], self._mutual[:, query]

    def nearest(self, query: int, live: np.ndarray) -> tuple[int, float]:
        """As the function `nearest`, for one query; (-1, inf) where no key is live. Differences in float64."""
        rows = np.flatnonzero(live)
        if not len(rows):
            return -1, float("inf")
        rough = self._rough[query, rows]
        if len(rows) > CANDIDATES:
            rows = np.sort(rows[np.argpartition(rough, CANDIDATES - 1)[:CANDIDATES]])
        apart = np.linalg.norm(self.keys[rows].astype(np.float64) - self.queries[query].astype(np.float64), axis=-1)
        best = int(apart.argmin())
        return int(rows[best]), float(apart[best])


def decide_at_ends(
    find: Callable[[jax.Array], jax.Array], queries, context: Context, carried: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """What `find` makes of the query at the end of each token's prompt ``[b, s]``, and what to carry on ``[b]``.

    find: queries ``[n, d]`` to int32 ``[n]``; queries ``[b, s, d]``; carried: of rows whose prompt lies in the past.
    Only what has to be found is: nothing where all prompts lie in the past, one query a row where a row holds one
    prompt, and otherwise every token's.
    """
    b, s, d = queries.shape
    ends, real = prompt_ends(context), context.segments > 0
    last = jnp.max(jnp.where(real, jnp.arange(s), 0), 1)
    own = jnp.take_along_axis(ends, last[:, None], 1)  # where the prompt of each row's last token ends

    def of_rows(_):
        at = jnp.maximum(own, 0)
        found = find(jnp.take_along_axis(queries, at[..., None], 1)[:, 0])
        return jnp.broadcast_to(found[:, None], (b, s))

    def of_tokens(_):
        found = find(queries.reshape(b * s, d)).reshape(b, s)
        return jnp.take_along_axis(found, jnp.maximum(ends, 0), 1)

    one_prompt = jnp.all((ends == own) | ~real)
    if carried is None:
        known = lax.cond(one_prompt, of_rows, of_tokens, None)
    else:
        past = jnp.broadcast_to(carried[:, None], (b, s))
        which = jnp.where(jnp.all((ends < 0) | ~real), 0, jnp.where(one_prompt, 1, 2))
        known = lax.switch(which, (lambda _: past, of_rows, of_tokens), None)
        known = jnp.where(ends < 0, past, known)
    return known, jnp.take_along_axis(known, last[:, None], 1)[:, 0]


@partial(jax.jit, static_argnames=("rows",))
def drawn(seed: int, numbers, rows: int):
    """Uniform numbers in [0, 1), float32 ``[n, rows]``; what an edit gets depends on `seed` and its number alone."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (rows,)))(numbers)
