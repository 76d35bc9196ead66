"""Edits as an artefact: low-rank updates of a few matrices, with what is needed to take them back exactly.

``W + Δ - Δ`` is not W in floating point. A patch therefore carries, per entry, how many representable numbers the
subtraction misses the original by: almost always 0 or ±1, so it compresses to a fraction of a byte.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.adapters.attached import adapters_of, attach, detach, from_plain, same, to_plain
from jaxedit.cache import write_atomically
from jaxedit.errors import PatchError
from jaxedit.models.fingerprint import matrix_hash, whole_fingerprint
from jaxedit.models.layers import wide
from jaxedit.models.sites import Adapter
from jaxedit.models.transformer import Decoder
from jaxedit.types import EditRequest

FORMAT = "jaxedit-patch-1"
_ESCAPE = -128


@dataclasses.dataclass(frozen=True)
class Delta:
    """The update of one matrix: ``left [d_ff, r] @ right [r, d_model]``, or `left` alone where that is smaller."""

    left: np.ndarray
    right: np.ndarray | None = None

    @classmethod
    def of(cls, left, right, dtype) -> Delta:
        """Low-rank where the factors are smaller than the product."""
        left, right = np.asarray(left, dtype), np.asarray(right, dtype)
        made = cls(left, right)
        small = left.size + right.size < left.shape[0] * right.shape[1]
        return made if small else cls(made.dense().astype(dtype))

    def dense(self) -> np.ndarray:
        """``[d_ff, d_model]``, multiplied in float64."""
        if self.right is None:
            return np.asarray(self.left)
        with jax.enable_x64(True):
            return np.asarray(jnp.asarray(self.left, jnp.float64) @ jnp.asarray(self.right, jnp.float64))

    def norm(self) -> float:
        """Frobenius norm, in float64, from the factors."""
        left = np.asarray(self.left, np.float64)
        return float(np.linalg.norm(left)) if self.right is None else product_norm(left, self.right)


def product_norm(left: np.ndarray, right: np.ndarray) -> float:
    """``‖left @ right‖`` (Frobenius): with ``left = Q T``, that of ``T @ right``."""
    return float(np.linalg.norm(np.linalg.qr(left, mode="r") @ right))


def sum_deltas(deltas: Sequence[Delta], dtype) -> Delta:
    """The sum of updates of one matrix, in `dtype`: factors side by side where all have them, else added in float64."""
    rights = [d.right for d in deltas if d.right is not None]
    if len(rights) == len(deltas):
        return Delta.of(np.hstack([d.left for d in deltas]), np.vstack(rights), dtype)
    total = np.zeros(next(d.left.shape for d in deltas if d.right is None))
    for delta in deltas:
        total += delta.dense()
    return Delta(total.astype(dtype))


@dataclasses.dataclass(frozen=True)
class Undo:
    """How to restore one matrix exactly: `steps` (int8) and, for the few entries beyond it, index and value."""

    steps: np.ndarray
    far_index: np.ndarray
    far_value: np.ndarray


@dataclasses.dataclass(frozen=True)
class EditPatch:
    """Edits that can be saved, shipped, applied and withdrawn.

    deltas: per layer, in float32 (float64 for a float64 model). base, edited: hash per layer of the matrix before
    and after. dtype: of the model it was made on; exact withdrawal needs the same. adapters: what is attached to the
    model, beside or instead of updates; host: where there are no updates, the shape of the model that they were made
    for, and its fingerprint.
    """

    method: Mapping[str, Any]
    requests: tuple[EditRequest, ...]
    deltas: Mapping[int, Delta]
    base: Mapping[int, str]
    edited: Mapping[int, str]
    undo: Mapping[int, Undo]
    dtype: str
    adapters: tuple[Adapter, ...] = ()
    host: tuple[str, str] | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.deltas))

    def save(self, path) -> Path:
        """Write one safetensors file whose header holds the rest as JSON; it appears whole or not at all."""
        from safetensors.numpy import save_file

        tensors: dict[str, np.ndarray] = {}
        for l in self.layers:
            delta, undo = self.deltas[l], self.undo[l]
            tensors[f"{l}.left"] = np.ascontiguousarray(delta.left)
            if delta.right is not None:
                tensors[f"{l}.right"] = np.ascontiguousarray(delta.right)
            tensors[f"{l}.undo"] = np.frombuffer(zlib.compress(undo.steps.tobytes(), 6), np.uint8)
            tensors[f"{l}.far_index"], tensors[f"{l}.far_value"] = undo.far_index, undo.far_value
        attached = []
        for i, adapter in enumerate(self.adapters):
            plain, arrays = to_plain(adapter)
            attached.append(plain)
            tensors |= {f"adapter.{i}.{name}": np.array(x, order="C") for name, x in arrays.items()}
        about = {
            "format": FORMAT,
            "method": self.method,
            "requests": [dataclasses.asdict(r) for r in self.requests],
            "base": self.base,
            "edited": self.edited,
            "dtype": self.dtype,
            "shapes": {l: list(self.undo[l].steps.shape) for l in self.layers},
        }
        if attached:
            about |= {"adapters": attached, "host": self.host}
        path = Path(path)
        write_atomically(path, lambda p: save_file(tensors, p, metadata={"jaxedit": json.dumps(about)}))
        return path

    @classmethod
    def load(cls, path) -> EditPatch:
        """Read what `save` wrote. Raises PatchError on anything else."""
        import safetensors

        try:
            with safetensors.safe_open(path, framework="numpy") as handle:
                about = json.loads((handle.metadata() or {})["jaxedit"])
                if about["format"] != FORMAT:
                    raise PatchError(f"{path} has format {about['format']!r}; this version reads {FORMAT!r}")
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}
            layers = sorted(int(l) for l in about["base"])
            undo = {
                l: Undo(
                    np.frombuffer(zlib.decompress(tensors[f"{l}.undo"].tobytes()), np.int8).reshape(
                        about["shapes"][str(l)]
                    ),
                    tensors[f"{l}.far_index"],
                    tensors[f"{l}.far_value"],
                )
                for l in layers
            }
            return cls(
                about["method"],
                tuple(EditRequest(**r) for r in about["requests"]),
                {l: Delta(tensors[f"{l}.left"], tensors.get(f"{l}.right")) for l in layers},
                {l: about["base"][str(l)] for l in layers},
                {l: about["edited"][str(l)] for l in layers},
                undo,
                about["dtype"],
                tuple(
                    from_plain(plain, {k[len(name) :]: x for k, x in tensors.items() if k.startswith(name)})
                    for i, plain in enumerate(about.get("adapters", ()))
                    for name in (f"adapter.{i}.",)
                ),
                tuple(about["host"]) if about.get("host") else None,
            )
        except PatchError:
            raise
        except FileNotFoundError:
            raise PatchError(f"there is no patch at {path}") from None
        except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError, zlib.error) as error:
            raise PatchError(f"{path} is not a complete jaxedit patch: {type(error).__name__}: {error}") from None


def add(matrix: np.ndarray, delta: Delta) -> np.ndarray:
    """``matrix + delta`` in the matrix's dtype, rounded once."""
    return (np.asarray(matrix, np.float64) + delta.dense()).astype(matrix.dtype)


