"""MELO: clusters of keys that say which small block of LoRA weights an input is given.

Yu et al., "MELO: enhancing model editing with neuron-indexed dynamic LoRA" (2023). The key is the output of one layer's
MLP at the last token of the prompt, below every layer that has LoRA weights: so all clusters are laid first, and then
all blocks, each of one batch of edits, are trained at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxedit.adapters.codebook import decide_at_ends, drawn, nearest, widened
from jaxedit.adapters.melo_index import CASES, Index
from jaxedit.adapters.rows import FREE, ROOM, at_prompts, check_held, owners, read_last, rounding
from jaxedit.adapters.settings import check_goes_on
from jaxedit.adapters.training import TOKENS, Answers, answers, descend, mlp_entry, nll_above, tokenised
from jaxedit.config import _check
from jaxedit.data.tokens import EditTokens
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.batching import MIN_LENGTH, bucket
from jaxedit.layer_loop import Progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.sites import Seen, Site
from jaxedit.models.transformer import Context, Decoder, Params, embed, key_of_input, layer, mlp_output, run
from jaxedit.types import EditRequest

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-xl": {
        "index": 35,
        "layers": (36, 37),
        "radius": 0.5,
        "alpha": 700.0,
        "spread": 700**-0.5,
        "batch": 4,
        "lr": 1e-3,
        "halve_every": 30,
    },
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeloState:
    """Clusters: centres ``[clusters, d_model]``, radii, labels (the target's tokens, -1 beyond them), live. Points:
    points ``[points, d_model]``, cluster (-1: free), block (-1: none), and owner, the edit that a point is of.

    a ``[blocks, layers, d_ff, rank]``, b ``[blocks, layers, rank, d_model]``: the LoRA weights. given: how many edits
    there were, those withdrawn included.
    """

    centres: jax.Array
    radii: jax.Array
    labels: jax.Array
    live: jax.Array
    points: jax.Array
    cluster: jax.Array
    block: jax.Array
    owner: jax.Array
    given: jax.Array
    a: jax.Array
    b: jax.Array
    index: int = dataclasses.field(metadata={"static": True})
    layers: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})

    site: ClassVar[Site] = "mlp_out"
    asks_at: ClassVar[Site] = "mlp_out"

    @property
    def asks(self) -> int:
        return self.index

    def find(self, queries):
        """The block of the nearest point of the cluster that holds each query ``[n, d_model]``, of which only the
        nearest is asked; -1 where there is none."""
        cluster, distance = nearest(queries, self.centres, self.live)
        point, _ = nearest(queries, self.points, self.cluster == cluster[:, None])
        return jnp.where(distance <= self.radii[cluster], self.block[point], -1)

    def decide(self, seen: Seen, context: Context, carried):
        return decide_at_ends(self.find, seen.mlp_out, context, carried)

    def change(self, layer: int, seen: Seen, context: Context, decision):
        """Only what is asked for is computed: nothing, one block a row, or every token's of all blocks."""
        assert seen.mlp_key is not None and seen.mlp_out is not None
        a, b = (x[:, self.layers.index(layer)] for x in (self.a, self.b))
        key, out = seen.mlp_key.astype(a.dtype), seen.mlp_out
        row = decision.max(1)

        def by_row(_):
            at = jnp.maximum(row, 0)
            return _low_rank(key, a[at], b[at])

        def by_token(_):
            low = jnp.einsum("bsf,nfr->bsnr", key, a)
            own = jax.nn.one_hot(decision, len(a), dtype=a.dtype)
            return jnp.einsum("bsnr,bsn,nrd->bsd", low, own, b)

        which = jnp.where((decision < 0).all(), 0, jnp.where((decision == row[:, None]).all(), 1, 2))
        none = jnp.zeros(out.shape, a.dtype)
        more = lax.switch(which, (lambda _: none, by_row, by_token), None)
        return jnp.where((decision >= 0)[..., None], (out + self.scale * more).astype(out.dtype), out)

    def edits(self) -> np.ndarray:
        """The numbers of the edits still held, ascending. A split forgets the points that it leaves outside."""
        return owners(self.owner)

    def without(self, edits: Collection[int]) -> MeloState:
        """Edits withdrawn, by their numbers. Where the points of an edit lay, no block is used any more, and a cluster
        without any is dropped; other clusters, and blocks that other edits share, stay as they are.

        Raises JaxEditError naming edits that are not held.
        """
        check_held(edits, self.edits())
        index = Index.of(self)
        for edit in edits:
            index.withdraw(edit)
        return dataclasses.replace(self, **index.arrays())


def _low_rank(key, a, b):
    return jnp.einsum("bsr,brd->bsd", jnp.einsum("bsf,bfr->bsr", key, a), b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Training:
    """The same change with one block for each run of rows, which nothing has to be asked for."""

    a: jax.Array
    b: jax.Array
    layers: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})

    site: ClassVar[Site] = "mlp_out"
    asks: ClassVar[None] = None
    asks_at: ClassVar[None] = None

    def decide(self, seen: Seen, context: Context, carried):
        return None, None

    def change(self, layer: int, seen: Seen, context: Context, decision):
        assert seen.mlp_key is not None and seen.mlp_out is not None
        a, b = (x[:, self.layers.index(layer)] for x in (self.a, self.b))
        key = seen.mlp_key.astype(a.dtype)
        more = _low_rank(key.reshape(len(a), -1, key.shape[-1]), a, b)
        return (seen.mlp_out + self.scale * more.reshape(seen.mlp_out.shape)).astype(seen.mlp_out.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Melo:
    """How inputs are clustered, and how blocks are trained.

    index: the layer whose MLP's output is the key; None: three quarters up. layers: those that get LoRA weights, on
    the MLP's second projection; None: the two above the index.
    radius: of a new cluster, in units of the MLP's output, which differ from model to model.
    rank, alpha: of a block; the change is ``alpha / rank · A B``. In published code alpha is the number of columns of
    all blocks together, so that the step depends on how many there are room for.
    spread: A is drawn from [-spread, spread); None: 1 / √d_ff. B begins at 0.
    batch: edits that share a block. steps, lr, halve_every: Adam's, for each block, and the steps after which the
    rate is halved.
    """

    name: ClassVar[str] = "melo"
    separable: ClassVar[bool] = True  # whether one edit can be withdrawn from what was added

    index: int | None = None
    layers: tuple[int, ...] | None = None
    radius: float = 0.5
    rank: int = 2
    alpha: float = 8.0
    spread: float | None = None
    batch: int = 4
    steps: int = 50
    lr: float = 1e-2
    halve_every: int = 20

    def __post_init__(self):
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        positive = ("lr", "alpha") if self.spread is None else ("lr", "alpha", "spread")
        _check(self, positive=positive, not_negative=("radius",))
        if min(self.rank, self.batch, self.steps, self.halve_every) < 1:
            raise JaxEditError("Melo.rank, batch, steps and halve_every must be at least 1")

    def layers_in(self, config: ModelConfig) -> tuple[int, tuple[int, ...]]:
        """The index layer and the layers with LoRA weights. Raises JaxEditError where a model has no such layers."""
        n = config.n_layer
        index = max(0, 3 * n // 4 - 1) if self.index is None else self.index
        layers = tuple(l for l in (index + 1, index + 2) if l < n) if self.layers is None else self.layers
        if not layers or not 0 <= index < layers[0] or layers[-1] >= n:
            raise JaxEditError(
                f"the index layer ({index}) must lie below those with LoRA weights ({layers}), and these within the "
                f"model's layers 0 to {n - 1}"
            )
        return index, layers

    def empty(self, model: Decoder) -> MeloState:
        """An index without edits, for a model."""
        config, dtype = model.config, wide(model.dtype)
        (index, layers), n = self.layers_in(config), ROOM
        vectors, free = jnp.zeros((n, config.d_model), dtype), jnp.full(n, FREE, jnp.int32)
        return MeloState(
            centres=vectors,
            radii=jnp.zeros(n, dtype),
            labels=jnp.full((n, 1), -1, jnp.int32),
            live=jnp.zeros(n, bool),
            points=vectors,
            cluster=free,
            block=free,
            owner=free,
            given=jnp.zeros((), jnp.int32),
            a=jnp.zeros((n, len(layers), config.d_ff, self.rank), dtype),
            b=jnp.zeros((n, len(layers), self.rank, config.d_model), dtype),
            index=index,
            layers=layers,
            scale=self.alpha / self.rank,
        )

    def edit(
        self,
        model: Decoder,
        tokenizer,
        requests: Sequence[EditRequest],
        *,
        state: MeloState | None = None,
        seed: int = 0,
        on_progress: Progress | None = None,
    ) -> tuple[MeloState, dict[str, np.ndarray]]:
        """Clusters for `requests`, `batch` of them after the other, behind those of `state`; then each batch's block.

        model: without adapters. seed: of A, with the number of the block's first edit. on_progress is told of "keys"
        and "blocks". Returns the index, and of each edit ``case [n]``: 0 new, 1 split, 2 joined, 3 overwritten; ``block
        [n]``; and ``losses [n, steps]``, its block's mean loss before each step.

        Vectors and blocks are float32 (float64 for a float64 model), whatever the dtype of the weights.
        Raises RequestError naming every request that cannot be carried out, JaxEditError where the settings do not fit
        the model or the state.
        """
        empty = self.empty(model)
        check_goes_on(state, empty)
        state = empty if state is None else state
        edits = tokenised(model, tokenizer, requests)
        longest = -(-max(len(e.target) for e in edits) // 4) * 4
        index = Index.of(state, len(edits), longest)
        first, noise = index.given, rounding(model.dtype)
        queries = np.concatenate(read_last(_queries, model, at_prompts(edits), empty.index, on_progress=on_progress))
        labels = np.full((len(edits), index.labels.shape[1]), -1, np.int32)
        for i, edit in enumerate(edits):
            labels[i, : len(edit.target)] = edit.target
        groups = [np.arange(at, min(at + self.batch, len(edits))) for at in range(0, len(edits), self.batch)]
        cases, blocks = [], []
        for group in groups:
            blocks.append(index.free_block())
            cases += index.insert_batch(queries[group], labels[group], self.radius, blocks[-1], noise)
        a, b, losses = self._train(model, edits, groups, empty, seed, first, on_progress)
        rows = bucket(max(blocks) + 1, ROOM)
        a_all, b_all = (widened(np.asarray(x), rows, 0) for x in (state.a, state.b))
        a_all[blocks], b_all[blocks] = a, b
        each = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
        traces = {
            "case": np.asarray([CASES.index(c) for c in cases], np.int32),
            "block": np.asarray(blocks, np.int32)[each],
            "losses": losses[each],
        }
        return dataclasses.replace(empty, **index.arrays(), a=jnp.asarray(a_all), b=jnp.asarray(b_all)), traces

    def _train(self, model: Decoder, edits: Sequence[EditTokens], groups, empty: MeloState, seed, first, on_progress):
        """A, B and losses of each group's block."""
        config, n = model.config, len(groups)
        length = bucket(max(len(e.contexts[0].tokens) for e in edits), MIN_LENGTH)
        most = bucket(max(len(e.target) for e in edits))
        lanes = max(1, min(bucket(n), TOKENS // (self.batch * length)))
        shape = (n, *empty.a.shape[1:])
        spread = config.d_ff**-0.5 if self.spread is None else self.spread
        start = np.asarray(drawn(seed, first + np.asarray([g[0] for g in groups]), int(np.prod(shape[1:]))))
        a = ((2 * start - 1) * spread).reshape(shape).astype(empty.a.dtype)
        b = np.zeros((n, *empty.b.shape[1:]), empty.b.dtype)
        losses = np.zeros((n, self.steps), np.float32)
        for at in range(0, n, lanes):
            here = np.minimum(np.arange(at, at + lanes), n - 1)
            members = np.concatenate([np.resize(groups[i], self.batch) for i in here])
            real = np.concatenate([np.arange(self.batch) < len(groups[i]) for i in here])
            rows = answers([edits[i] for i in members], length, most)
            found = _train_blocks(model.params, config, rows, real, a[here], self, empty.layers)
            some = slice(at, min(at + lanes, n))
            a[some], b[some], losses[some] = (np.asarray(x)[: some.stop - at] for x in found)
            if on_progress is not None:
                on_progress("blocks", some.stop, n)
        return a, b, losses


def _queries(params: Params, config: ModelConfig, tokens, context: Context, index: int):
    """The MLP's output at every token, ``[b, s, d_model]``."""
    p = layer(params, index)
    return mlp_output(p, key_of_input(p, config, mlp_entry(params, config, tokens, context, index)[0]))


@partial(jax.jit, static_argnames=("config", "settings", "layers"))
def _train_blocks(params, config: ModelConfig, rows: Answers, real, a, settings: Melo, layers):
    """A ``[lanes, layers, d_ff, rank]`` and B, trained on the lanes' rows, and the losses ``[lanes, steps]``."""
    lanes = len(a)
    h = run(params, config, embed(params, config, rows.tokens, rows.context), rows.context, 0, layers[0])
    b = jnp.zeros((*a.shape[:2], settings.rank, config.d_model), a.dtype)
    weight = real.reshape(lanes, -1).astype(a.dtype)

    def loss(blocks):
        adapter = _Training(blocks[0], blocks[1], layers, settings.alpha / settings.rank)
        each = nll_above({**params, "adapters": (adapter,)}, config, h, rows, layers[0])
        return (each.reshape(lanes, -1) * weight).sum(1) / weight.sum(1)

    rate = optax.exponential_decay(settings.lr, settings.halve_every, 0.5, staircase=True)
    (a, b), log, _ = descend(loss, (a, b), settings.steps, optax.adam(rate))
    return a, b, log
