"""GRACE: a codebook of keys, each with a ball and a value that takes the place of a linear map's output.

Hartvigsen et al., "Aging with GRACE" (2023). The query is the input of one linear map of an MLP at the last token of
the prompt. Nothing below the map, and no other edit, changes it: so all balls are laid first, in the order of the
edits, and then all values are trained at once. Only edits that share a row are trained one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxedit.adapters.codebook import Distances, decide_at_ends, drawn, nearest
from jaxedit.adapters.grace_book import CASES, Book
from jaxedit.adapters.rows import FREE, ROOM, at_prompts, check_held, read_last, rounding
from jaxedit.adapters.settings import check_goes_on, check_one_layer, chosen_layer
from jaxedit.adapters.training import (
    Answers,
    answer_batches,
    answers_above,
    at_asks,
    at_ends,
    descend,
    mlp_entry,
    nll_above,
    tokenised,
)
from jaxedit.config import _check, _check_choice
from jaxedit.data.tokens import EditTokens
from jaxedit.errors import JaxEditError
from jaxedit.layer_loop import Progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import activation, linear, wide
from jaxedit.models.sites import Seen, Site, prompt_ends
from jaxedit.models.transformer import (
    Context,
    Decoder,
    Params,
    after_mlp,
    key_of_input,
    layer,
    mlp_output,
)
from jaxedit.types import EditRequest

Linear = Literal["down", "up"]
Replace = Literal["prompt", "last", "all"]
_CHUNK = 1024  # queries whose distances are on the host at once

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-xl": {"layers": (35,), "linear": "up"},
    "gpt-j-6b": {"layers": (25,), "steps": 200, "replace": "last"},
    "llama-2-7b": {"layers": (27,), "steps": 50, "replace": "last"},
    "qwen2.5-7b": {"layers": (18,), "steps": 50, "replace": "last"},
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GraceState:
    """The codebook. keys ``[rows, d_in]``, values ``[rows, d_out]``, radii ``[rows]``; labels ``[rows, t]``: the
    target's tokens, -1 beyond them; owner: int32 ``[rows]``, the edit that made the row, -1 where it is free.

    Of each edit, in the order given: row, the row it uses, or -1 where it was withdrawn or overwritten; resized,
    before: the row whose ball it resized (-1: none), and that ball's radius before. given: how many edits there were,
    those withdrawn included.
    """

    keys: jax.Array
    values: jax.Array
    radii: jax.Array
    labels: jax.Array
    owner: jax.Array
    row: jax.Array
    resized: jax.Array
    before: jax.Array
    given: jax.Array
    layers: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    linear: Linear = dataclasses.field(metadata={"static": True})
    replace: Replace = dataclasses.field(metadata={"static": True})
    include_query: bool = dataclasses.field(metadata={"static": True})
    act: str = dataclasses.field(metadata={"static": True})

    @property
    def asks(self) -> int:
        return self.layers[0]

    @property
    def asks_at(self) -> Site:
        return "mlp_in" if self.linear == "up" else "mlp_key"

    @property
    def site(self) -> Site:
        return "mlp_key" if self.linear == "up" else "mlp_out"

    def find(self, queries):
        """The row whose ball holds each query ``[n, d_in]``, of which only the nearest is asked; -1 where it does not.
        A ball of radius 0 holds nothing."""
        row, distance = nearest(queries, self.keys, self.owner >= 0)
        return jnp.where((distance <= self.radii[row]) & (self.radii[row] > 0), row, -1)

    def decide(self, seen: Seen, context: Context, carried):
        return decide_at_ends(self.find, getattr(seen, self.asks_at), context, carried)

    def change(self, layer: int, seen: Seen, context: Context, decision):
        here, ends = jnp.arange(decision.shape[1]), prompt_ends(context)
        takes = _takes(self.replace, self.include_query, here, ends) & (decision >= 0)
        stands = getattr(seen, self.site)
        value = _standing(self.values[decision].astype(stands.dtype), self.linear, self.act)
        return jnp.where(takes[..., None], value, stands)

    def edits(self) -> np.ndarray:
        """The numbers of the edits still held, ascending."""
        return np.flatnonzero(np.asarray(self.row) >= 0)

    def without(self, edits: Collection[int]) -> GraceState:
        """Edits withdrawn, by their numbers. A row goes with the last edit that uses it, and a ball gets back the
        radius that it would have had without the edit; values stay as they are.

        Raises JaxEditError naming edits that are not held.
        """
        check_held(edits, self.edits())
        book = Book.of(self)
        for edit in sorted(edits):
            book.withdraw(edit)
        return dataclasses.replace(self, **book.arrays())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grace:
    """How balls are laid, and how their values are trained and used.

    layers: the one layer of the linear map; None: three quarters up, as published for GPT-2-XL. linear: "down", the
    MLP's second projection, or "up", its first one, where the MLP is not gated.
    radius: of a new ball, in units of the map's input, which differ from model to model.
    start: a new value is drawn from [0, 1) ("cold"), or is what the map says at the prompt's last token ("warm").
    steps, lr: Adam's, for each value.
    replace: whether a value takes the place of what the map says at the prompt's tokens, at its last token alone, or
    at all tokens, also those that follow. include_query: with "prompt", whether the last token is one of them; in
    published code it is not.
    """

    name: ClassVar[str] = "grace"
    separable: ClassVar[bool] = True  # whether one edit can be withdrawn from what was added

    layers: tuple[int, ...] | None = None
    linear: Linear = "down"
    radius: float = 1.0
    start: Literal["cold", "warm"] = "cold"
    steps: int = 100
    lr: float = 1.0
    replace: Replace = "prompt"
    include_query: bool = False

    def __post_init__(self):
        check_one_layer(self)
        _check_choice(self, "linear", ("down", "up"))
        _check_choice(self, "start", ("cold", "warm"))
        _check_choice(self, "replace", ("prompt", "last", "all"))
        _check(self, positive=("lr",), not_negative=("radius",))
        if self.steps < 1:
            raise JaxEditError(f"Grace.steps must be at least 1, got {self.steps}")
        if self.include_query and self.replace != "prompt":
            raise JaxEditError(f"Grace.include_query goes with replace='prompt', not with {self.replace!r}")

    def layer_in(self, config: ModelConfig) -> int:
        """The layer of the map. Raises JaxEditError where the model does not have it, or no such map there."""
        if self.linear == "up" and config.gated:
            raise JaxEditError(f"a gated MLP, as of {config.family}, has no one first projection; use linear='down'")
        chosen = chosen_layer(self, config, max(0, 3 * config.n_layer // 4 - 1))
        if self.replace == "prompt" and not self.include_query and chosen == config.n_layer - 1:
            raise JaxEditError("in the last layer, tokens before the prompt's last one have no effect: include_query")
        return chosen

    def empty(self, model: Decoder) -> GraceState:
        """A codebook without edits, for a model."""
        config, dtype = model.config, wide(model.dtype)
        wide_in, wide_out = (config.d_model, config.d_ff) if self.linear == "up" else (config.d_ff, config.d_model)
        free = jnp.full(ROOM, FREE, jnp.int32)
        return GraceState(
            keys=jnp.zeros((ROOM, wide_in), dtype),
            values=jnp.zeros((ROOM, wide_out), dtype),
            radii=jnp.zeros(ROOM, dtype),
            labels=jnp.full((ROOM, 1), -1, jnp.int32),
            owner=free,
            row=free,
            resized=free,
            before=jnp.zeros(ROOM, dtype),
            given=jnp.zeros((), jnp.int32),
            layers=(self.layer_in(config),),
            linear=self.linear,
            replace=self.replace,
            include_query=self.include_query,
            act=config.act,
        )

    def edit(
        self,
        model: Decoder,
        tokenizer,
        requests: Sequence[EditRequest],
        *,
        state: GraceState | None = None,
        seed: int = 0,
        on_progress: Progress | None = None,
    ) -> tuple[GraceState, dict[str, np.ndarray]]:
        """Balls for `requests`, one after the other, behind those of `state`; then their values.

        model: without adapters. seed: of cold values, with the edit's number. on_progress is told of "keys" and
        "values". An edit is made whether or not the model says its target already: leave out those that need none.
        Returns the codebook, and of each edit ``case [n]``: 0 new, 1 split, 2 covered, 3 inside, 4 overwritten; ``row
        [n]``; ``distance [n]`` to the nearest key then; and ``losses [n, steps]`` before each step of its value.

        Keys and values are float32 (float64 for a float64 model), whatever the dtype of the weights.
        Raises RequestError naming every request that cannot be carried out, JaxEditError where the settings do not fit
        the model or the state.
        """
        empty = self.empty(model)
        check_goes_on(state, empty)
        edits, index = tokenised(model, tokenizer, requests), empty.layers[0]
        longest = max(len(e.target) for e in edits)
        book = Book.of(empty if state is None else state, len(edits), -(-longest // 4) * 4)
        first = book.given
        found = read_last(_queries, model, at_prompts(edits), index, self.linear, on_progress=on_progress)
        cases, used, distances = _lay(book, edits, np.concatenate(found), self.radius, rounding(model.dtype))
        losses = self._train(model, edits, book, index, seed, first, cases, used, on_progress)
        traces = {"case": cases, "row": used, "distance": distances, "losses": losses}
        return dataclasses.replace(empty, **book.arrays()), traces

    def _train(self, model: Decoder, edits, book: Book, index: int, seed: int, first: int, cases, used, on_progress):
        """Train the values of the edits' rows. Edits of one row come in rounds, each going on from the one before."""
        fresh = ~np.isin(cases, [CASES.index("covered"), CASES.index("inside")])
        cold = np.asarray(drawn(seed, first + np.arange(len(edits)), book.values.shape[1]))
        losses = np.full((len(edits), self.steps), np.nan, np.float32)
        done = 0
        for members in rounds(used):
            for batch, rows in answer_batches([edits[i] for i in members]):
                at = members[batch.index]
                fill = np.pad(at, (0, batch.rows - len(at)), mode="edge")
                values = np.where(fresh[fill, None], cold[fill], book.values[used[fill]]).astype(book.values.dtype)
                value, log, _ = _train_values(model.params, model.config, rows, values, fresh[fill], self, index)
                book.values[used[at]], losses[at] = np.asarray(value)[: len(at)], np.asarray(log)[: len(at)]
                done += len(at)
                if on_progress is not None:
                    on_progress("values", done, len(edits))
        return losses


