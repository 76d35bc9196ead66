"""The layer loop: keys, residual, solve and write, from the lowest edited layer up.

Only the decisive token and what comes before it matters to keys and residuals, and nothing below the first edited
layer changes: the rows are cut at the decisive token, run once up to the first edited layer, and carried from layer
to layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.config import BackwardSpread, JacobianSpread, Method
from jaxedit.data.tokens import Packed, chunks, pack
from jaxedit.export.patch import Delta, add, delta_dtype, with_matrices
from jaxedit.models.config import ModelConfig
from jaxedit.models.stretch import between, make_stretch
from jaxedit.models.transformer import (
    Context,
    Decoder,
    Params,
    after_mlp,
    embed,
    from_key,
    layer,
    mlp_output,
    run,
    to_key,
    window_of,
)
from jaxedit.regularise import regularise
from jaxedit.solvers.prepare import Prepared, operators, solve_layer
from jaxedit.solvers.ridge import Solution
from jaxedit.targets.pull_back import least_change
from jaxedit.targets.strategies import Targets

Progress = Callable[[str, int, int], None]


def anchor_progress(on_progress: Progress | None, edits):
    if on_progress is None:
        return None
    done = [0]

    def report(more: int):
        done[0] += more
        on_progress("anchors", min(done[0], len(edits)), len(edits))

    return report


@dataclasses.dataclass
class Group:
    """Packed rows cut at the decisive token, in chunks of one shape, with the hidden states entering a layer."""

    context: list[Context]
    lookup: list[jax.Array]
    h: list[jax.Array]
    n: int

    @classmethod
    def enter(cls, params: Params, config: ModelConfig, packed: Packed, first: int) -> Group:
        made = cls([], [], [], len(packed.tokens))
        for tokens, positions, segments, lookup in chunks(packed.as_tuple(), packed.tokens.shape[1]):
            context = Context(jnp.asarray(positions), jnp.asarray(segments))
            made.context.append(context)
            made.lookup.append(jnp.asarray(lookup))
            made.h.append(_enter(params, config, tokens, context, first))
        return made

    def gather(self, parts) -> np.ndarray:
        """The chunks' results as one array of n rows."""
        return np.concatenate([np.asarray(p) for p in parts])[: self.n]

    def at_lookup(self, states) -> np.ndarray:
        """States ``[n, d_model]`` at the first row's decisive token, from hidden states of each chunk."""
        picked = (jnp.take_along_axis(h, at[:, :1, None], 1)[:, 0] for h, at in zip(states, self.lookup, strict=True))
        return self.gather(picked)


@partial(jax.jit, static_argnames=("config", "first"))
def _enter(params, config: ModelConfig, tokens, context, first: int):
    return run(params, config, embed(params, config, tokens, context), context, 0, first)


@partial(jax.jit, static_argnames=("config",))
def _look(band, config: ModelConfig, h, context, lookup, index):
    """Half a block: what its MLP will be given, and the keys ``[n, p, d_ff]`` at the decisive tokens."""
    stream, key, _, _ = to_key(layer(band, index), config, h, context, window_of(config, index))
    return stream, key, jnp.take_along_axis(key, lookup[..., None], 1)


@partial(jax.jit, static_argnames=("config",))
def _finish(band, config: ModelConfig, stream, key, index):
    return from_key(layer(band, index), config, stream, key)


@partial(jax.jit, static_argnames=("config", "start", "mlp"))
def _to_last(band, config: ModelConfig, h, context, lookup, start: int, mlp: bool):
    """What the last edited layer makes of the decisive token, ``[n, d_model]``: its output, or its MLP's."""
    last = config.n_layer - 1
    h = run(band, config, h, context, start, last)
    block = layer(band, last)
    stream, key, _, _ = to_key(block, config, h, context, window_of(config, last))
    out = mlp_output(block, key)
    return jnp.take_along_axis(out if mlp else after_mlp(block, config, stream, out), lookup[:, :1, None], 1)[:, 0]


