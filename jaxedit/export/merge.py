"""Several patches of one model as one patch, and a report of where they conflict."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxedit.errors import PatchError
from jaxedit.export.patch import Delta, EditPatch, delta_dtype, make_patch, sum_deltas
from jaxedit.models.fingerprint import matrix_hash
from jaxedit.models.transformer import Decoder


@dataclasses.dataclass(frozen=True)
class Conflict:
    """Two patches with a request for the same prompt; spaces aside, prompts and targets are compared as written.

    kind: "repeats" has the same target, so that the fact is pushed twice; "updates" has another one, by a patch made
        on top of the other's edits, so that the later target holds; "contradicts" has another one by a patch that
        knew nothing of the other, so that neither may hold.
    patches: positions of the two, the earlier first, and so `targets` and `ids`.
    """

    kind: Literal["repeats", "updates", "contradicts"]
    prompt: str
    patches: tuple[int, int]
    targets: tuple[str, str]
    ids: tuple[str | int | None, str | int | None]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How the updates of one layer lie to each other.

    patches: positions of those that edit the layer. norms: ‖Δᵢ‖ (Frobenius) of each. cosines: ⟨Δᵢ, Δⱼ⟩ / ‖Δᵢ‖‖Δⱼ‖,
    0 where a norm is. ratio: ‖ΣΔ‖ / √Σ‖Δ‖², which is 1 for orthogonal updates, √k for k equal ones, 0 for ones that
    cancel.
    """

    layer: int
    patches: tuple[int, ...]
    norms: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]
    ratio: float


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """names: of the patches. on_top_of: of each, the positions of those whose edits its own base holds."""

    names: tuple[str, ...]
    on_top_of: tuple[tuple[int, ...], ...]
    conflicts: tuple[Conflict, ...]
    overlaps: tuple[Overlap, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def merge_patches(
    patches: Sequence[EditPatch], base: Decoder, names: Sequence[str] | None = None
) -> tuple[EditPatch, MergeReport]:
    """One patch on `base` that adds the updates of all patches, and how they get along.

    patches: made on `base`, or on top of earlier ones of the list, as a stream of edits makes them.
    names: what messages and the report call them; by default "patch 1" and so on.
    Low-rank updates are joined factor by factor, and kept dense where that is smaller. The merged patch is applied and
    withdrawn exactly as any other. It rounds each matrix to the model's dtype once, where patches applied one after
    another round each time, so the two may differ by roundings. Requests are kept in order, repeated ones too.
    Nothing is decided about conflicts: merging adds, and whoever merges reads the report. It is made in float64 from
    the factors.
    Raises PatchError naming every patch, and its layers, whose base is neither `base` nor what an earlier patch
    leaves.
    """
    if adapted := [i + 1 for i, patch in enumerate(patches) if patch.adapters]:
        raise PatchError(f"patches {adapted} attach adapters, which do not merge; apply them after the merged patch")
    patches = list(patches)
    names = tuple(names) if names is not None else tuple(f"patch {i + 1}" for i in range(len(patches)))
    if not patches or len(names) != len(patches):
        raise PatchError(f"{len(patches)} patches with {len(names)} names; give at least one patch, and each a name")
    stack = base.params["blocks"]["down"]["w"]
    layers = sorted({l for patch in patches for l in patch.layers})
    originals = {l: np.asarray(stack[l]) for l in layers if l < stack.shape[0]}
    below = _order(patches, {l: matrix_hash(w) for l, w in originals.items()}, names)
    overlaps, deltas = [], {}
    for l in layers:
        here = [i for i, patch in enumerate(patches) if l in patch.deltas]
        parts = [patches[i].deltas[l] for i in here]
        deltas[l] = sum_deltas(parts, delta_dtype(base))
        overlaps.append(_overlap(l, here, parts))
    method = {"name": "merge", "layers": layers, "merged": [dict(patch.method) for patch in patches]}
    requests = [request for patch in patches for request in patch.requests]
    merged, _ = make_patch(method, requests, originals, deltas)
    on_top_of = tuple(tuple(sorted(b)) for b in below)
    return merged, MergeReport(names, on_top_of, tuple(_conflicts(patches, below)), tuple(overlaps))


def _order(patches: list[EditPatch], base: dict[int, str], names: tuple[str, ...]) -> list[set[int]]:
    """Of each patch, the earlier patches whose edits were in the model that it was made on."""
    below: list[set[int]] = []
    problems = []
    for i, patch in enumerate(patches):
        found, strange = set(), []
        for l in patch.layers:
            if patch.base[l] == base.get(l):
                continue
            under = next((j for j in reversed(range(i)) if patches[j].edited.get(l) == patch.base[l]), None)
            if under is None:
                strange.append(l)
            else:
                found |= {under} | below[under]
        below.append(found)
        if strange:
            problems.append(f"{names[i]}: the matrices of layers {strange} it was made on are of another model")
    if problems:
        raise PatchError(
            "cannot merge: each patch must be made on the base, or on top of one given before it\n"
            + "\n".join(f"  - {p}" for p in problems)
        )
    return below


def _overlap(layer: int, patches: list[int], deltas: list[Delta]) -> Overlap:
    forms = [_orthogonal(d) for d in deltas]
    gram = np.array([[_inner(a, b) if i <= j else 0.0 for j, b in enumerate(forms)] for i, a in enumerate(forms)])
    gram = np.triu(gram) + np.triu(gram, 1).T
    norms = np.sqrt(np.diag(gram))
    sizes = np.outer(norms, norms)
    cosines = np.divide(gram, sizes, out=np.zeros_like(gram), where=sizes > 0)
    scale = np.sqrt(np.trace(gram))
    ratio = float(np.sqrt(max(gram.sum(), 0.0)) / scale) if scale else 0.0
    return Overlap(layer, tuple(patches), tuple(norms.tolist()), tuple(map(tuple, cosines.tolist())), ratio)


_Form = tuple[np.ndarray, np.ndarray | None]


def _orthogonal(delta: Delta) -> _Form:
    """The delta in float64, its left factor orthonormal if it has two: inner products then cancel no more than Δ."""
    left = np.asarray(delta.left, np.float64)
    if delta.right is None:
        return left, None
    q, t = np.linalg.qr(left)
    return q, t @ np.asarray(delta.right, np.float64)


def _inner(a: _Form, b: _Form) -> float:
    """⟨a, b⟩ (Frobenius) without the product of any factors: ``Σ (LₐᵀL_b) ∘ (RₐR_bᵀ)``."""
    (left, right), (other, there) = a, b
    if right is None and there is None:
        return float(np.vdot(left, other))
    if right is None or there is None:
        dense, (left, right) = (left, b) if right is None else (other, a)
        return float(np.vdot(dense @ right.T, left))  # type: ignore[union-attr]
    return float(np.vdot(left.T @ other, right @ there.T))


def _conflicts(patches: list[EditPatch], below: list[set[int]]) -> list[Conflict]:
    def plain(text: str) -> str:
        return " ".join(text.split())

    found = []
    known: dict[str, dict[int, Any]] = {}
    for i, patch in enumerate(patches):
        for request in patch.requests:
            prompt = plain(request.prompt)
            for j, other in known.get(prompt, {}).items():
                if j == i:
                    continue
                same = plain(other.target) == plain(request.target)
                kind = "repeats" if same else "updates" if j in below[i] else "contradicts"
                targets, ids = (other.target, request.target), (other.id, request.id)
                found.append(Conflict(kind, prompt, (j, i), targets, ids))
            known.setdefault(prompt, {})[i] = request
    return found