def rounds(used: np.ndarray) -> list[np.ndarray]:
    """Which edits can be trained together: the first of every row, then the second of every row, …"""
    turn, seen = np.zeros(len(used), np.int64), {}
    for i, row in enumerate(used.tolist()):
        turn[i] = seen[row] = seen.get(row, -1) + 1
    return [np.flatnonzero(turn == t) for t in range(int(turn.max()) + 1)]


def _lay(book: Book, edits: Sequence[EditTokens], queries: np.ndarray, radius: float, rounding: float):
    """Lay the balls of all edits in their order: case, row and distance to the nearest key, of each."""
    found = []
    for at in range(0, len(edits), _CHUNK):
        some = edits[at : at + _CHUNK]
        distances = Distances(queries[at : at + len(some)], book.keys)
        for i, edit in enumerate(some):
            label = np.full(book.labels.shape[1], -1, np.int32)
            label[: len(edit.target)] = edit.target
            found.append(book.insert(label, radius, i, distances, rounding))
    cases, rows, apart = zip(*found, strict=True)
    return np.asarray([CASES.index(c) for c in cases], np.int32), np.asarray(rows, np.int32), np.asarray(apart)


def _takes(replace: Replace, include_query: bool, here, ends):
    """Which tokens get a value, given their places and where their prompts end."""
    if replace == "prompt":
        return here <= ends if include_query else here < ends
    return here == ends if replace == "last" else jnp.ones(jnp.broadcast_shapes(here.shape, ends.shape), bool)


