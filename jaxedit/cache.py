"""Where jaxedit keeps what it downloads or computes once, and how files get there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """The cache's root: the environment variable JAXEDIT_CACHE, or ~/.cache/jaxedit. It may not exist yet."""
    return Path(os.environ.get("JAXEDIT_CACHE") or "~/.cache/jaxedit").expanduser()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Create or replace the file `path` in one step; parent directories are created.

    write: writes the whole file to the path it is given, a temporary one in the same folder with the same
        extension. If it raises, the temporary file is removed, `path` stays as it was, and the error goes on.
    Safe with several processes writing the same path: the last one to finish wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{os.getpid()}-{secrets.token_hex(4)}-{path.name}"
    try:
        write(temporary)
        with open(temporary, "rb+") as file:  # Windows flushes only files that are open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_directory(to: Path, write: Callable[[Path], None]) -> None:
    """Create or replace the directory `to` in one step; parents are created.

    write: fills the empty directory that it is given, in the same folder. If it raises, that one is removed, `to` stays
        as it was, and the error goes on.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
    try:
        write(fresh)
        fresh.chmod(0o755)
        _swap(fresh, to)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _swap(fresh: Path, to: Path) -> None:
    if not to.exists():
        fresh.rename(to)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{to.name}-old-", dir=to.parent))
    to.rename(old / to.name)
    fresh.rename(to)
    shutil.rmtree(old)
