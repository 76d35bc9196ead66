"""What the commands are given, read and checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from jaxedit.cli.console import Work, load_model
from jaxedit.errors import JaxEditError

if TYPE_CHECKING:
    from jaxedit import Decoder, EditPatch, EditRequest, Method
    from jaxedit.adapters.editors import Editor
    from jaxedit.cli.options import Devices
    from jaxedit.tuning.named import Tuner

DTYPES = ("bfloat16", "float16", "float32", "float64")


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """ "3,4,5" or "3-5" or a mixture, as layer numbers; a usage error where it is neither."""
    if text is None:
        return None
    try:
        spans = [[int(x) for x in part.split("-")] for part in text.split(",")]
        layers = [l for first, *last in spans for l in range(first, (last or [first])[0] + 1)]
        if not layers or any(len(span) > 2 for span in spans):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of layers such as 3,4,5 or 3-7", param_hint="--layers"
        ) from None
    return tuple(layers)


def checked_dtype(name: str | None) -> str | None:
    """The dtype, or a usage error."""
    if name is not None and name not in DTYPES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    return name


def check_out(path: Path | None):
    """Refuse a directory that could not be written, before hours of work and not after."""
    if path is not None and path.exists():
        if not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").exists()):
            raise JaxEditError(f"{path} exists and is not a saved model; choose another directory")


def read_facts(path: Path, limit: int | None, skip_malformed: bool) -> list[EditRequest]:
    from jaxedit import read_requests

    return read_requests(path, skip_malformed=skip_malformed)[:limit]


def load_moments(path: Path | None):
    from jaxedit import SecondMoments

    return None if path is None else SecondMoments.load(path)


def is_patch(name: str) -> bool:
    return name.endswith(".jaxedit") or (Path(name).is_file() and not name.endswith(".gguf"))


def load_patch(path: Path) -> EditPatch:
    from jaxedit import EditPatch

    return EditPatch.load(path)


def load_patched(work: Work, model: str, path: Path | None, dtype: str | None):
    """``(model, tokenizer)`` with a patch applied, in the dtype that the patch was made in."""
    patch = None if path is None else load_patch(path)
    decoder, tokenizer = load_model(work, model, dtype or (patch.dtype if patch else None))
    if patch is None:
        return decoder, tokenizer
    from jaxedit import apply_patch

    return apply_patch(decoder, patch), tokenizer


def load_pair(work: Work, base: str, edited: str, dtype: str | None, devices: Devices | None = None):
    """``(base, edited, tokenizer)``; `edited` is a model, or a patch for `base`."""
    patch = load_patch(Path(edited)) if is_patch(edited) else None
    wanted = checked_dtype(dtype) or (patch.dtype if patch else None)
    placed = None if devices is None else devices.join(wanted)
    before, tokenizer = load_model(work, base, wanted, placed)
    if patch is None:
        return before, load_model(work, edited, wanted, placed)[0], tokenizer
    from jaxedit import apply_patch

    return before, apply_patch(before, patch), tokenizer


def anchor_folder(kept: bool) -> Path | None:
    """Where finished anchors are kept, if they are."""
    from jaxedit.cache import cache_dir

    return cache_dir() / "anchors" if kept else None


def named_method(name: str, model: Decoder, layers: tuple[int, ...] | None) -> Method | Editor | Tuner:
    """The method, editor or fine-tuning of this name, with the model's preset."""
    from jaxedit import method_for
    from jaxedit.adapters.editors import editor_of
    from jaxedit.tuning.named import tuner_of

    config = model.config
    return editor_of(name, config, layers) or tuner_of(name, config, layers) or method_for(name, config, layers)


def with_settings(method: Method | Editor | Tuner, settings: Sequence[str]) -> Method | Editor | Tuner:
    """What does not solve for weights, with other settings, each given as ``name=value``, the value as in JSON or a
    word."""
    from jaxedit import Method
    from jaxedit.plain import built, plain_fields

    if not settings:
        return method
    if isinstance(method, Method):
        raise JaxEditError(f"--set is for editors and fine-tuning; settings of {method.name} come from --preset")
    given = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise JaxEditError(f"--set {text}: expected name=value")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    return built(type(method), plain_fields(method) | given, method.name)


def refuse_out(to: Path | None, method: str):
    """A Hugging Face directory has no place for what an editor adds."""
    from jaxedit.presets import EDITORS, REP

    if to is not None and (method in EDITORS or method.endswith(REP)):
        raise JaxEditError(f"--out: {method} adds parameters, which a Hugging Face model has no place for; use --patch")


def with_cov_weight(method: Method | Editor | Tuner, cov_weight: float | None) -> Method | Editor | Tuner:
    """The method with another weight of second moments, where one is given and its solver has one."""
    if cov_weight is None:
        return method
    from jaxedit import Method

    if not isinstance(method, Method) or not hasattr(method.solver, "cov_weight"):
        raise JaxEditError(f"--cov-weight does not go with {method.name}, which has no such weight")
    return dataclasses.replace(method, solver=dataclasses.replace(method.solver, cov_weight=cov_weight))


def read_settings(path: Path, method: str | None, model: Decoder) -> Method:
    """The method in a preset file of `jaxedit locate`, or in a hyper-parameter file of other libraries."""
    from jaxedit import read_hyperparameters, read_preset
    from jaxedit.analysis.suggest import FORMAT

    if path.suffix == ".json" and path.is_file() and FORMAT in path.read_text(encoding="utf-8", errors="replace"):
        found = read_preset(path, model)
        if method not in (None, found.name):
            raise JaxEditError(f"{path} is for {found.name!r}; --method {method} does not go with it")
        return found
    return read_hyperparameters(path, method).method