@jax.jit
def _mlp_output(band, key, lookup, index):
    """What the MLP of one layer makes of the decisive token of the first row, ``[n, d_model]``."""
    return mlp_output(layer(band, index), jnp.take_along_axis(key, lookup[:, :1, None], 1)[:, 0])


@partial(jax.jit, static_argnames=("config", "index", "iterations", "site"))
def _pull_back(
    band, config: ModelConfig, stream, key, context, lookup, rest, index: int, damping, iterations: int, site: str
):
    above = {"blocks": jax.tree.map(lambda x: x[index:], band["blocks"])}
    part = between(config, index, config.n_layer - 1)
    of = make_stretch(above, part, stream, key, context, lookup[:, 0], site, site)
    return least_change(of, rest, damping, iterations)[0]


class Part(NamedTuple):
    """Edits that are solved for together, by their indices, and what with."""

    rows: np.ndarray
    prepared: Prepared


class LayerLoop:
    """The edited layers from the bottom up. `band` holds just those blocks, their edited matrices in float32.

    contexts: the weight of each context in a key ``[p]``. parts: the sum of their updates is written. emphasis: None,
    or the weight of each edit in the solve ``[n]``. find: (params, layer) -> Anchors, for targets that are found on
    the model as edited so far.
    """

    def __init__(
        self, base: Decoder, method: Method, edits, contexts, parts: Sequence[Part], find, clock, emphasis=None
    ):
        self.base, self.config, self.method, self.edits, self.clock = base, base.config, method, edits, clock
        self.contexts, self.parts, self.find = contexts, parts, find
        self.scale = None if emphasis is None else np.sqrt(np.asarray(emphasis, np.float64))[:, None]
        layers = method.layers
        self.first, self.last = layers[0], layers[-1]
        self.mlp = method.anchor.of_mlp
        self.band_config = between(self.config, self.first, self.last)
        self.band = {"blocks": jax.tree.map(lambda x: x[self.first : self.last + 1], base.params["blocks"])}
        down = self.band["blocks"]["down"]
        self.originals = {l: np.asarray(down["w"][l - self.first]) for l in layers}
        self.band["blocks"]["down"] = {**down, "w": down["w"].astype(delta_dtype(base))}
        self.solutions: dict[int, Solution] = {}
        self.deltas: dict[int, Delta] = {}
        self.keys: dict[int, np.ndarray] = {}
        self.last_states: list[np.ndarray] = []

    def run(self, targets: Targets | None, on_progress: Progress | None) -> Targets:
        layers = self.method.layers
        replayed = targets.keys if targets is not None and self.method.keys == "replayed" else None
        clean, others = self.enter(replayed is None)
        entered = clean.h
        if replayed is not None and self.scale is not None:
            replayed = replayed * self.scale
        operators = None if replayed is None else self._operators(replayed)
        anchors = {} if targets is None else dict(targets.anchors)
        known = {} if targets is None else {l: targets.at(l) for l in targets.layers}
        for i, l in enumerate(layers):
            keys, own, halves = self.keys_at(clean, others, l)
            before = [_finish(self.band, self.band_config, s, k, l - self.first) for s, k in halves[0]]
            self._record_last(clean, before, halves[0], l)
            if isinstance(self.method.targets, BackwardSpread):
                rest = known[layers[-1]] - self.last_states[-1]
                residual = rest * self.method.targets.share(len(layers) - i)
                if isinstance(self.method.targets, JacobianSpread) and l != layers[-1]:
                    residual = self._pulled_back(clean, halves[0], l, residual)
            else:
                if l not in known:  # PerLayer: on the model as edited so far
                    anchors[l] = self.find(self._edited().params, l)
                    known[l] = anchors[l].value
                residual = known[l] - (self._mlp_outputs(clean, halves[0], l) if self.mlp else clean.at_lookup(before))
            with self.clock("solve"):
                if operators is None or replayed is None:
                    keys = keys if self.scale is None else keys * self.scale
                    self._write(l, keys, self._solve(l, keys, own, residual))
                else:
                    x, error = operators[i]
                    right = residual.astype(np.float64) if self.scale is None else residual * self.scale
                    self._write(l, replayed[i], Solution(x, right, float(error)))
            if l == layers[-1]:
                self._record_last(clean, self._advance([clean], halves, l), halves[0], l)
            else:
                self.go_on(clean, others, halves, i)
            if on_progress is not None:
                on_progress("layers", i + 1, len(layers))
        self._trim(clean, entered)
        if targets is None or not set(layers) <= set(targets.layers):
            lookup = np.asarray([e.contexts[0].lookup for e in self.edits], np.int32)
            targets = Targets(tuple(known), np.stack(list(known.values())), lookup, anchors)
        return targets

    def _pulled_back(self, clean: Group, half, l: int, rest: np.ndarray) -> np.ndarray:
        """The change of layer l's output that becomes `rest` ``[n, d_model]`` at the last edited layer."""
        how = self.method.targets
        assert isinstance(how, JacobianSpread)
        found, start = [], 0
        for (stream, key), context, at in zip(half, clean.context, clean.lookup, strict=True):
            mine = rest[start : start + len(at)]
            mine = np.pad(mine, ((0, len(at) - len(mine)), (0, 0)))  # rows that fill the last chunk up
            arguments = (stream, key, context, at, mine, l - self.first, how.damping, how.iterations)
            found.append(_pull_back(self.band, self.band_config, *arguments, "mlp_out" if self.mlp else "block_out"))
            start += len(at)
        return clean.gather(found)

    def _operators(self, keys: np.ndarray) -> list:
        """All layers solved at once, which replayed keys make possible: they are known before the first edit."""
        with self.clock("solve"):
            (part,) = self.parts
            return list(zip(*operators(part.prepared, keys, self.method.layers), strict=True))

    def _solve(self, l: int, keys: np.ndarray, clean: np.ndarray, residual: np.ndarray) -> Solution:
        if self.scale is not None:
            clean, residual = clean * self.scale, residual * self.scale
        found = [solve_layer(p.prepared, l, keys[p.rows], residual[p.rows], clean[p.rows]) for p in self.parts]
        if len(found) == 1:
            return found[0]
        left, right = np.concatenate([s.left for s in found], 1), np.concatenate([s.right for s in found])
        return Solution(left, right, max(s.residual for s in found))

    def enter(self, with_others: bool) -> tuple[Group, Group | None]:
        """The clean prompts up to the first edited layer, and those in contexts where their keys count."""
        params, others = self.base.params, None
        clean = Group.enter(params, self.config, pack([e.contexts[:1] for e in self.edits], True), self.first)
        if with_others and self.contexts[1:].any():
            others = Group.enter(params, self.config, pack([e.contexts[1:] for e in self.edits], True), self.first)
        return clean, others

    def go_on(self, clean: Group, others: Group | None, halves, i: int):
        """From the halves of the i-th edited layer to what enters the next one."""
        layers = self.method.layers
        self._advance([clean, others], halves, layers[i])
        self._skip_to(clean, others, layers[i] + 1, layers[i + 1])

    def keys_at(self, clean: Group, others: Group | None, l: int):
        """Keys ``[n, d_ff]``, averaged over contexts, those of the clean prompt, and the halves of the block."""
        groups, found, halves = [clean] + ([others] if others else []), [], []
        for group in groups:
            parts = [
                _look(self.band, self.band_config, h, c, at, l - self.first)
                for h, c, at in zip(group.h, group.context, group.lookup, strict=True)
            ]
            found.append(group.gather(p[2] for p in parts))
            halves.append([p[:2] for p in parts])
        keys = np.concatenate(found, 1).astype(delta_dtype(self.base))
        weights = self.contexts[: keys.shape[1]] / self.contexts[: keys.shape[1]].sum()
        return np.einsum("npf,p->nf", keys, weights.astype(keys.dtype)), keys[:, 0], halves

    def _mlp_outputs(self, clean: Group, half, l: int) -> np.ndarray:
        index = l - self.first
        return clean.gather(
            _mlp_output(self.band, key, at, index) for (_, key), at in zip(half, clean.lookup, strict=True)
        )

    def _record_last(self, clean: Group, after, half, l: int):
        """What the last edited layer now makes of the edits, given hidden states after layer l."""
        if l == self.last:
            now = self._mlp_outputs(clean, half, l) if self.mlp else clean.at_lookup(after)
        else:
            start = l - self.first + 1
            now = clean.gather(
                _to_last(self.band, self.band_config, h, c, at, start, self.mlp)
                for h, c, at in zip(after, clean.context, clean.lookup, strict=True)
            )
        self.last_states.append(now)

    def _edited(self) -> Decoder:
        """The model as edited so far."""
        if not self.deltas:
            return self.base
        down = self.band["blocks"]["down"]["w"]
        return with_matrices(self.base, {m: np.asarray(down[m - self.first]) for m in self.deltas})

    def _write(self, l: int, keys: np.ndarray, solution: Solution):
        """Put the layer's update into the band."""
        how, left, right = self.method.regulariser, solution.left, solution.right
        self.solutions[l], self.keys[l] = solution, keys
        if how is not None and how.when == "layer":
            left, right = regularise(how, self.originals[l], left, right)
        self._put(l, left, right)

    def _put(self, l: int, left, right):
        self.deltas[l] = Delta.of(left, right, delta_dtype(self.base))
        down = self.band["blocks"]["down"]
        new = add(self.originals[l].astype(down["w"].dtype), self.deltas[l])
        down = {**down, "w": down["w"].at[l - self.first].set(new)}
        self.band = {"blocks": {**self.band["blocks"], "down": down}}

    def _trim(self, clean: Group, entered):
        """Regularise the updates of all layers, where that is done at the end, and see what is left of their effect."""
        how = self.method.regulariser
        if how is None or how.when != "end":
            return
        for l, solution in self.solutions.items():
            self._put(l, *regularise(how, self.originals[l], solution.left, solution.right))
        self.last_states[-1] = clean.gather(
            _to_last(self.band, self.band_config, h, c, at, 0, self.mlp)
            for h, c, at in zip(entered, clean.context, clean.lookup, strict=True)
        )

    def _advance(self, groups, halves, l: int):
        """Hidden states after the edited layer; returns those of the first group."""
        for group, half in zip(groups, halves, strict=False):
            if group is not None:
                group.h = [_finish(self.band, self.band_config, s, k, l - self.first) for s, k in half]
        return groups[0].h

    def _skip_to(self, clean: Group, others: Group | None, start: int, stop: int):
        """Run the layers between two edited ones that are not next to each other."""
        for group in (clean, others):
            if group is not None and stop > start:
                span = (start - self.first, stop - self.first)
                group.h = [
                    _between(self.band, self.band_config, h, c, *span)
                    for h, c in zip(group.h, group.context, strict=True)
                ]


def edit_keys(model: Decoder, method: Method, edits, contexts) -> dict[int, np.ndarray]:
    """Keys ``{layer: [n, d_ff]}`` of the edits in a model as it is, averaged over contexts with their weights."""
    loop = LayerLoop(model, method, edits, contexts, (), None, None)
    clean, others = loop.enter(True)
    found = {}
    for i, l in enumerate(method.layers):
        found[l], _, halves = loop.keys_at(clean, others, l)
        if l != method.layers[-1]:
            loop.go_on(clean, others, halves, i)
    return found


@partial(jax.jit, static_argnames=("config", "start", "stop"))
def _between(band, config, h, context, start: int, stop: int):
    return run(band, config, h, context, start, stop)
