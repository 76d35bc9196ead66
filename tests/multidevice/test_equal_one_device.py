"""Statistics, anchors, edits and evaluation on 8 devices and in 2 processes of 2 equal those of one device.

In float64 and with few updates: in float32 Adam, at the published learning rate, drives rounding differences apart.
"""

import shutil

import jax
import numpy as np
import pytest
import worker

import jaxedit as je

SAME = 1e-9  # relative to the array's norm; 1e-5 is what is promised, in float32


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """``(model, tokenizer, results)`` of one device, float64."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setenv("JAXEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        model, tokenizer = je.load(worker.LLAMA, "float64")
        return model, tokenizer, worker.work(model, tokenizer)


def assert_same(found, expected, tolerance=SAME):
    names = [name for name in found if not name.startswith("shard.")]
    assert names
    for name in names:
        a, b = np.nan_to_num(found[name]), np.nan_to_num(expected[name])
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), name
        assert np.isfinite(found[name]).any() and np.linalg.norm(b) > 0, name


def test_eight_devices(one, run_with_devices, tmp_path):
    run_with_devices(8, "worker.py", tmp_path / "found", 2, 4, JAXEDIT_CACHE=str(tmp_path))
    found = dict(np.load(tmp_path / "found.npz"))
    assert_same(found, one[2])
    shards = {name.removeprefix("shard."): tuple(x) for name, x in found.items() if name.startswith("shard.")}
    assert shards == {
        "down": (6, 48, 64),
        "edited": (6, 48, 64),
        "up": (6, 64, 48),
        "norm": (6, 64),
        "embed": (512, 64),
    }


def test_two_processes(one, start_processes, finish, tmp_path):
    finish(*start_processes(2, 2, "worker.py", tmp_path / "found", 4, 1, JAXEDIT_CACHE=str(tmp_path)))
    first, second = (dict(np.load(tmp_path / name)) for name in ("found.npz", "found.1.npz"))
    assert_same(first, one[2])
    assert_same(second, first, 0)


def test_killed_and_started_again(one, start_processes, finish, tmp_path):
    """Process 1 is killed in the statistics, then in the anchors; each time all are started again."""
    cache = tmp_path / "cache"

    def start(kill: str):
        return start_processes(2, 2, "worker.py", tmp_path / "found", 4, 1, JAXEDIT_CACHE=str(cache), KILL=kill)

    def start_and_kill(stage: str):
        first, second = start(stage)
        assert second.wait(timeout=300) == -9
        first.kill()  # it waits for the other one
        for process in (first, second):
            process.communicate()

    start_and_kill("statistics")
    whole = [p.name for p in cache.glob("moments/*.partial/sums/after-*") if "." not in p.name]
    rows = max(int(name.split("-")[1]) for name in whole)
    shutil.copytree(cache, tmp_path / "copy")
    start_and_kill("anchors")
    moments = dict(np.load(tmp_path / "found.moments.npz"))
    seen = moments.pop("seen")
    assert len(seen) <= -(-(worker.ROWS - rows) // 4) and seen[-1] == worker.TOKENS
    assert_same(moments, one[2])
    finish(*start("never"))
    for name, members in (("found.npz", 4), ("found.1.npz", 3)):
        found = dict(np.load(tmp_path / name))
        assert found.pop("computed") < members
        assert_same(found, one[2])
    resume_on_one_device(one, tmp_path / "copy", rows)


def resume_on_one_device(one, cache, rows: int):
    """A checkpoint of two processes, gone on from in one with other batches."""
    model, tokenizer, expected = one
    seen = []
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setenv("JAXEDIT_CACHE", str(cache))
        found = worker.statistics(model, tokenizer, batch=3, on_progress=lambda done, _: seen.append(done))
    assert len(seen) <= -(-(worker.ROWS - rows) // 3)
    assert_same({f"moment.{l}": found[l].matrix for l in worker.LAYERS}, expected)
