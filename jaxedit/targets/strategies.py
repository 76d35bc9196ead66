"""Targets: what each edited layer's output should become at the decisive token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.config import BackwardSpread, ForwardReplay, Method, PerLayer
from jaxedit.data.tokens import EditTokens, Packed, chunks, pack
from jaxedit.errors import JaxEditError
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import Context, Params, embed, run
from jaxedit.targets.anchor import Anchors
from jaxedit.targets.resumable import find_anchors_resumable


@dataclasses.dataclass(frozen=True)
class Targets:
    """Targets of n edits, which can be cached, compared, or made elsewhere from plain arrays.

    values: ``[len(layers), n, d_model]`` block outputs at the decisive token. With `BackwardSpread` only the last
    one is an anchor, and the others are what a division of the residual on the unedited model would aim at.
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


def make_targets(
    params: Params,
    config: ModelConfig,
    edits: Sequence[EditTokens],
    method: Method,
    weights: np.ndarray,
    on_progress: Callable[[int], None] | None = None,
    anchor_cache: Path | None = None,
) -> Targets:
    """Anchors and per-layer targets on the model as it is. `weights` of the contexts are used for replayed keys.

    anchor_cache: see `jaxedit.targets.resumable`, which also shares the anchors out between processes.
    """
    layers = method.layers
    anchors = {
        l: find_anchors_resumable(params, config, edits, l, method.anchor, on_progress, checkpoint=anchor_cache)
        for l in method.targets.anchor_layers(layers)
    }
    lookup = np.asarray([e.contexts[0].lookup for e in edits], np.int32)
    keys = None
    match method.targets:
        case ForwardReplay():
            first = anchors[layers[0]]
            values, keys = replay(params, config, edits, layers, first.value - first.init, weights, method.keys)
            values[0] = first.value
        case BackwardSpread():
            last = anchors[layers[-1]]
            now = clean_states(params, config, edits, layers)
            shares = np.asarray([method.targets.share(len(layers) - i) for i in range(len(layers))])
            values = now + shares[:, None, None] * (last.value - now[-1])
            values[-1] = last.value
        case PerLayer():
            values = np.stack([anchors[l].value for l in layers])
    return Targets(layers, values, lookup, anchors, keys)


def clean_states(params: Params, config: ModelConfig, edits: Sequence[EditTokens], layers) -> np.ndarray:
    """Block outputs at the decisive token of the clean prompt, ``[layers, n, d_model]``."""
    rows = pack([(e.contexts[0],) for e in edits], until_lookup=True)
    delta = np.zeros((len(edits), config.d_model), np.float32)
    return _replayed(params, config, rows, layers, delta, False)[0][:, :, 0]


def replay(params: Params, config: ModelConfig, edits, layers, delta, weights, keys: str):
    """Run the model forward from the first layer with `delta` added to its output at the decisive token.

    Returns block outputs ``[layers, n, d_model]`` of the clean prompt and, for ``keys="replayed"``, the keys
    ``[layers, n, d_ff]`` averaged over contexts with `weights`.
    """
    wanted = keys == "replayed"
    rows: Packed = pack([e.contexts if wanted else e.contexts[:1] for e in edits], until_lookup=True)
    states, found = _replayed(params, config, rows, layers, delta, wanted)
    averaged = np.einsum("lnpf,p->lnf", found, weights) if found is not None else None
    return states[:, :, 0].copy(), averaged


def _replayed(params, config: ModelConfig, rows: Packed, layers, delta, with_keys: bool):
    """States ``[layers, n, rows, d_model]`` and keys ``[layers, n, rows, d_ff]`` at the decisive tokens."""
    parts = [
        _replay(params, config, part[:4], layers, part[4], with_keys)
        for part in chunks((*rows.as_tuple(), delta), rows.tokens.shape[1])
    ]
    states = np.concatenate([np.asarray(s) for s, _ in parts], 1)[:, : len(delta)]
    keys = np.concatenate([np.asarray(k) for _, k in parts], 1)[:, : len(delta)] if with_keys else None
    return states, keys


@partial(jax.jit, static_argnames=("config", "layers", "with_keys"))
def _replay(params, config: ModelConfig, rows, layers, delta, with_keys: bool):
    tokens, positions, segments, lookup = (jnp.asarray(x) for x in rows)
    context, first, last = Context(positions, segments), layers[0], layers[-1]
    at = lookup[..., None]

    def probe(inside):
        here = partial(jnp.take_along_axis, indices=at, axis=1)
        return here(inside.h), here(inside.key) if with_keys else None

    h = embed(params, config, tokens, context)
    h, before = run(params, config, h, context, 0, first + 1, probe=probe)
    changed = jnp.take_along_axis(h, at, 1) + delta[:, None].astype(h.dtype)
    h = h.at[jnp.arange(len(h))[:, None], lookup].set(changed)
    states, keys = changed[None], None if not with_keys else before[1][-1:]
    if last > first:
        _, (more, more_keys) = run(params, config, h, context, first + 1, last + 1, probe=probe)
        picked = jnp.asarray([l - first - 1 for l in layers[1:]])
        states = jnp.concatenate([states, more[picked]])
        keys = None if keys is None else jnp.concatenate([keys, more_keys[picked]])
    return states, keys
