"""The layer loop: keys, residual, solve and write, from the lowest edited layer up.

Only the decisive token and what comes before it matters to keys and residuals, and nothing below the first edited
layer changes: the rows are cut at the decisive token, run once up to the first edited layer, and carried from layer
to layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.config import BackwardSpread, Method
from jaxedit.data.tokens import Packed, chunks, pack
from jaxedit.export.patch import Delta, add, delta_dtype, with_matrices
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import (
    Context,
    Decoder,
    Params,
    embed,
    from_key,
    layer,
    run,
    to_key,
    window_of,
)
from jaxedit.solvers.ridge import Factor, Solution, solve, solve_all
from jaxedit.targets.resumable import find_anchors_resumable
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


@partial(jax.jit, static_argnames=("config", "start"))
def _to_last(band, config: ModelConfig, h, context, lookup, start: int):
    """Hidden states at the decisive token after the last edited layer, ``[n, d_model]``."""
    h = run(band, config, h, context, start, config.n_layer)
    return jnp.take_along_axis(h, lookup[:, :1, None], 1)[:, 0]


class LayerLoop:
    """The edited layers from the bottom up. `band` holds just those blocks, their edited matrices in float32."""

    def __init__(self, base: Decoder, config, method: Method, edits, weights, factor: Factor, past, clock, cache=None):
        self.base, self.config, self.method, self.edits, self.clock = base, config, method, edits, clock
        self.anchor_cache = cache
        self.weights, self.factor, self.past = weights, factor, past
        layers = method.layers
        self.first, last = layers[0], layers[-1]
        self.band_config = dataclasses.replace(
            config, n_layer=last - self.first + 1, windows=config.windows[self.first : last + 1]
        )
        self.band = {"blocks": jax.tree.map(lambda x: x[self.first : last + 1], base.params["blocks"])}
        down = self.band["blocks"]["down"]
        self.originals = {l: np.asarray(down["w"][l - self.first]) for l in layers}
        self.band["blocks"]["down"] = {**down, "w": down["w"].astype(delta_dtype(base))}
        self.solutions: dict[int, Solution] = {}
        self.deltas: dict[int, Delta] = {}
        self.all_keys = dict(past)
        self.key_norms: dict[int, float] = {}
        self.last_states: list[np.ndarray] = []

    def run(self, targets: Targets | None, on_progress: Progress | None) -> Targets:
        params, config, layers = self.base.params, self.config, self.method.layers
        replayed = targets.keys if targets is not None and self.method.keys == "replayed" else None
        clean = Group.enter(params, config, pack([e.contexts[:1] for e in self.edits], True), self.first)
        others = None
        if len(self.weights) > 1 and replayed is None:
            others = Group.enter(params, config, pack([e.contexts[1:] for e in self.edits], True), self.first)
        operators = None if replayed is None else self._operators(replayed)
        anchors = {} if targets is None else dict(targets.anchors)
        known = {} if targets is None else {l: targets.at(l) for l in targets.layers}
        for i, l in enumerate(layers):
            keys, halves = self._keys(clean, others, l)
            before = [_finish(self.band, self.band_config, s, k, l - self.first) for s, k in halves[0]]
            self._record_last(clean, before, l)
            if isinstance(self.method.targets, BackwardSpread):
                rest = known[layers[-1]] - self.last_states[-1]
                residual = rest * self.method.targets.share(len(layers) - i)
            else:
                if l not in known:  # PerLayer: on the model as edited so far
                    anchors[l] = self._anchors(l, on_progress)
                    known[l] = anchors[l].value
                residual = known[l] - clean.at_lookup(before)
            with self.clock("solve"):
                if operators is None or replayed is None:
                    self._write(l, keys, solve(self.factor, l, keys, residual))
                else:
                    x, error = operators[i]
                    self._write(l, replayed[i], Solution(x, residual.astype(np.float64), float(error)))
            self._advance([clean, others] if l != layers[-1] else [clean], halves, l)
            if l != layers[-1]:
                self._skip_to(clean, others, l + 1, layers[i + 1])
            if on_progress is not None:
                on_progress("layers", i + 1, len(layers))
        self.last_states.append(clean.at_lookup(clean.h))
        if targets is None or not set(layers) <= set(targets.layers):
            lookup = np.asarray([e.contexts[0].lookup for e in self.edits], np.int32)
            targets = Targets(tuple(known), np.stack(list(known.values())), lookup, anchors)
        return targets

    def _operators(self, keys: np.ndarray) -> list:
        """All layers solved at once, which replayed keys make possible: they are known before the first edit."""
        with self.clock("solve"):
            return list(zip(*solve_all(self.factor, keys, self.method.layers), strict=True))

    def _keys(self, clean: Group, others: Group | None, l: int):
        """Keys ``[n, d_ff]``, averaged over contexts with the published weights, and the halves of the block."""
        groups, found, halves = [clean] + ([others] if others else []), [], []
        for group in groups:
            parts = [
                _look(self.band, self.band_config, h, c, at, l - self.first)
                for h, c, at in zip(group.h, group.context, group.lookup, strict=True)
            ]
            found.append(group.gather(p[2] for p in parts))
            halves.append([p[:2] for p in parts])
        keys = np.concatenate(found, 1).astype(delta_dtype(self.base))
        weights = self.weights[: keys.shape[1]] / self.weights[: keys.shape[1]].sum()
        return np.einsum("npf,p->nf", keys, weights.astype(keys.dtype)), halves

    def _record_last(self, clean: Group, old, l: int):
        start = l - self.first + 1
        self.last_states.append(
            clean.gather(
                _to_last(self.band, self.band_config, h, c, at, start)
                for h, c, at in zip(old, clean.context, clean.lookup, strict=True)
            )
        )

    def _anchors(self, l: int, on_progress):
        """An anchor on the model as edited so far."""
        model = self.base
        if self.solutions:
            model = with_matrices(self.base, {m: np.asarray(self._matrix(m)) for m in self.solutions})
        with self.clock("targets"):
            report = anchor_progress(on_progress, self.edits)
            arguments = (model.params, self.config, self.edits, l, self.method.anchor, report)
            return find_anchors_resumable(*arguments, checkpoint=self.anchor_cache)

    def _matrix(self, l: int):
        return self.band["blocks"]["down"]["w"][l - self.first]

    def _write(self, l: int, keys: np.ndarray, solution: Solution):
        """Put the layer's update into the band."""
        past = self.past.get(l)
        self.solutions[l] = solution
        self.all_keys[l] = keys if past is None else np.concatenate([past, keys])
        self.key_norms[l] = float(np.linalg.norm(keys, axis=1).mean())
        self.deltas[l] = Delta.of(solution.left, solution.right, delta_dtype(self.base))
        down = self.band["blocks"]["down"]
        new = add(self.originals[l].astype(down["w"].dtype), self.deltas[l])
        down = {**down, "w": down["w"].at[l - self.first].set(new)}
        self.band = {"blocks": {**self.band["blocks"], "down": down}}

    def _advance(self, groups, halves, l: int):
        """Hidden states after the edited layer."""
        for group, half in zip(groups, halves, strict=False):
            if group is not None:
                group.h = [_finish(self.band, self.band_config, s, k, l - self.first) for s, k in half]

    def _skip_to(self, clean: Group, others: Group | None, start: int, stop: int):
        """Run the layers between two edited ones that are not next to each other."""
        for group in (clean, others):
            if group is not None and stop > start:
                span = (start - self.first, stop - self.first)
                group.h = [
                    _between(self.band, self.band_config, h, c, *span)
                    for h, c in zip(group.h, group.context, strict=True)
                ]


@partial(jax.jit, static_argnames=("config", "start", "stop"))
def _between(band, config, h, context, start: int, stop: int):
    return run(band, config, h, context, start, stop)
