"""Anchors of many edits: shared out between processes, and kept on disk as they come.

Edits do not depend on each other. Process p of P takes every P-th of them in the order of their suffix sizes, so that
all have equal work; within a process parts of about equal suffix sizes are finished, and kept, one after the other.
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxedit.cache import write_atomically
from jaxedit.config import AnchorConfig
from jaxedit.data.tokens import EditTokens
from jaxedit.distributed import check_same, gather_bytes
from jaxedit.models.config import ModelConfig
from jaxedit.models.fingerprint import whole_fingerprint
from jaxedit.models.transformer import Params
from jaxedit.targets.anchor import Anchors, find_anchors
from jaxedit.targets.anchor_plan import suffix_tokens
from jaxedit.targets.anchor_room import Rooms

FORMAT = "jaxedit-anchors-1"
FindAnchors = Callable[..., Anchors]


def find_anchors_resumable(
    params: Params,
    config: ModelConfig,
    edits: Sequence[EditTokens],
    layer: int,
    settings: AnchorConfig,
    on_progress: Callable[[int], None] | None = None,
    rooms: Rooms | None = None,
    *,
    checkpoint: Path | None = None,
    part: int = 512,
    find: FindAnchors = find_anchors,
) -> Anchors:
    """What `find` makes of `edits`, found by all processes together; every process returns all of it.

    checkpoint: a folder in which finished parts of `part` edits are kept, under a hash of weights, edits, layer and
        settings. A call that finds some there, after a run that was killed, does not compute them again: with the
        same number of processes the result is the same bit for bit. A damaged file is reported and replaced.
    find: as `jaxedit.targets.anchor.find_anchors`, which it is by default.
    on_progress is told how many more edits are finished, counting those of the other processes as equally fast.

    Raises JaxEditError where the processes were given different models or edits.
    """
    processes = jax.process_count()
    if checkpoint is None and processes == 1:
        return find(params, config, edits, layer, settings, on_progress, rooms)
    about = (FORMAT, whole_fingerprint(params, config), layer, settings)
    check_same("models, edits or settings of anchors", (about, list(edits)))
    order = sorted(range(len(edits)), key=lambda i: suffix_tokens(edits[i]))
    shares = [order[p::processes] for p in range(processes)]
    mine = shares[jax.process_index()]
    report = None if on_progress is None else lambda done: on_progress(done * processes)
    size = len(mine) if checkpoint is None else part
    found = []
    for at in range(0, len(mine), max(1, size)):
        some = [edits[i] for i in mine[at : at + size]]
        file = None if checkpoint is None else Path(checkpoint) / f"{_hash(about, some)}.npz"
        anchors = None if file is None else _kept(file, len(some))
        if anchors is None:
            anchors = find(params, config, some, layer, settings, report, rooms)
            if file is not None:
                _keep(anchors, file)
        elif report is not None:
            report(len(some))
        found.append(anchors)
    return _joined(found, edits, shares)


def _joined(found: list[Anchors], edits: Sequence[EditTokens], shares: list[list[int]]) -> Anchors:
    """The parts of this process, which are those of all processes in turn, in the order of the edits."""
    columns: dict[str, np.ndarray] = {}
    for data, members in zip(gather_bytes(_packed(found)), shares, strict=True):
        if not members:
            continue
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            for name in arrays.files:
                if name not in columns:
                    columns[name] = np.zeros((len(edits), *arrays[name].shape[1:]), arrays[name].dtype)
                columns[name][members] = arrays[name]
    needed = [suffix_tokens(e) for e in edits]
    padding = float(np.average(columns.pop("padding"), weights=needed))
    return Anchors(**columns, padding=padding)


def _packed(found: list[Anchors]) -> bytes:
    """Anchors one after the other as the bytes of an .npz; their padding is repeated for each edit."""
    if not found:
        return b""
    every = [a._replace(padding=np.full(len(a.value), a.padding))._asdict() for a in found]  # type: ignore[arg-type]
    held = io.BytesIO()
    columns = {name: np.concatenate([np.asarray(a[name]) for a in every]) for name in every[0]}
    np.savez(held, **columns)  # type: ignore[arg-type]
    return held.getvalue()


def _hash(*content) -> str:
    return hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()


def _kept(file: Path, n: int) -> Anchors | None:
    """What an earlier run left, or None. A damaged file is reported, and will be replaced."""
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            anchors = Anchors(**{name: arrays[name] for name in Anchors._fields})
        if len(anchors.value) != n:
            raise ValueError(f"it holds {len(anchors.value)} edits, expected {n}")
        return anchors._replace(padding=float(anchors.padding))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        warnings.warn(f"kept anchors {file} are not usable and are found again: {error}", stacklevel=3)
        return None


def _keep(anchors: Anchors, file: Path) -> None:
    try:
        write_atomically(file, lambda path: np.savez(path, **anchors._asdict()))  # type: ignore[arg-type]
    except OSError as error:  # the anchors themselves are fine: go on without
        warnings.warn(f"anchors could not be kept: {error}", stacklevel=3)