def _standing(value, linear: Linear, act: str):
    """What a value makes of its site: a first projection is followed by the activation."""
    return activation(value, act) if linear == "up" else value


def _queries(params: Params, config: ModelConfig, tokens, context: Context, index: int, linear: Linear):
    """The map's input at every token, ``[b, s, d_in]``."""
    x, _ = mlp_entry(params, config, tokens, context, index)
    return x if linear == "up" else key_of_input(layer(params, index), config, x)


@partial(jax.jit, static_argnames=("config", "settings", "index"))
def _train_values(params: Params, config: ModelConfig, rows: Answers, values, fresh, settings: Grace, index: int):
    """Values ``[n, d_out]`` of as many rows of the codebook, trained; see `descend`."""
    p, up = layer(params, index), settings.linear == "up"
    x, stream = mlp_entry(params, config, rows.tokens, rows.context, index)
    key = key_of_input(p, config, x)
    out = mlp_output(p, key)
    if settings.start == "warm":
        now = at_ends(linear(x, p["up"]) if up else out, rows)
        values = jnp.where(fresh[:, None], now.astype(values.dtype), values)
    stands, here = key if up else out, jnp.arange(out.shape[1])[None]

    def after(values, stream, stands, here):
        value = _standing(values[:, None].astype(stands.dtype), settings.linear, config.act)
        takes = _takes(settings.replace, settings.include_query, here, rows.ends[:, None])
        stands = jnp.where(takes[..., None], value, stands)
        return after_mlp(p, config, stream, mlp_output(p, stands) if up else stands)

    if settings.replace == "last":
        loss_of = answers_above(params, config, after_mlp(p, config, stream, out), rows, index + 1)
        parts = at_asks(stream, rows), at_asks(stands, rows), rows.asks
    else:
        loss_of = partial(nll_above, params, config, rows=rows, start=index + 1)
        parts = stream, stands, here
    return descend(lambda values: loss_of(after(values, *parts)), values, settings.steps, optax.adam(settings.lr))
