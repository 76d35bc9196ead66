"""WISE: changes of one matrix beside the model, used where an input is moved far enough by them.

Wang et al., "WISE: rethinking the knowledge memory for lifelong model editing" (2024). A side memory is a change D of
the second projection W of one layer's MLP, and W stays as it is. Every shard of edits trains a random share of D's
entries; shards are merged in turn. An input is given the memory that moves it furthest, if that is far enough.

How far is a mean over the tokens of the prompt alone, in training too, so that the answer does not depend on what is
generated; and it is compared with how far the edits' own prompts were moved, without a context.
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
from jax import lax

from jaxedit.adapters.merging import MERGES
from jaxedit.adapters.rows import ROOM, check_held
from jaxedit.adapters.settings import check_goes_on, check_one_layer, chosen_layer
from jaxedit.adapters.training import Answers, answers, descend, mlp_entry, nll_above, tokenised
from jaxedit.adapters.wise_memories import Shelf
from jaxedit.config import _check, _check_choice
from jaxedit.data.templates import sample_templates
from jaxedit.data.tokens import CLEAN, EditTokens, Row, encode
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.batching import MIN_LENGTH, bucket
from jaxedit.layer_loop import Progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import activation, wide
from jaxedit.models.sites import Seen, Site, at_prompt_end
from jaxedit.models.transformer import Context, Decoder, Params, after_mlp, key_of_input, layer, mlp_output
from jaxedit.targets.anchor_step import safe_norm
from jaxedit.types import EditRequest

Measure = Literal["difference", "activation"]
STEADY, SMALL = 1e-4, 0.02  # an edit is done when its loss changes by no more than this, and is no more than that
TEXTS = 5  # contexts of each length

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-xl": {"layers": (8,), "steps": 40, "act_ratio": 0.8},
    "gpt-j-6b": {"layers": (21,), "outside": 15.0, "inside": 40.0, "between": 20.0},
    "llama-2-7b": {"layers": (27,)},
    "mistral-7b": {"layers": (27,)},
    "llama-3-8b": {"layers": (29,), "lr": 0.9, "steps": 30, "outside": 2.0, "act_ratio": 0.5},
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WiseState:
    """The side memories. deltas ``[memories, d_ff, d_model]``, zero where there is none; least ``[memories]``, the
    smallest distance that an edit was left at (infinite without edits); seeds, of the entries that are trained;
    merged, whether a memory is made of several shards. memory: int32 ``[edits]``, the memory of each edit, -1 where it
    was withdrawn. given: how many edits there were, those withdrawn included.
    """

    deltas: jax.Array
    least: jax.Array
    seeds: jax.Array
    merged: jax.Array
    memory: jax.Array
    given: jax.Array
    layers: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    act_ratio: float = dataclasses.field(metadata={"static": True})
    measure: Measure = dataclasses.field(metadata={"static": True})
    act: str = dataclasses.field(metadata={"static": True})

    site: ClassVar[Site] = "mlp_out"
    asks_at: ClassVar[Site] = "mlp_out"

    @property
    def asks(self) -> int:
        return self.layers[0]

    def decide(self, seen: Seen, context: Context, carried):
        """The memory of each token's prompt, -1 for none, and what it adds to the token."""
        assert seen.mlp_key is not None and seen.mlp_out is not None
        moved = jnp.stack([_moved(seen.mlp_key, delta) for delta in self.deltas])
        apart = _distance(moved, seen.mlp_out, self.measure, self.act)
        segments = context.segments
        upto = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
        upto = jnp.tril(upto).astype(apart.dtype)
        mean = jnp.einsum("bst,mbt->mbs", upto, apart, precision=lax.Precision.HIGHEST)
        mean = mean / jnp.maximum(upto.sum(-1), 1)
        fires = mean > (self.act_ratio * self.least)[:, None, None]
        which = jnp.where(fires.any(0), jnp.where(fires, mean, -1).argmax(0).astype(jnp.int32), -1)
        known, carry = at_prompt_end(which, context, carried)
        added = jnp.take_along_axis(moved, jnp.maximum(known, 0)[None, ..., None], 0)[0]
        return (known, added), carry

    def change(self, layer: int, seen: Seen, context: Context, decision):
        known, added = decision
        assert seen.mlp_out is not None
        return jnp.where((known >= 0)[..., None], (seen.mlp_out + added).astype(seen.mlp_out.dtype), seen.mlp_out)

    def edits(self) -> np.ndarray:
        """The numbers of the edits still held, ascending."""
        return np.flatnonzero(np.asarray(self.memory) >= 0)

    def without(self, edits: Collection[int]) -> WiseState:
        """Edits withdrawn, by their numbers. Edits of one memory share all its entries: they can only go together.

        Raises JaxEditError naming edits that are not held, and others that are left in the memories.
        """
        check_held(edits, self.edits())
        memory, chosen = np.array(self.memory), set(edits)
        gone = sorted({int(memory[e]) for e in chosen})
        left = [e for e in np.flatnonzero(np.isin(memory, gone)).tolist() if e not in chosen]
        if left:
            raise JaxEditError(f"edits {left} are in the same memories; withdraw them too, and edit again what is kept")
        memory[sorted(chosen)] = -1
        at = np.asarray(gone, np.int32)
        return dataclasses.replace(
            self,
            deltas=self.deltas.at[at].set(0),
            least=self.least.at[at].set(jnp.inf),
            merged=self.merged.at[at].set(False),
            memory=jnp.asarray(memory),
        )


