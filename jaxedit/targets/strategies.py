"""Targets: what each edited layer's output should become at the decisive token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.config import AnchorConfig, BackwardSpread, ForwardReplay, Method, PerLayer
from jaxedit.data.tokens import EditTokens, Packed, chunks, pack
from jaxedit.errors import JaxEditError
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import (
    Context,
    Params,
    after_mlp,
    embed,
    layer,
    mlp_output,
    run,
    to_key,
    window_of,
)
from jaxedit.targets.anchor import Anchors
from jaxedit.targets.anchor_room import Rooms
from jaxedit.targets.resumable import find_anchors_resumable


@dataclasses.dataclass(frozen=True)
class Targets:
    """Targets of n edits, which can be cached, compared, or made elsewhere from plain arrays.

    values: ``[len(layers), n, d_model]`` block outputs at the decisive token, or MLP outputs (`AnchorConfig.site`).
    With `BackwardSpread` only the last one is an anchor, and the others are what a division of the residual on the
    unedited model would aim at.
    lookup: ``[n]`` the decisive token's index in the clean prompt. anchors: per anchor layer, how it was found.
    keys: ``[len(layers), n, d_ff]`` keys of the replay (ForwardReplay with ``keys="replayed"``), else None.
    """

    layers: tuple[int, ...]
    values: np.ndarray
    lookup: np.ndarray | None = None
    anchors: dict[int, Anchors] = dataclasses.field(default_factory=dict)
    keys: np.ndarray | None = None

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(int(l) for l in self.layers))
        if np.ndim(self.values) != 3 or len(self.values) != len(self.layers):
            raise JaxEditError(
                f"Targets.values must have shape [{len(self.layers)} layers, n, d_model], got {np.shape(self.values)}"
            )

    def at(self, layer: int) -> np.ndarray:
        """Targets ``[n, d_model]`` of one layer."""
        if layer not in self.layers:
            raise JaxEditError(f"these targets are for layers {self.layers}; layer {layer} is not among them")
        return self.values[self.layers.index(layer)]

    def take(self, rows) -> Targets:
        """The targets of some of the edits, by their indices."""
        rows = np.asarray(rows, int)
        anchors = {l: _rows_of_anchors(a, rows) for l, a in self.anchors.items()}
        lookup = None if self.lookup is None else self.lookup[rows]
        keys = None if self.keys is None else self.keys[:, rows]
        return Targets(self.layers, self.values[:, rows], lookup, anchors, keys)


def join_targets(some: Sequence[Targets]) -> Targets:
    """Targets of edits that follow each other, of the same layers."""
    if len(some) == 1:
        return some[0]
    first = some[0]

    def joined(values, axis=0):
        return None if any(v is None for v in values) else np.concatenate(values, axis)

    anchors = {
        l: Anchors(
            *(np.concatenate(x) for x in zip(*(t.anchors[l][:4] for t in some), strict=True)),
            padding=float(np.mean([t.anchors[l].padding for t in some])),
        )
        for l in first.anchors
    }
    values, keys = joined([t.values for t in some], 1), joined([t.keys for t in some], 1)
    assert values is not None
    return Targets(first.layers, values, joined([t.lookup for t in some]), anchors, keys)


def _rows_of_anchors(anchors: Anchors, rows) -> Anchors:
    return Anchors(*(x[rows] for x in anchors[:4]), padding=anchors.padding)


def make_targets(
    params: Params,
    config: ModelConfig,
    edits: Sequence[EditTokens],
    method: Method,
    weights: np.ndarray,
    on_progress: Callable[[int], None] | None = None,
    anchor_cache: Path | None = None,
    rooms: Rooms | None = None,
) -> Targets:
    """Anchors and per-layer targets on the model as it is. `weights` of the contexts are used for replayed keys.

    anchor_cache: see `jaxedit.targets.resumable`, which also shares the anchors out between processes.
    """
    layers, mlp = method.layers, method.anchor.of_mlp
    now = None
    if isinstance(method.targets, BackwardSpread) or any(e.goal == "keep" for e in edits):
        now = clean_states(params, config, edits, layers, mlp)
    anchors = {}
    for l in method.targets.anchor_layers(layers):
        kept = None if now is None else now[layers.index(l)]
        anchors[l] = anchors_of(params, config, edits, l, method.anchor, kept, on_progress, anchor_cache, rooms)
    lookup = np.asarray([e.contexts[0].lookup for e in edits], np.int32)
    keys = None
    match method.targets:
        case ForwardReplay():
            first = anchors[layers[0]]
            values, keys = replay(params, config, edits, layers, first.value - first.init, weights, method.keys, mlp)
            values = values.astype(first.value.dtype)  # those of a bfloat16 model would round the anchor
            values[0] = first.value
        case BackwardSpread():
            last = anchors[layers[-1]]
            shares = np.asarray([method.targets.share(len(layers) - i) for i in range(len(layers))])
            values = np.asarray(now) + shares[:, None, None] * (last.value - np.asarray(now)[-1])
            values[-1] = last.value
        case PerLayer():
            values = np.stack([anchors[l].value for l in layers])
    return Targets(layers, values, lookup, anchors, keys)


def anchors_of(
    params: Params,
    config: ModelConfig,
    edits: Sequence[EditTokens],
    layer: int,
    settings: AnchorConfig,
    kept: np.ndarray | None,
    on_progress: Callable[[int], None] | None = None,
    anchor_cache: Path | None = None,
    rooms: Rooms | None = None,
) -> Anchors:
    """Anchors of all edits; those with the goal "keep" have `kept` ``[n, d_model]`` for theirs, without a search."""
    chosen, n = [i for i, e in enumerate(edits) if e.goal != "keep"], len(edits)
    found = None
    if chosen:
        arguments = (params, config, [edits[i] for i in chosen], layer, settings, on_progress, rooms)
        found = find_anchors_resumable(*arguments, checkpoint=anchor_cache)
    if found is not None and len(chosen) == n:
        return found
    assert kept is not None
    made = Anchors(
        np.array(kept),
        np.array(kept),
        np.zeros(n, np.int32),
        np.full((n, settings.steps, 4), np.nan, kept.dtype),
        1.0 if found is None else found.padding,
    )
    for whole, some in zip(made[:4], found[:4] if found is not None else (), strict=False):
        whole[chosen] = some
    return made


def clean_states(params: Params, config: ModelConfig, edits: Sequence[EditTokens], layers, mlp: bool = False):
    """What targets are compared with at the decisive token of the clean prompt, ``[layers, n, d_model]``: block
    outputs, or where `mlp` the MLPs'."""
    rows = pack([(e.contexts[0],) for e in edits], until_lookup=True)
    delta = np.zeros((len(edits), config.d_model), np.float32)
    return _replayed(params, config, rows, layers, delta, False, mlp)[0][:, :, 0]


