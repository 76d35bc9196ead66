"""Where tensors come from: a directory of safetensors, read one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from jaxedit.errors import CheckpointError

Part = tuple[slice, ...]


class Checkpoint(Protocol):
    """What a loader needs: the contents of config.json, tensor names, and each tensor on demand.

    reads_parts: whether a part of a tensor is read without the rest.
    """

    reads_parts: ClassVar[bool]

    @property
    def config(self) -> dict: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def tensor(self, name: str, part: Part = ()) -> np.ndarray: ...


class SafetensorsCheckpoint:
    """A Hugging Face directory, single-file or sharded. Nothing is unpickled, ever.

    A file is opened for each tensor and closed after it: it is mapped into memory while it is open, and all that
    was read of it would count as memory in use.
    """

    reads_parts: ClassVar[bool] = True

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.config = _read_config(self.directory)
        self.files = _tensor_files(self.directory)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        import safetensors

        with safetensors.safe_open(self.files[name], framework="numpy") as handle:
            return tuple(handle.get_slice(name).get_shape())

    def tensor(self, name: str, part: Part = ()) -> np.ndarray:
        """The tensor, or a part of it: a slice for each of its leading axes."""
        import safetensors

        with safetensors.safe_open(self.files[name], framework="numpy") as handle:
            return handle.get_slice(name)[part] if part else handle.get_tensor(name)


def _read_config(directory: Path) -> dict:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it does not hold an object")
        return config
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no config.json, so it is not a Hugging Face model") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name to file, from the headers themselves: an index may be stale, a header cannot."""
    import safetensors

    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            listed = sorted({directory / Path(f).name for f in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a valid index of shards: {error!r}") from None
    else:
        listed = sorted(directory.glob("*.safetensors"))
    if not listed:
        pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        raise CheckpointError(
            f"{directory} has no .safetensors files"
            + (f", only pickled ones ({', '.join(pickled)}). " + REFUSE_PICKLE if pickled else "")
        )
    files: dict[str, Path] = {}
    for path in listed:
        try:
            with safetensors.safe_open(path, framework="numpy") as handle:
                names = list(handle.keys())
        except FileNotFoundError:
            raise CheckpointError(f"{index} names {path.name}, which is not there") from None
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from None
        for name in names:
            if name in files:
                raise CheckpointError(f"tensor {name!r} is in both {files[name].name} and {path.name}")
            files[name] = path
    return files


REFUSE_PICKLE = (
    "Unpickling a file can run any code, so jaxedit does not. Convert it in an environment you trust, with "
    "transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
)
