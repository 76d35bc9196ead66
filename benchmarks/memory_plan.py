"""Device memory that an edit of Llama-3-8B needs, stage by stage, from the compiler: nothing is allocated or run.

Every program of a Forward Replay edit is compiled ahead of time at the real shapes, for a GPU that need not be there:
with the CUDA plugin of JAX installed (``pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12``, no
driver needed) the target is an H100. Without it the target is this machine's CPU, where 16-bit products are made from
32-bit copies, so that temporaries come out larger than on a GPU.

A stage's peak is the weights of the whole model, whatever else stays on the device, and the program's arguments,
outputs and temporaries, less outputs that reuse arguments. Workspaces that cuSOLVER asks for while it runs are not in
it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
from importlib.metadata import version
from pathlib import Path

from shapes import SHAPES

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Autotuning would run kernels; without it the Triton products it chooses from cannot all be compiled
_XLA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens of one edit in each of its shapes; about what CounterFact has with six contexts of Llama-3's tokens."""

    longest: int = 32
    prefix: int = 24
    tail: int = 8
    packed: int = 160
    before: int = 128
    suffix: int = 40
    asks: int = 12
    keys: int = 96  # rows cut at the decisive token, without the clean prompt
    clean: int = 24


ROWS = 7  # six contexts and the KL term's


