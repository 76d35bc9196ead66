"""Edits as a LoRA adapter, which peft and vLLM load on the untouched base model.

A patch is ``W + Δ`` with ``Δ = left @ right``; an adapter is ``W + (lora_alpha / r) · B A`` in the orientation
``[out, in]``, so ``A = leftᵀ`` and ``B = rightᵀ``, and `lora_alpha` equals `r`. PEFT can give each layer its own rank;
vLLM knows one scale for all of them, so every layer is padded with zeros to the largest rank, which changes nothing.
An adapter does not know its base: the hashes of the matrices it was made for are in the header of
adapter_model.safetensors, where `check_lora` finds them and other libraries do not look.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxedit.cache import write_directory
from jaxedit.errors import JaxEditError, PatchError
from jaxedit.export.patch import Delta, EditPatch, add, product_norm, with_matrices
from jaxedit.models.conversion import permutation
from jaxedit.models.families import FAMILIES
from jaxedit.models.fingerprint import matrix_hash
from jaxedit.models.transformer import Decoder

FORMAT = "jaxedit-lora-1"
DTYPES = ("float32", "bfloat16", "float16", "float64")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


@dataclasses.dataclass(frozen=True)
class LoraLayer:
    """One edited matrix: its `module` in transformers, the `rank` kept of its update, and the relative `error`.

    error: ‖B A − Δ‖ / ‖Δ‖ (Frobenius) of what was written, both truncation and rounding.
    """

    layer: int
    module: str
    rank: int
    error: float


@dataclasses.dataclass(frozen=True)
class LoraInfo:
    """What `save_lora` wrote. rank: of the adapter, the largest of its layers'."""

    path: Path
    rank: int
    dtype: str
    layers: tuple[LoraLayer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def save_lora(
    patch: EditPatch,
    base: Decoder,
    to,
    *,
    base_name: str | None = None,
    rank: int | None = None,
    dtype: str = "float32",
) -> LoraInfo:
    """Write the patch as a PEFT adapter directory: adapter_config.json, adapter_model.safetensors and a README.md.

    base: the model that the patch was made on; its matrices are checked against the patch's hashes first.
    base_name: hub id or path of that model for transformers, which ``AutoPeftModelForCausalLM`` reads.
    rank: at most this much of each layer's update is kept, the best approximation in the Frobenius norm (truncated
        SVD, Eckart and Young 1936). By default all of it: a low-rank update as it is, a dense one down to the
        singular values that its dtype resolves, which may be as many as d_model. vLLM takes ranks up to 512.
    dtype: float32, bfloat16, float16 or float64, of the adapter. In float32 a low-rank patch of a float32, bfloat16
        or float16 model is written without any error. Everything before that is float64. vLLM casts an adapter to
        its own 16-bit dtype; written in that one, the error says what this costs.
    The adapter adds the update to the product; a patch on a 16-bit model rounds ``W + Δ`` once. So there the two
    differ by that rounding, and the adapter, as peft loads it, is the closer one.
    The directory appears whole or not at all; an earlier adapter at `to` is replaced, anything else there refused.
    Raises PatchError where `base` is another model or an update does not fit `dtype`, JaxEditError on a `to`,
    `rank` or `dtype` that cannot be.
    """
    if patch.adapters:
        raise PatchError(
            f"a PEFT adapter holds updates of weights, and the patch attaches a {type(patch.adapters[0]).__name__}; "
            "ship the patch itself"
        )
    to = Path(to)
    if dtype not in DTYPES:
        raise JaxEditError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if rank is not None and rank < 1:
        raise JaxEditError(f"an adapter's rank is at least 1, got {rank}")
    if to.exists() and (not to.is_dir() or (any(to.iterdir()) and not (to / CONFIG).exists())):
        raise JaxEditError(f"{to} exists and is not an adapter; choose another directory")
    wrong = _misfits(base, patch.base)
    if wrong:
        raise PatchError(
            f"cannot make an adapter for this model: the matrices of layers {wrong} are not those that the patch was "
            "made on; give the model that was edited"
        )
    modules, swapped = _modules(base, patch.layers)
    factors = {l: _factors(patch.deltas[l], rank) for l in patch.layers}
    width = max(left.shape[1] for left, _ in factors.values())
    tensors: dict[str, np.ndarray] = {}
    layers = []
    for l, pair in factors.items():
        with np.errstate(over="ignore"):
            left, right = (x.astype(jnp.dtype(dtype)) for x in pair)
        if not (np.isfinite(left.astype(np.float64)).all() and np.isfinite(right.astype(np.float64)).all()):
            raise PatchError(f"the update of layer {l} is too large for {dtype}; write the adapter in float32")
        kept = left.shape[1]
        a, b = _names(modules[l])
        tensors[a] = np.ascontiguousarray(np.pad(left, ((0, 0), (0, width - kept))).T)
        tensors[b] = np.ascontiguousarray(np.pad(right, ((0, width - kept), (0, 0))).T)
        layers.append(LoraLayer(l, modules[l], kept, _error(patch.deltas[l], left, right)))
    info = LoraInfo(to, width, dtype, tuple(layers))
    _write(info, tensors, patch, base_name, swapped)
    return info


def load_lora(adapter) -> dict[int, Delta]:
    """The updates in an adapter directory, by layer: ``(lora_alpha / r) · B A`` as peft scales it.

    Factors are float32, or float64 where the adapter is. Raises PatchError unless `save_lora` wrote the directory.
    """
    return _read(Path(adapter))[0]


def check_lora(adapter, model: Decoder) -> None:
    """Raise PatchError unless the edited matrices in `model` are those that the adapter was made for.

    peft and vLLM do not check: on another model of the same shape they load it and say nothing.
    """
    _check(Path(adapter), _read(Path(adapter))[1], model)


def apply_lora(model: Decoder, adapter) -> Decoder:
    """The model with an adapter's updates added, each matrix rounded once. Raises PatchError as `check_lora` does."""
    deltas, base = _read(Path(adapter))
    _check(Path(adapter), base, model)
    stack = model.params["blocks"]["down"]["w"]
    return with_matrices(model, {l: add(np.asarray(stack[l]), delta) for l, delta in deltas.items()})


def _check(path: Path, base: Mapping[int, str], model: Decoder):
    wrong = _misfits(model, base)
    if wrong:
        raise PatchError(
            f"{path} does not fit this model: the matrices of layers {wrong} are not those that it was made for"
        )


def _misfits(model: Decoder, hashes: Mapping[int, str]) -> list[int]:
    """Layers that the model lacks, or whose matrix has another hash (which covers its shape)."""
    stack = model.params["blocks"]["down"]["w"]
    return [l for l, known in hashes.items() if l >= stack.shape[0] or matrix_hash(np.asarray(stack[l])) != known]


def _modules(model: Decoder, layers) -> tuple[dict[int, str], bool]:
    """Names of the edited matrices' modules in transformers, and whether those store them ``[in, out]``."""
    rule = next(r for r in FAMILIES[model.config.family].rules if r.target == "blocks.down.w")
    source = rule.source.removesuffix(".weight")
    return {l: source.format(l) for l in layers}, permutation(rule) == (0, 1)


def _names(module: str) -> tuple[str, str]:
    """What peft calls A and B of a module."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def _factors(delta: Delta, rank: int | None) -> tuple[np.ndarray, np.ndarray]:
    """``left [d_ff, r], right [r, d_model]`` in float64: the delta's own, or the SVD's with √σ in each."""
    left = np.asarray(delta.left, np.float64)
    if delta.right is None:
        u, s, vt = np.linalg.svd(left, full_matrices=False)
    else:
        right = np.asarray(delta.right, np.float64)
        if rank is None or left.shape[1] <= rank:
            return _balanced(left, right)
        q, t = np.linalg.qr(left)
        u, s, vt = np.linalg.svd(t @ right, full_matrices=False)
        u = q @ u
    noise = s[0] * max(left.shape[0], vt.shape[1]) * np.finfo(delta.left.dtype).eps
    kept = max(1, min(int(np.sum(s > noise)), rank or len(s)))
    root = np.sqrt(s[:kept])
    return u[:, :kept] * root, root[:, None] * vt[:kept]


def _balanced(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same product with columns of `left` about as large as rows of `right`, so that 16 bits hold both.

    The factors are powers of two: nothing is rounded.
    """
    a, b = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
    shift = np.zeros(a.shape)
    np.log2(b / np.where(a > 0, a, 1), out=shift, where=(a > 0) & (b > 0))
    shift = np.rint(shift / 2).astype(np.int32)
    return np.ldexp(left, shift), np.ldexp(right, -shift[:, None])


def _error(delta: Delta, left: np.ndarray, right: np.ndarray) -> float:
    """``‖left @ right − Δ‖ / ‖Δ‖``, in float64; from the factors alone where Δ has them."""
    left, right, exact = (np.asarray(x, np.float64) for x in (left, right, delta.left))
    if delta.right is None:
        off, size = np.linalg.norm(left @ right - exact), np.linalg.norm(exact)
    else:
        other = np.asarray(delta.right, np.float64)
        off = product_norm(np.hstack([left, exact]), np.vstack([right, -other]))
        size = delta.norm()
    return float(off / size) if size else 0.0


def _write(info: LoraInfo, tensors: Mapping[str, np.ndarray], patch: EditPatch, base_name: str | None, swapped: bool):
    from safetensors.numpy import save_file

    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": info.rank,
        "lora_alpha": info.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": swapped,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": [l.module for l in info.layers],
        "use_dora": False,
        "use_rslora": False,
    }
    about = {
        "format": FORMAT,
        "method": dict(patch.method),
        "edits": len(patch.requests),
        "base": patch.base,
        "layers": [dataclasses.asdict(l) for l in info.layers],
    }

    def write(fresh: Path):
        save_file(dict(tensors), fresh / WEIGHTS, metadata={"format": "pt", "jaxedit": json.dumps(about)})
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (fresh / "README.md").write_text(_card(info, patch, base_name), encoding="utf-8")

    write_directory(info.path, write)