def subtract(matrix: np.ndarray, delta: Delta, undo: Undo) -> np.ndarray:
    """The matrix that `add` was given, exactly, on hardware that multiplies the factors the same way."""
    near = (np.asarray(matrix, np.float64) - delta.dense()).astype(matrix.dtype)
    steps = undo.steps.astype(np.int64)
    steps.ravel()[undo.far_index] = undo.far_value
    return _from_rank(_rank(near) + steps, matrix.dtype)


def undo_of(original: np.ndarray, edited: np.ndarray, delta: Delta) -> Undo:
    near = (np.asarray(edited, np.float64) - delta.dense()).astype(original.dtype)
    steps = _rank(original) - _rank(near)
    far = np.abs(steps) > 127
    index = np.flatnonzero(far)
    return Undo(np.where(far, _ESCAPE, steps).astype(np.int8), index, steps.ravel()[index])


def _rank(x: np.ndarray) -> np.ndarray:
    """Position of each number in the order of all numbers of its dtype, -0.0 just below 0.0."""
    bits = x.view({2: np.int16, 4: np.int32, 8: np.int64}[x.dtype.itemsize]).astype(np.int64)
    low = -(1 << (8 * x.dtype.itemsize - 1))
    return np.where(bits < 0, low - bits - 1, bits)


def _from_rank(rank: np.ndarray, dtype) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    low = -(1 << (8 * size - 1))
    bits = np.where(rank < 0, low - rank - 1, rank).astype({2: np.int16, 4: np.int32, 8: np.int64}[size])
    return bits.view(dtype)


def make_patch(
    method: Mapping[str, Any], requests, originals: Mapping[int, np.ndarray], deltas: Mapping[int, Delta]
) -> tuple[EditPatch, dict[int, np.ndarray]]:
    """The patch and the edited matrices it makes of `originals` (float64 models are ranked in float64)."""
    edited = {l: add(w, deltas[l]) for l, w in originals.items()}
    patch = EditPatch(
        method,
        tuple(requests),
        dict(deltas),
        {l: matrix_hash(w) for l, w in originals.items()},
        {l: matrix_hash(w) for l, w in edited.items()},
        {l: undo_of(w, edited[l], deltas[l]) for l, w in originals.items()},
        str(next(iter(originals.values())).dtype),
    )
    return patch, edited