# Lanes, edits held, layer, what is kept, and other sizes, to compare the estimate with
_TRIED = (
    (64, 64, 4, 0, {}),
    (64, 64, 4, 3, {}),
    (16, 64, 4, 1, {}),
    (16, 16, 4, 0, {}),
    (64, 64, 4, 1, {"suffix": 24, "tail": 4}),
    (32, 32, 4, 0, {"suffix": 80, "tail": 16, "packed": 240, "before": 160, "longest": 40}),
    (64, 64, 8, 2, {"asks": 42, "suffix": 72, "tail": 12}),
    (64, 64, 27, 0, {}),
    (64, 64, 30, 1, {"asks": 6, "packed": 400, "before": 360, "longest": 72, "prefix": 64}),
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Bytes. `resident`: on the device beside this program's arguments. chosen: False for an alternative to another
    stage, which takes too much memory or more time."""

    name: str
    resident: int
    arguments: int
    outputs: int
    temporaries: int
    reused: int
    estimate: int | None = None
    chosen: bool = True

    @property
    def peak(self) -> int:
        return self.resident + self.arguments + self.outputs + self.temporaries - self.reused


class Planner:
    """Compiles programs for one device, for a model that stays there all the time."""

    def __init__(self, device, config, dtype: str):
        import jax
        from jax.sharding import SingleDeviceSharding

        from jaxedit.models.config import parameter_shapes
        from jaxedit.models.conversion import nest

        self.device, self.config, self.dtype = device, config, dtype
        self.sharding = SingleDeviceSharding(device)
        self.jax = jax
        self.params = nest({name: self.array(s, dtype) for name, (s, _) in parameter_shapes(config).items()})
        self.weights = self.size(self.params)

    def array(self, shape, dtype):
        return self.jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding)

    def like(self, tree):
        return self.jax.tree.map(lambda x: self.array(x.shape, x.dtype), tree)

    def size(self, tree) -> int:
        leaves = self.jax.tree.leaves(tree)
        return sum(x.size * x.dtype.itemsize for x in leaves if hasattr(x, "dtype"))  # the rest is static

    def stage(self, name: str, function, *arguments, resident: int = 0, x64: bool = False, **static) -> Stage:
        """Arguments that are the model's weights are not counted twice, nor left out if the program needs few."""
        with self.jax.enable_x64(x64):
            compiled = function.lower(*arguments, **static).compile()
        found = compiled.memory_analysis()
        others = self.size([a for a in arguments if a is not self.params])
        return Stage(
            name,
            self.weights + resident,
            others,
            found.output_size_in_bytes,
            found.temp_size_in_bytes,
            found.alias_size_in_bytes,
        )


def anchors(at: Planner, sizes: Sizes, lanes: int, edits: int, layer: int, keep: tuple[str, ...]) -> Stage:
    """Preparation and the whole optimisation loop, Adam's state included."""
    import jax.numpy as jnp

    from jaxedit.memory import anchor_cost
    from jaxedit.presets import method_for
    from jaxedit.targets import anchor, anchor_room
    from jaxedit.targets.anchor_plan import Plan, Shape

    targets = sizes.asks // (ROWS - 1)
    shape = Shape(
        ROWS,
        sizes.longest,
        sizes.prefix,
        sizes.tail,
        sizes.packed,
        sizes.before,
        sizes.suffix,
        sizes.asks,
        targets,
    )
    i32, n = jnp.int32, edits
    plan = Plan(
        tokens=at.array((n, ROWS, sizes.longest), i32),
        lengths=at.array((n, ROWS), i32),
        lookups=at.array((n, ROWS), i32),
        starts=at.array((n, ROWS), i32),
        targets=at.array((n, targets), i32),
        n_target=at.array((n,), i32),
        real=at.array((n,), jnp.bool_),
    )
    settings = method_for("fe", at.config).anchor
    step = anchor_room.Sizes(
        lanes=lanes,
        tokens=lanes * sizes.suffix,
        asks=lanes * sizes.asks,
        packed=lanes * sizes.packed,
        before=lanes * sizes.before,
        prefix=sizes.prefix,
        tail=sizes.tail,
    )
    static = dict(config=at.config, layer=layer, settings=settings, sizes=step, keep=keep, mesh=None)
    name = f"anchors at {layer}, {lanes} of {edits} x {sizes.suffix}, keep {'+'.join(keep) or 'nothing'}"
    made = at.stage(name, anchor._optimise, at.params, plan, **static)
    cost = anchor_cost(at.config, at.dtype, layer, shape, keep)
    return dataclasses.replace(made, estimate=at.weights + cost.total(lanes, edits))


def anchors_in(at: Planner, sizes: Sizes, edits: int, layer: int, memory: float) -> list[Stage]:
    """Every choice of what the backward pass keeps; the first that fits is the one that is taken."""
    from jaxedit.targets.anchor_room import KEPT

    made = [anchors(at, sizes, edits, edits, layer, keep) for keep in KEPT]
    first = next((i for i, s in enumerate(made) if s.estimate <= memory), len(made) - 1)
    return [dataclasses.replace(s, chosen=i == first) for i, s in enumerate(made)]


def statistics(at: Planner, layers, tokens: int = 8192, length: int = 512) -> Stage:
    from jaxedit.moments_pass import _step

    total = at.array((1, len(layers), at.config.d_ff, at.config.d_ff), "float32")
    rows = [at.array((tokens // length, length), "int32")] * 3
    return at.stage(
        "statistics, 8192 tokens a step",
        _step,
        at.params,
        total,
        *rows,
        config=at.config,
        layers=layers,
        mesh=None,
        implementation="xla",
    )


def factor(at: Planner) -> list[Stage]:
    """One layer at a time, the streamed path."""
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from jaxedit.solvers import factors

    d = at.config.d_ff
    mesh = Mesh(np.asarray([at.device]), ("layer",), axis_types=(AxisType.Auto,))
    stack = at.jax.ShapeDtypeStruct((1, d, d), "float32", sharding=NamedSharding(mesh, PartitionSpec("layer")))
    with at.jax.enable_x64(True):
        number, index = at.array((), "float64"), at.array((), "int64")
        chol = at.array((1, d, d), "float64")
        static = dict(mesh=mesh, dtype="float64")
        return [
            at.stage("factor one layer", factors._cholesky, stack, number, number, x64=True, **static),
            at.stage("its panels and condition", factors._panels, chol, index, x64=True),
        ]


def solve(at: Planner, edits: int, resident: int) -> Stage:
    """With the factor of one layer on the device, and `resident` bytes that the layer loop holds."""
    from jaxedit.solvers import ridge
    from jaxedit.solvers.triangle import cut

    d = at.config.d_ff
    with at.jax.enable_x64(True):
        triangle = at.like(at.jax.eval_shape(cut, at.jax.ShapeDtypeStruct((d, d), "float64")))
        k, r = at.array((edits, d), "float64"), at.array((edits, at.config.d_model), "float64")
        mix = at.array((at.config.d_model, 16), "float64")
    return at.stage("solve one layer", ridge._woodbury_on, triangle, k, r, mix, False, x64=True, resident=resident)


def layer_loop(at: Planner, sizes: Sizes, edits: int, layers) -> list[Stage]:
    """Keys and states of the edited layers. Those blocks are held a second time, their edited matrices in float32."""
    from jaxedit import layer_loop as loop
    from jaxedit.models.transformer import Context

    jnp, config, first = at.jax.numpy, at.config, layers[0]
    n = layers[-1] - first + 1
    inner = dataclasses.replace(config, n_layer=n, windows=config.windows[first : first + n])
    band = {"blocks": at.jax.tree.map(lambda x: at.array((n, *x.shape[1:]), x.dtype), at.params["blocks"])}
    down = band["blocks"]["down"]
    band["blocks"]["down"] = {**down, "w": at.array(down["w"].shape, jnp.float32)}
    rows = (edits, sizes.keys)
    tokens = at.array(rows, "int32")
    context = Context(tokens, tokens)
    h = at.array((*rows, config.d_model), at.dtype)
    key = at.array((*rows, config.d_ff), at.dtype)
    lookup, index = at.array((edits, 5), "int32"), at.array((), "int32")
    return [
        at.stage("up to the first edited layer", loop._enter, at.params, config, tokens, context, first),
        at.stage("keys of a layer", loop._look, band, inner, h, context, lookup, index),
        at.stage("states of a layer", loop._finish, band, inner, h, key, index, resident=at.size(h)),
        at.stage(
            "on to the last edited layer", loop._to_last, band, inner, h, context, lookup, 1, False, resident=at.size(h)
        ),
    ]


def edited_model(at: Planner, sizes: Sizes, edits: int, layers) -> list[Stage]:
    """The edited model shares all weights with the base but the stack of edited matrices."""
    from jaxedit import edit

    jax, jnp = at.jax, at.jax.numpy
    stack = at.params["blocks"]["down"]["w"]
    write = jax.jit(lambda stack, new: stack.at[jnp.asarray(layers)].set(new))
    new = at.array((len(layers), *stack.shape[1:]), stack.dtype)
    made = at.stage("write the edited matrices", write, stack, new)
    made = dataclasses.replace(made, arguments=at.size(new))  # the stack is the model's own
    tokens, few = at.array((edits, sizes.clean), "int32"), at.array((edits, 2), "int32")
    weights = at.array((edits, 2), "float32")
    columns = (tokens, tokens, tokens, few, few, weights)
    second = at.size(stack)
    return [
        made,
        at.stage("probabilities of the targets", edit._chances, at.params, at.config, *columns, resident=second),
    ]


def target(wanted: str):
    """``(device, what it is)``; the environment must have been prepared before JAX was imported."""
    import jax

    if wanted == "cuda":
        from jax.experimental import topologies

        try:
            made = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1")
            return made.devices[0], "NVIDIA H100, compiled ahead of time"
        except Exception as error:  # each version refuses in its own way
            print(f"compiling for CUDA is not possible here: {error}")
    return jax.devices("cpu")[0], "this CPU: 16-bit products are made from 32-bit copies, so a GPU needs less"


def plan(at: Planner, sizes: Sizes, edits: int, memory: float) -> list[Stage]:
    from jaxedit.presets import method_for

    layers = method_for("fe", at.config).layers
    looped = layer_loop(at, sizes, edits, layers)
    return [
        statistics(at, layers),
        *factor(at),
        *anchors_in(at, sizes, edits, layers[0], memory),
        *looped,
        solve(at, edits, max(s.arguments for s in looped)),
        *edited_model(at, sizes, edits, layers),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=64, help="edits optimised together (default: 64)")
    parser.add_argument("--memory", type=float, default=24.0, help="of the device, in GB of 1e9 bytes (default: 24)")
    parser.add_argument("--suffix", type=int, default=Sizes.suffix, help="suffix tokens of an edit")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument("--target", choices=("cuda", "cpu"), help="default: cuda where its plugin is installed")
    parser.add_argument("--estimates", action="store_true", help="only compare the estimate of jaxedit.memory")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    args = parser.parse_args()
    wanted = args.target or ("cuda" if any(map(importlib.util.find_spec, _PLUGINS)) else "cpu")
    if wanted == "cuda":  # before JAX is imported; a GPU that is here is left alone
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_XLA_FLAGS}"
    from jaxedit.models.hub import family_of

    device, about = target(wanted)
    at = Planner(device, family_of(SHAPES["llama-3-8b"], "Llama-3-8B")[1], args.dtype)
    sizes = Sizes(suffix=args.suffix)
    if args.estimates:
        from jaxedit.targets.anchor_room import KEPT

        stages = [
            anchors(at, dataclasses.replace(sizes, **more), n, held, layer, KEPT[i])
            for n, held, layer, i, more in _TRIED
        ]
    else:
        stages = plan(at, sizes, args.edits, 1e9 * args.memory)
    print(f"Llama-3-8B, {args.dtype}: weights {at.weights / 1e9:.2f} GB. Target: {about}")
    print(f"{'GB':>50}  resident  arguments  outputs  temporaries  reused   peak  estimate")
    for s in stages:
        numbers = (s.resident, s.arguments, s.outputs, s.temporaries, s.reused, s.peak)
        cells = "  ".join(f"{x / 1e9:8.2f}" for x in numbers)
        print(
            f"{s.name:>50}  {cells}"
            + ("" if s.estimate is None else f"  {s.estimate / 1e9:8.2f}")
            + ("" if s.chosen else "  (alternative)")
        )
    most = max((s for s in stages if s.chosen), key=lambda s: s.peak)
    print(f"peak {most.peak / 1e9:.2f} GB: {most.name}")
    if args.out is not None:
        plain = {
            "format": "jaxedit-memory-1",
            "model": "Llama-3-8B",
            "dtype": args.dtype,
            "edits": args.edits,
            "target": about,
            "versions": {name: version(name) for name in ("jax", "jaxlib")},
            "sizes": dataclasses.asdict(sizes),
            "weights": at.weights,
            "stages": [dataclasses.asdict(s) | {"peak": s.peak} for s in stages],
            "peak": most.peak,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