def _card(info: LoraInfo, patch: EditPatch, base_name: str | None) -> str:
    """The README.md of an adapter, with the header that the hub reads."""
    limit = next((n for n in _VLLM_RANKS if n >= info.rank), None)
    serve = f"`--enable-lora --max-lora-rank {limit}`" if limit else "a smaller rank, its largest is 512"
    rows = "\n".join(f"| {l.layer} | `{l.module}` | {l.rank} | {l.error:.2g} |" for l in info.layers)
    named = f"base_model: {json.dumps(base_name)}\n" if base_name else ""
    edits = f"{len(patch.requests)} edit" + "s" * (len(patch.requests) != 1)
    return f"""---
{named}library_name: peft
tags: [lora, knowledge-editing]
---

# {edits} as a LoRA adapter

Made by jaxedit with {patch.method.get("name", "an unnamed method")}; rank {info.rank}, {info.dtype}.

Only for the model that it was made on: peft and vLLM do not notice another one, `jaxedit.check_lora` does. vLLM needs
{serve}.

The relative error is that of the adapter against the edit, in the Frobenius norm.

| layer | module | rank | relative error |
|---|---|---|---|
{rows}
"""


def _read(path: Path) -> tuple[dict[int, Delta], dict[int, str]]:
    """The updates and the hashes of the matrices that they were made for."""
    import safetensors

    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        scale = config["lora_alpha"] / config["r"]
        with safetensors.safe_open(path / WEIGHTS, framework="numpy") as handle:
            about = (handle.metadata() or {}).get("jaxedit")
            if about is None:
                raise PatchError(f"{path} is an adapter from elsewhere: it does not say which matrices it is for")
            about = json.loads(about)
            if about["format"] != FORMAT:
                raise PatchError(f"{path} has format {about['format']!r}; this version reads {FORMAT!r}")
            deltas = {}
            for entry in about["layers"]:
                a, b = (handle.get_tensor(name) for name in _names(entry["module"]))
                kind = np.promote_types(a.dtype, np.float32)
                left, right = a[: entry["rank"]].T.astype(kind), b[:, : entry["rank"]].T.astype(kind)
                deltas[entry["layer"]] = Delta(left, right * kind.type(scale))
        return deltas, {l: about["base"][str(l)] for l in deltas}
    except PatchError:
        raise
    except FileNotFoundError as error:
        raise PatchError(f"there is no adapter at {path}: {Path(error.filename or WEIGHTS).name} is missing") from None
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError, ArithmeticError) as error:
        raise PatchError(f"{path} is not a complete jaxedit adapter: {type(error).__name__}: {error}") from None