def _moved(key, delta):
    """What a memory adds ``[b, s, d_model]`` to the MLP's output of keys ``[b, s, d_ff]``; float32 (float64)."""
    return jnp.einsum("bsf,fd->bsd", key.astype(delta.dtype), delta, precision=lax.Precision.HIGHEST)


def _distance(moved, out, measure: Measure, act: str):
    """How far each token is moved, ``[…, s]``; gradient 0 where it is not at all."""
    if measure == "activation":
        base = out.astype(moved.dtype)
        moved = activation(base + moved, act) - activation(base, act)
    return safe_norm(moved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wise:
    """How edits are trained into memories, and when these are used.

    layers: the one layer of the second projection; None: 27 parts of 32 up, as published for Llama-2-7B.
    share: of the entries that a shard trains, drawn at random. lr, steps: of plain gradient descent, at most, for each
    edit. limit: the largest size of an entry of D.
    outside, inside, between: the margins α, β and γ of how far an unrelated text may be moved, how far an edit's must
    be, and how much further. act_ratio: of the smallest distance of a memory's edits, from which on it is used.
    measure: how far a token is moved: by the difference that D makes, or, as in published code, by the difference of
    the activation function of both outputs.
    save_every, merge_every: edits in a shard, and edits after which full shards are merged. merge, density: how, or
    "none", and the share of a shard's entries that is kept.
    contexts: lengths in tokens of the texts, five of each, that the model is sampled for and prompts are put after.
    unrelated: texts that no edit is about, one an edit in turn. (Neighbourhood prompts are for evaluation alone.)
    """

    name: ClassVar[str] = "wise"
    separable: ClassVar[bool] = False  # whether one edit can be withdrawn from what was added

    layers: tuple[int, ...] | None = None
    share: float = 0.2
    lr: float = 1.0
    steps: int = 70
    limit: float = 1.0
    outside: float = 5.0
    inside: float = 20.0
    between: float = 10.0
    act_ratio: float = 0.88
    measure: Measure = "difference"
    save_every: int = 500
    merge_every: int = 1000
    merge: Literal["ties", "slerp", "none"] = "ties"
    density: float = 0.53
    contexts: tuple[int, ...] = (5, 10)
    unrelated: tuple[str, ...] = (
        "How many days are there in a leap year?",
        "Water freezes at a temperature of",
        "The opposite of slowly is",
        "who wrote the first novel in english",
        "She put the cup on the table and",
        "What is the largest animal that lives in the sea?",
        "def add(a, b): return",
        "The recipe calls for two eggs and",
    )

    def __post_init__(self):
        for name in ("contexts", "unrelated"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_one_layer(self)
        _check_choice(self, "measure", ("difference", "activation"))
        _check_choice(self, "merge", (*MERGES, "none"))
        margins = ("outside", "inside", "between", "act_ratio")
        _check(self, positive=("lr", "limit"), not_negative=margins, shares=("share", "density"))
        if self.steps < 1 or not self.unrelated:
            raise JaxEditError("Wise.steps must be at least 1, and Wise.unrelated must not be empty")
        if self.save_every < 1 or self.merge_every % self.save_every or self.merge_every < 2 * self.save_every:
            raise JaxEditError(
                f"Wise.merge_every must be a multiple of save_every, and at least twice as much; got "
                f"{self.merge_every} and {self.save_every}"
            )

    def layer_in(self, config: ModelConfig) -> int:
        """The layer of the second projection. Raises JaxEditError where the model does not have it."""
        return chosen_layer(self, config, 27 * config.n_layer // 32)

    def empty(self, model: Decoder) -> WiseState:
        """No side memory yet, for a model."""
        config, dtype = model.config, wide(model.dtype)
        return WiseState(
            deltas=jnp.zeros((1, config.d_ff, config.d_model), dtype),
            least=jnp.full(1, jnp.inf, dtype),
            seeds=jnp.zeros(1, jnp.int32),
            merged=jnp.zeros(1, bool),
            memory=jnp.full(ROOM, -1, jnp.int32),
            given=jnp.zeros((), jnp.int32),
            layers=(self.layer_in(config),),
            act_ratio=self.act_ratio,
            measure=self.measure,
            act=config.act,
        )

    def edit(
        self,
        model: Decoder,
        tokenizer,
        requests: Sequence[EditRequest],
        *,
        state: WiseState | None = None,
        seed: int = 0,
        on_progress: Progress | None = None,
    ) -> tuple[WiseState, dict[str, np.ndarray]]:
        """Requests trained into memories, one after the other; the first into one of `state` that is not full.

        model: without adapters. seed: of contexts, and, with the number of its first edit, of a new memory's entries.
        on_progress is told of "edits".
        Returns the memories, and of each edit ``steps [n]``, the updates made; ``losses [n, steps]`` before each (NaN
        beyond them); and ``distance [n]``, how far its prompt alone is moved when it is done.

        Memories are float32 (float64 for a float64 model), whatever the dtype of the weights.
        Raises RequestError naming every request, or unrelated text, that does not fit the model, JaxEditError where the
        settings do not fit the model or the state.
        """
        empty = self.empty(model)
        check_goes_on(state, empty)
        state = empty if state is None else state
        groups = [sample_templates(model, tokenizer, seed, TEXTS, length)[1] for length in self.contexts]
        edits = tokenised(model, tokenizer, requests, (*CLEAN, *groups))
        shelf, first = Shelf.of(state, len(edits)), int(state.given)
        every = self._rows(edits, self._others(model, tokenizer), first)
        losses, steps = np.full((len(edits), self.steps), np.nan, np.float32), np.zeros(len(edits), np.int32)
        distance, entries = np.zeros(len(edits), np.float32), {}
        for i, rows in enumerate(every):
            at = shelf.open(self.save_every, seed + first + i)
            if at not in entries:
                entries = {at: _entries(int(shelf.seeds[at]), shelf.deltas[at].shape, self.share)}
            found = _write(model.params, model.config, rows, shelf.deltas[at], entries[at], self, empty.layers[0])
            shelf.deltas[at] = found[0]
            distance[i], losses[i], steps[i] = (np.asarray(x) for x in found[1:])
            shelf.least[at] = min(shelf.least[at], distance[i])
            shelf.memory[first + i] = at
            if shelf.edits(at) >= self.save_every:
                entries = {}
                shelf.merge(self.merge, self.density, self.save_every, self.merge_every)
            if on_progress is not None:
                on_progress("edits", i + 1, len(edits))
        given = jnp.asarray(first + len(edits), jnp.int32)
        made = dataclasses.replace(empty, **shelf.arrays(), given=given)
        return made, {"steps": steps, "losses": losses, "distance": distance}

    def _others(self, model: Decoder, tokenizer) -> list[Row]:
        rows = [Row(tuple(encode(tokenizer, text)[0]), 0) for text in self.unrelated]
        most = model.config.max_positions
        bad = [t for t, row in zip(self.unrelated, rows, strict=True) if not 0 < len(row.tokens) <= most]
        if bad:
            raise RequestError(
                [f"unrelated text {t!r} does not fit the model, which takes 1 to {most} tokens" for t in bad]
            )
        return rows

    def _rows(self, edits: Sequence[EditTokens], others: Sequence[Row], first: int) -> list[Answers]:
        """Of each edit its prompt in every context, and one unrelated text; all of one shape."""
        others = [others[(first + i) % len(others)] for i in range(len(edits))]
        length = bucket(max(len(row.tokens) for e, o in zip(edits, others, strict=True) for row in (*e.contexts, o)))
        most = bucket(max(len(e.target) for e in edits))
        made = []
        for edit, other in zip(edits, others, strict=True):
            apart = [dataclasses.replace(edit, contexts=(row,)) for row in edit.contexts]
            apart.append(dataclasses.replace(edit, contexts=(other,), target=(0,)))
            rows = answers(apart, max(length, MIN_LENGTH), most)
            made.append(dataclasses.replace(rows, real=rows.real.at[-1].set(0)))
        return made


@partial(jax.jit, static_argnames=("shape", "share"))
def _entries(seed, shape: tuple[int, int], share: float):
    """Which entries are trained, boolean ``[d_ff, d_model]``."""
    return jax.random.bernoulli(jax.random.key(seed), share, shape)


@partial(jax.jit, static_argnames=("config", "settings", "index"))
def _write(params: Params, config: ModelConfig, rows: Answers, delta, entries, settings: Wise, index: int):
    """D after one edit, how far its first row is moved, losses, and the number of updates. The last is unrelated."""
    p = layer(params, index)
    x, stream = mlp_entry(params, config, rows.tokens, rows.context, index)
    key = key_of_input(p, config, x)
    out = mlp_output(p, key)
    prompt = ((jnp.arange(out.shape[1]) <= rows.ends[:, None]) & (rows.mask > 0)).astype(delta.dtype)
    told = jax.tree.map(lambda x: x[:-1], rows)

    def distances(moved):
        apart = _distance(moved, out, settings.measure, config.act)
        return (apart * prompt).sum(-1) / prompt.sum(-1)

    def loss(delta):
        moved = _moved(key, delta[0])
        h = after_mlp(p, config, stream, (out + moved).astype(out.dtype))[:-1]
        far = distances(moved)
        inside, outside = far[:-1], far[-1:]
        margins = (outside - settings.outside, settings.inside - inside, outside - inside + settings.between)
        said = nll_above(params, config, h, told, index + 1).mean()
        return (said + sum(map(_hinge, margins)))[None]

    def stop(now, before):
        return (abs(now - before) <= STEADY) & (now <= SMALL)

    mask = optax.stateless(lambda grad, _: jax.tree.map(lambda g: jnp.where(entries, g, 0), grad))
    made, log, count = descend(
        loss,
        delta[None],
        settings.steps,
        optax.chain(mask, optax.sgd(settings.lr)),
        stop=stop,
        project=lambda x: jnp.clip(x, -settings.limit, settings.limit),
    )
    return made[0], distances(_moved(key, made[0]))[0], log[0], count[0]


def _hinge(x):
    """The mean over positive entries; 0 where there is none."""
    return jnp.maximum(x, 0).sum() / jnp.maximum((x > 0).sum(), 1)
