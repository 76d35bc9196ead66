"""Checkpoint tensors to parameters and back, by rules that hold in both directions.

A rule names a checkpoint tensor, the parameters it fills, and one layout string (einops notation) whose left side is
the checkpoint's and whose right side is ours. Swapping the sides inverts it, so loading and saving cannot disagree.

- ``"o i -> i o"``: a transpose.
- ``"(q+k+v) i -> i (q+k+v)"``: several parameters concatenated along one axis of the tensor.
- ``"(n three h) i -> three i (n h)"``: several parameters interleaved; the first axis on the right counts them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import einops
import numpy as np

from jaxedit.errors import CheckpointError
from jaxedit.models.config import ModelConfig

_FUSED = re.compile(r"\([a-z+]*\+[a-z+]*\)")


@dataclasses.dataclass(frozen=True)
class Rule:
    """`source`: tensor name with ``{}`` for the layer; `target`: dotted parameter paths, space-separated."""

    source: str
    target: str
    layout: str

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.target.split())

    @property
    def stacked(self) -> bool:
        return "{}" in self.source


@dataclasses.dataclass(frozen=True)
class Family:
    """How one model type is read: see `jaxedit.models.families`."""

    config_from_hf: object
    rules: tuple[Rule, ...]
    buffers: tuple[str, ...] = ()  # regular expressions of constants that old checkpoints carry
    prefix: str = ""  # left out by checkpoints of the bare model, e.g. "transformer."


def _axes(config: ModelConfig) -> dict[str, int]:
    return {"n": config.n_head, "h": config.head_dim}


def _used(layout: str, config: ModelConfig) -> dict[str, int]:
    return {k: v for k, v in _axes(config).items() if re.search(rf"\b{k}\b", layout)}


def to_parameters(
    rule: Rule, tensor: np.ndarray, shapes: Sequence[tuple[int, ...]], config: ModelConfig
) -> list[np.ndarray]:
    """The parameters that `tensor` holds. `shapes` are theirs, without the layer axis.

    Raises ValueError where the tensor cannot have the layout or the result has another shape.
    """
    left, right = rule.layout.split(" -> ")
    fused = _FUSED.search(left)
    try:
        if fused:
            token = fused.group()
            axis, at = _position(left, token), _position(right, token)
            sizes = [s[at] for s in shapes]
            if tensor.ndim <= axis or tensor.shape[axis] != sum(sizes):
                raise ValueError
            pieces = np.split(tensor, np.cumsum(sizes)[:-1], axis)
            layout = rule.layout.replace(token, "x")
            out = [einops.rearrange(p, layout) for p in pieces]
        else:
            out = einops.rearrange(tensor, rule.layout, **_used(rule.layout, config))
            out = list(out) if len(shapes) > 1 else [out]
    except einops.EinopsError as error:
        raise ValueError from error
    if [p.shape for p in out] != [tuple(s) for s in shapes]:
        raise ValueError
    return out


def to_tensor(rule: Rule, parameters: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
    """The checkpoint tensor that holds `parameters` (without the layer axis)."""
    left, right = rule.layout.split(" -> ")
    fused = _FUSED.search(left)
    if fused:
        token = fused.group()
        back = f"{right} -> {left}".replace(token, "x")
        pieces = [einops.rearrange(p, back) for p in parameters]
        return np.concatenate(pieces, _position(left, token))
    value = np.stack(parameters) if len(parameters) > 1 else parameters[0]
    return np.ascontiguousarray(einops.rearrange(value, f"{right} -> {left}", **_used(rule.layout, config)))


def permutation(rule: Rule) -> tuple[int, ...] | None:
    """The axes of the tensor in the parameter's order, where the layout does nothing else; otherwise None."""
    left, right = (side.split() for side in rule.layout.split(" -> "))
    plain = len(rule.targets) == 1 and sorted(left) == sorted(right) and "(" not in rule.layout
    return tuple(left.index(axis) for axis in right) if plain else None


def _position(side: str, token: str) -> int:
    return re.findall(r"\([^)]*\)|\S+", side).index(token)


def expected_shape(rule: Rule, shapes: Sequence[tuple[int, ...]], config: ModelConfig) -> tuple[int, ...]:
    """The shape that the checkpoint tensor of `rule` must have (for messages)."""
    blanks = [np.broadcast_to(np.int8(0), s) for s in shapes]
    return to_tensor(rule, blanks, config).shape


def plan(
    family: Family, config: ModelConfig, names: Sequence[str], shapes: Mapping[str, tuple], where: str
) -> list[tuple[Rule, list[str]]]:
    """Which tensor names each rule reads, strict both ways.

    Raises CheckpointError naming every tensor that is missing or that no rule uses.
    """
    available = {n for n in names if not any(re.fullmatch(b, n) for b in family.buffers)}
    bare = family.prefix and not any(n.startswith(family.prefix) for n in available)
    steps, wanted = [], set()
    for rule in family.rules:
        if any(t not in shapes for t in rule.targets):
            continue  # this configuration has no such parameter (a bias, an untied unembedding)
        source = rule.source.removeprefix(family.prefix) if bare else rule.source
        layers = range(config.n_layer) if rule.stacked else [0]
        used = [source.format(l) if rule.stacked else source for l in layers]
        steps.append((rule, used))
        wanted.update(used)
    filled = [t for rule, _ in steps for t in rule.targets]
    if sorted(filled) != sorted(shapes):
        odd = set(shapes) ^ set(filled) or {t for t in filled if filled.count(t) > 1}
        raise CheckpointError(f"rules of family {config.family!r} do not fill each parameter once: {sorted(odd)}")
    missing, extra = sorted(wanted - available), sorted(available - wanted - _duplicates(config, available))
    if missing or extra:
        lines = [f"missing tensor {n!r}" for n in missing] + [f"unexpected tensor {n!r}" for n in extra]
        raise CheckpointError(f"{where} does not fit its config.json:\n  " + "\n  ".join(lines))
    return steps


def _duplicates(config: ModelConfig, names) -> set[str]:
    """A tied unembedding that the checkpoint stores a second time; the loader checks that it is the same."""
    return {n for n in names if config.tied and n in ("lm_head.weight", "embed_out.weight")}


def nest(flat: Mapping[str, object]) -> dict:
    """``{"a.b": x}`` to ``{"a": {"b": x}}``."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for p in parents:
            node = node.setdefault(p, {})
        node[last] = value
    return tree


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, path + "."))
        else:
            flat[path] = value
    return flat
