"""Importing, the compilation cache, and what loading holds in memory; each in a process of its own."""

import ast
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxedit as je
from jaxedit.memory import USABLE, anchor_cost, lanes_that_fit, tokens_per_step
from jaxedit.models.checkpoint import SafetensorsCheckpoint
from jaxedit.models.conversion import flatten
from jaxedit.models.hub import read_decoder
from jaxedit.targets.anchor_plan import Shape

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **environment: str | None) -> dict:
    """What `code` left in `result`, run by a new process with these variables set, or unset where None."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA_FLAGS"))}
    base |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "JAX_PLATFORMS": "cpu"}
    base |= {k: v for k, v in environment.items() if v is not None}
    whole = f"import json, sys\n{code}\nprint('\\n' + json.dumps(result))"
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", whole], env=base, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- import


def test_import_waits_for_first_use():
    heavy = ("jax", "numpy", "flax", "optax", "transformers", "orbax", "huggingface_hub", "gguf", "safetensors", "rich")
    found = run(
        f"import jaxedit; first = [m for m in {heavy} if m in sys.modules]\n"
        "jaxedit.read_requests; second = 'jax' in sys.modules\n"
        "jaxedit.load; third = [m for m in ('transformers', 'orbax', 'huggingface_hub', 'gguf') if m in sys.modules]\n"
        "result = [first, second, third]"
    )
    assert found == [[], False, []]


@pytest.mark.parametrize(
    "before",
    [
        "import jaxedit.targets.anchor",
        "from jaxedit.targets import strategies",
        "import jaxedit as j; j.targets",
        "pass",
    ],
)
def test_targets_is_the_function_whatever_was_imported_before(before):
    code = (
        f"{before}\nimport jaxedit, jaxedit.targets.strategies\nfrom jaxedit.targets.anchor import Anchors\n"
        "result = [jaxedit.targets.__name__, jaxedit.targets is jaxedit.edit.find_targets]"
    )
    assert run(code) == ["find_targets", True]


def test_names_are_complete():
    source = ast.parse(inspect.getsource(je))
    checked = next(node for node in source.body if isinstance(node, ast.If)).body
    typed = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in checked
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(typed) == set(je.__all__) <= set(dir(je))
    assert typed == {name: (f"jaxedit.{module}", there) for name, (module, there) in je._HOMES.items()}
    for name in je.__all__:
        value = getattr(je, name)
        if callable(value):
            assert pickle.loads(pickle.dumps(value)) is value
    assert isinstance(je.__version__, str) and "__version__" in dir(je)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        je.nothing  # type: ignore[attr-defined]  # noqa: B018


# --- compiled programs

_LOAD = "import jaxedit as je, jax\nmodel, _ = je.load({!r})\nje.logits(model, [[1, 2, 3]])\n"
_SETTINGS = (
    "c = jax.config\nresult = [c.jax_compilation_cache_dir, c.jax_persistent_cache_min_compile_time_secs, "
    "c.jax_compilation_cache_max_size]"
)


@pytest.fixture
def tiny(goldens, tmp_path):
    """A model's folder without its tokenizer, which takes a while to load."""
    to = tmp_path / "model"
    to.mkdir()
    for name in ("config.json", "model.safetensors"):
        (to / name).symlink_to(goldens / "tiny-llama" / name)
    return str(to)


def test_compiled_programs_are_kept(tiny, tmp_path):
    code = _LOAD.format(tiny) + _SETTINGS
    folder = tmp_path / "cache" / "xla"
    assert run(code, JAXEDIT_CACHE=str(tmp_path / "cache")) == [str(folder), 0.02, 1 << 30]
    assert any(p.name.startswith("jit__forward") and p.name.endswith("-cache") for p in folder.iterdir())
    assert folder.stat().st_mode & 0o077 == 0


def test_programs_that_a_killed_process_left_half_written_are_dropped(tiny, tmp_path):
    """JAX would otherwise keep no further program."""
    folder = tmp_path / "cache" / "xla"
    folder.mkdir(parents=True)
    (folder / "jit_old-123-cache").write_bytes(b"cut sh")
    run(_LOAD.format(tiny) + "result = None", JAXEDIT_CACHE=str(tmp_path / "cache"))
    kept = {p.name for p in folder.iterdir()}
    assert "jit_old-123-cache" not in kept and any(name.startswith("jit__forward") for name in kept)


@pytest.mark.parametrize(
    "set_by_user, expected",
    [
        ({"JAXEDIT_COMPILATION_CACHE": "0"}, [None, 1.0, -1]),
        ({"JAX_COMPILATION_CACHE_DIR": "{tmp}/own"}, ["{tmp}/own", 1.0, -1]),
        ({"JAX_ENABLE_COMPILATION_CACHE": "0"}, [None, 1.0, -1]),
        ({"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1.0"}, ["{tmp}/cache/xla", 1.0, 1 << 30]),
        ({"JAX_COMPILATION_CACHE_MAX_SIZE": "123456"}, ["{tmp}/cache/xla", 0.02, 123456]),
        ({"JAXEDIT_CACHE": "/proc/nowhere"}, [None, 1.0, -1]),
    ],
)
def test_what_the_user_set_stays(tmp_path, set_by_user, expected):
    environment = {"JAXEDIT_CACHE": str(tmp_path / "cache")} | {
        k: v.format(tmp=tmp_path) for k, v in set_by_user.items()
    }
    code = f"import jax\nfrom jaxedit.compilation import keep_programs\nkeep_programs()\n{_SETTINGS}"
    wanted = [x.format(tmp=tmp_path) if isinstance(x, str) else x for x in expected]
    assert run(code, **environment) == wanted