def replay(params: Params, config: ModelConfig, edits, layers, delta, weights, keys: str, mlp: bool = False):
    """Run the model forward from the first layer with `delta` added to its output, or where `mlp` to its MLP's
    output, at the decisive token.

    Returns those outputs ``[layers, n, d_model]`` of the clean prompt and, for ``keys="replayed"``, the keys
    ``[layers, n, d_ff]`` averaged over contexts with `weights`.
    """
    wanted = keys == "replayed"
    rows: Packed = pack([e.contexts if wanted else e.contexts[:1] for e in edits], until_lookup=True)
    states, found = _replayed(params, config, rows, layers, delta, wanted, mlp)
    averaged = np.einsum("lnpf,p->lnf", found, weights) if found is not None else None
    return states[:, :, 0].copy(), averaged


def _replayed(params, config: ModelConfig, rows: Packed, layers, delta, with_keys: bool, mlp: bool):
    """States ``[layers, n, rows, d_model]`` and keys ``[layers, n, rows, d_ff]`` at the decisive tokens."""
    parts = [
        _replay(params, config, part[:4], layers, part[4], with_keys, mlp)
        for part in chunks((*rows.as_tuple(), delta), rows.tokens.shape[1])
    ]
    states = np.concatenate([np.asarray(s) for s, _ in parts], 1)[:, : len(delta)]
    keys = np.concatenate([np.asarray(k) for _, k in parts], 1)[:, : len(delta)] if with_keys else None
    return states, keys


@partial(jax.jit, static_argnames=("config", "layers", "with_keys", "mlp"))
def _replay(params, config: ModelConfig, rows, layers, delta, with_keys: bool, mlp: bool):
    tokens, positions, segments, lookup = (jnp.asarray(x) for x in rows)
    context, first, last = Context(positions, segments), layers[0], layers[-1]
    here = partial(jnp.take_along_axis, indices=lookup[..., None], axis=1)
    where = jnp.arange(len(lookup))[:, None], lookup
    blocks = [layer(params, l) for l in layers]

    h = run(params, config, embed(params, config, tokens, context), context, 0, first)
    stream, key, _, _ = to_key(blocks[0], config, h, context, window_of(config, first))
    out = mlp_output(blocks[0], key)
    added = jnp.broadcast_to(delta[:, None].astype(out.dtype), (*lookup.shape, out.shape[-1]))
    out = out.at[where].add(added) if mlp else out
    h = after_mlp(blocks[0], config, stream, out)
    h = h if mlp else h.at[where].add(added)
    states, keys = [here(out if mlp else h)], [here(key)]
    if last > first:

        def probe(inside):
            return here(inside.h), here(inside.key)

        _, (more, more_keys) = run(params, config, h, context, first + 1, last + 1, probe=probe)
        for l, block in zip(layers[1:], blocks[1:], strict=True):
            keys.append(more_keys[l - first - 1])
            states.append(mlp_output(block, keys[-1]) if mlp else more[l - first - 1])
    return jnp.stack(states), jnp.stack(keys) if with_keys else None