def apply_patch(model: Decoder, patch: EditPatch) -> Decoder:
    """The model with the patch's edits: matrices updated, adapters attached.

    Raises PatchError where a matrix is not the one the patch was made for; of a patch without updates, where the model
    is of another shape, or in the patch's dtype but another one.
    """
    _check_host(model, patch)
    matrices = _matrices(model, patch, patch.base, "apply to")
    edited = with_matrices(model, {l: add(w, patch.deltas[l]) for l, w in matrices.items()})
    return attach(edited, *patch.adapters) if patch.adapters else edited


def withdraw_patch(model: Decoder, patch: EditPatch, base: Decoder | None = None) -> Decoder:
    """The model without the patch's edits: every edited matrix equals the base's to the last bit, and its adapters are
    gone.

    base: take the matrices from it instead of computing them; needed for a model in another dtype than the patch
    was made on. Raises PatchError where the model is not the patched one, or a matrix is not restored exactly.
    """
    model = _without_adapters(model, patch)
    if base is not None:
        return with_matrices(model, _matrices(base, patch, patch.base, "withdraw with"))
    if str(model.dtype) != patch.dtype:
        raise PatchError(
            f"the patch was made on a {patch.dtype} model and this one is {model.dtype}; pass base= to withdraw it"
        )
    matrices = _matrices(model, patch, patch.edited, "withdraw from")
    restored = {l: subtract(w, patch.deltas[l], patch.undo[l]) for l, w in matrices.items()}
    wrong = [l for l, w in restored.items() if matrix_hash(w) != patch.base[l]]
    if wrong:
        raise PatchError(
            f"layers {wrong} are not restored exactly here (products round differently than where the patch was "
            "made); pass base= to withdraw it"
        )
    return with_matrices(model, restored)


def adapter_patch(method: Mapping[str, Any], requests, host: Decoder, *adapters: Adapter) -> EditPatch:
    """The patch of what is attached to a model whose weights stay as they are."""
    about = (_shape(host), whole_fingerprint(host.params, host.config))
    return EditPatch(method, tuple(requests), {}, {}, {}, {}, str(host.dtype), adapters, about)


def _shape(model: Decoder) -> str:
    c = model.config
    return f"{c.family}, {c.n_layer} layers, d_model {c.d_model}, d_ff {c.d_ff}, {c.vocab} tokens"


def _check_host(model: Decoder, patch: EditPatch):
    if patch.host is None:
        return
    shape, found = patch.host
    if shape != _shape(model):
        raise PatchError(f"cannot apply to this model ({_shape(model)}): the patch is for another one ({shape})")
    bare = detach(model)
    if str(model.dtype) == patch.dtype and whole_fingerprint(bare.params, bare.config) != found:
        raise PatchError("cannot apply to this model: its weights are not those that the patch was made for")


def _without_adapters(model: Decoder, patch: EditPatch) -> Decoder:
    """The model without the patch's adapters, which it must have."""
    stay = list(adapters_of(model))
    for adapter in patch.adapters:
        at = next((i for i, mine in enumerate(stay) if same(mine, adapter)), None)
        if at is None:
            raise PatchError(f"cannot withdraw from this model: it does not have the patch's {type(adapter).__name__}")
        del stay[at]
    return attach(detach(model), *stay) if patch.adapters else model


def _matrices(model: Decoder, patch: EditPatch, hashes: Mapping[int, str], verb: str) -> dict[int, np.ndarray]:
    stack = model.params["blocks"]["down"]["w"]
    if any(l >= stack.shape[0] or patch.undo[l].steps.shape != stack.shape[1:] for l in patch.layers):
        shapes = {l: patch.undo[l].steps.shape for l in patch.layers}
        raise PatchError(f"cannot {verb} this model: its matrices are {stack.shape}, the patch's {shapes}")
    found = {l: np.asarray(stack[l]) for l in patch.layers}
    wrong = [l for l, w in found.items() if matrix_hash(w) != hashes[l]]
    if wrong:
        raise PatchError(f"cannot {verb} this model: the matrices of layers {wrong} are not those of the patch")
    return found


def with_matrices(model: Decoder, matrices: Mapping[int, np.ndarray]) -> Decoder:
    """The model with the edited matrices of some layers replaced; all other weights are shared, not copied."""
    if not matrices:
        return model
    params = model.params
    stack = params["blocks"]["down"]["w"]
    layers = jnp.asarray(sorted(matrices))
    new = jnp.asarray(np.stack([matrices[l] for l in sorted(matrices)]), stack.dtype)
    down = {**params["blocks"]["down"], "w": stack.at[layers].set(new)}
    return model.with_params({**params, "blocks": {**params["blocks"], "down": down}})


def delta_dtype(model: Decoder) -> np.dtype:
    """The dtype in which updates are kept: float32, or float64 for a float64 model."""
    return np.dtype(wide(model.dtype))