# --- loading

_PEAK = """
import threading, time
import jax, jax.numpy as jnp
import jaxedit as je
je.load
mesh = je.make_mesh(1, len(jax.devices())) if len(jax.devices()) > 1 else None
for device in jax.devices():
    jax.device_put(jnp.ones(8), device).block_until_ready()
def used():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith("VmRSS")).split()[1])
before, peak, done = used(), [0], []
def watch():
    while not done:
        peak[0] = max(peak[0], used())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model, _ = je.load({path!r}, dtype="bfloat16", mesh=mesh)
jax.block_until_ready(model.params)
done.append(1)
thread.join()
sizes = [x.nbytes for x in jax.tree.leaves(model.params)]
where = {{str(x.sharding.is_fully_replicated) for x in jax.tree.leaves(model.params)}}
result = [(peak[0] - before) / sum(sizes), sorted(where), len(jax.devices())]
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Llama of 0.2 GB in bfloat16, stored in float32: twice as large on disk as it will be in memory."""
    from safetensors.numpy import save_file

    d, ff, n, vocab = 768, 3072, 8, 16000
    chance = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (vocab, d), "lm_head.weight": (vocab, d), "model.norm.weight": (d,)}
    for l in range(n):
        at = f"model.layers.{l}."
        shapes |= {at + f"self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
        shapes |= {at + f"mlp.{x}_proj.weight": (ff, d) for x in ("gate", "up")}
        shapes |= {at + "mlp.down_proj.weight": (d, ff)}
        shapes |= {at + f"{x}_layernorm.weight": (d,) for x in ("input", "post_attention")}
    to = tmp_path_factory.mktemp("large")
    save_file({k: chance.standard_normal(s, np.float32) for k, s in shapes.items()}, to / "model.safetensors")
    config = {
        "model_type": "llama",
        "hidden_size": d,
        "intermediate_size": ff,
        "num_hidden_layers": n,
        "num_attention_heads": 8,
        "vocab_size": vocab,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
    (to / "config.json").write_text(json.dumps(config))
    return str(to)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory use from /proc")
@pytest.mark.parametrize("devices", [1, 8])
def test_loading_holds_the_model_once(large, devices):
    found = run(
        _PEAK.format(path=large),
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        JAXEDIT_COMPILATION_CACHE="0",
    )
    assert found[2] == devices
    assert found[1] == (["True"] if devices == 1 else ["False", "True"])
    assert found[0] < 1.6


class _Whole(SafetensorsCheckpoint):
    """A checkpoint that cannot read parts."""

    reads_parts = False


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "logits_only/phi3", "logits_only/gpt_neox"])
def test_reading_parts_gives_what_whole_tensors_give(goldens, name):
    parts = read_decoder(SafetensorsCheckpoint(goldens / name), name)
    mesh = je.make_mesh(1, 1)
    for other in (read_decoder(_Whole(goldens / name), name), read_decoder(_Whole(goldens / name), name, mesh=mesh)):
        theirs = flatten(other.params)
        for path, mine in flatten(parts.params).items():
            np.testing.assert_array_equal(mine, theirs[path], err_msg=path)


# --- memory of the anchor optimiser


def test_cost_of_anchors_is_what_its_arrays_take(decoder):
    """Of the parts that can be counted by hand; benchmarks/memory_plan.py compares the whole with the compiler."""
    config = decoder("logits_only/qwen2").config
    shape = Shape(rows=2, longest=32, prefix=16, tail=24, packed=64, before=30, suffix=48, asks=3, targets=1)
    costs = [
        anchor_cost(config, dtype, 0, shape, keep)
        for dtype, keep in (("float32", ("q", "gate")), ("float32", ("q",)), ("bfloat16", ("q",)))
    ]
    above = config.n_layer - 1
    assert costs[0].lane - costs[1].lane == above * 48 * config.d_ff * 4
    assert costs[1].copy == 2 * above * 32 * config.n_kv_head * config.head_dim * 4 == 2 * costs[2].copy
    assert costs[0].total(4, 8) - costs[0].total(4, 7) == costs[0].held
    for held in (1, 2):
        free = int(costs[0].total(10, 10 * held) / USABLE) + 10
        assert lanes_that_fit(costs[0], free, held_per_lane=held) == 10
        assert tokens_per_step(costs[0], 48, free, held_per_lane=held) == 480
    assert lanes_that_fit(costs[0], 0) == 0
    with pytest.raises(je.JaxEditError, match="GB of device memory"):
        tokens_per_step(costs[0], 48, 1000)


def test_sharded_tensors_are_read_in_parts(goldens, monkeypatch):
    """On one device of several, a part is all that is asked for."""
    source = SafetensorsCheckpoint(goldens / "tiny-llama")
    asked = []
    original = SafetensorsCheckpoint.tensor
    monkeypatch.setattr(
        SafetensorsCheckpoint, "tensor", lambda self, name, part=(): asked.append(part) or original(self, name, part)
    )
    read_decoder(source, "tiny-llama", mesh=je.make_mesh(1, 1, jax.devices()[:1]))
    assert asked and all(asked)
