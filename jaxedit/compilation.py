"""Compiled programs, kept on disk between runs.

A first edit compiles several dozen programs, which takes longer than the edit; read back from disk they cost about a
tenth of that. JAX has such a cache and leaves it off. It is one setting for the whole process, so jaxedit touches it
in one place, `jaxedit.load`, and only where nobody else has.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from jaxedit.cache import cache_dir

SWITCH = "JAXEDIT_COMPILATION_CACHE"
MIN_SECONDS = 0.02  # below this, reading a program back is not quicker than compiling it
MAX_BYTES = 1 << 30  # the programs used least recently are removed beyond it


def keep_programs() -> Path | None:
    """Switch on JAX's persistent compilation cache in ``<cache>/xla`` (see `jaxedit.cache.cache_dir`).

    Returns the folder in use from now on, or None where there is none. Whatever the user has set, by
    ``jax.config`` or in the environment, stays: the folder (``jax_compilation_cache_dir``), a cache that is off
    (``jax_enable_compilation_cache``), the shortest compilation that is kept and the largest size of the folder. The
    environment variable JAXEDIT_COMPILATION_CACHE=0 leaves everything to JAX, and so does a folder that cannot be
    written to.
    """
    settings: Any = jax.config
    chosen = settings.jax_compilation_cache_dir
    if not settings.jax_enable_compilation_cache:
        return None
    if chosen is not None or os.environ.get(SWITCH) == "0":
        return Path(chosen) if chosen else None
    folder = cache_dir() / "xla"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # programs are run: nobody else may write them
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    _drop_unfinished(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    _unless_set("jax_persistent_cache_min_compile_time_secs", 1.0, MIN_SECONDS)
    _unless_set("jax_compilation_cache_max_size", -1, MAX_BYTES)
    return folder


def _drop_unfinished(folder: Path) -> None:
    """Remove programs of processes that were killed while they wrote them.

    JAX writes a program and then, beside it, when it was last used. One that lacks that may be cut short, and as long
    as it lies there JAX, which looks at all of them, keeps no other program.
    """
    names = set(os.listdir(folder))
    for name in names:
        if name.endswith("-cache") and name.removesuffix("-cache") + "-atime" not in names:
            (folder / name).unlink(missing_ok=True)


def _unless_set(name: str, default, value) -> None:
    """Change a setting of JAX that still has its default and is not in the environment."""
    if getattr(jax.config, name) == default and name.upper() not in os.environ:
        jax.config.update(name, value)
