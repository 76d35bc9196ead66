"""Which implementation is chosen and why, and lowering for GPUs and TPUs that are not here."""

import jax
import jax.numpy as jnp
import pytest
from helpers_second_moment import DEVICES, MOSAIC_GPU, needs_mosaic_gpu, on
from jaxedit_kernels.second_moment import bytes_moved, flops, resolve_implementation, second_moment
from jaxedit_kernels.second_moment.specs import HOPPER_CANDIDATES, HopperSpec, hopper_spec

D_FF = (6400, 14336, 16384, 18944)


def resolve(device: str, n: int = 8192, d: int = 14336, dtype=jnp.bfloat16, total_dtype=jnp.float32, **options):
    return resolve_implementation(n, d, dtype, total_dtype, device=DEVICES[device], **options)


def lowered(device: str, platform: str, d: int, dtype=jnp.bfloat16, n: int = 8192, **options) -> str:
    """The program that adds n rows to one of five sums, as text."""

    def add(total, x, slot):
        return second_moment(x, total, slot=slot, **options)

    total = jax.ShapeDtypeStruct((5, d, d), jnp.float32)
    x, slot = jax.ShapeDtypeStruct((n, d), dtype), jax.ShapeDtypeStruct((), jnp.int32)
    with on(device):
        return jax.jit(add, donate_argnums=0).trace(total, x, slot).lower(lowering_platforms=(platform,)).as_text()


def assert_one_kernel_in_place(text: str, target: str) -> None:
    calls = [line for line in text.splitlines() if f"@{target}" in line]
    assert len(calls) == 1 and "output_operand_alias<" in calls[0]
    assert "dot_general" not in text
    donated = next(line for line in text.splitlines() if "@main" in line)
    assert "tf.aliasing_output = 0" in donated


@needs_mosaic_gpu
@pytest.mark.parametrize("device", ["H100", "H200"])
@pytest.mark.parametrize("d", D_FF)
def test_auto_lowers_to_the_kernel_on_hopper(device, d):
    assert_one_kernel_in_place(lowered(device, "cuda", d), "mosaic_gpu_v2")


@needs_mosaic_gpu
@pytest.mark.parametrize("spec", [*HOPPER_CANDIDATES, hopper_spec(1024, "NVIDIA H200")])
def test_every_tuning_lowers(spec):
    text = lowered("H200", "cuda", 2112, jnp.float16, 1001, implementation="mosaic_gpu", spec=spec)
    assert_one_kernel_in_place(text, "mosaic_gpu_v2")


@needs_mosaic_gpu
def test_lowers_where_each_device_of_a_mesh_keeps_its_own_sum():
    """As statistics do: only "data" is split by hand."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((4, 1), ("data", "model"), axis_types=auto, abstract_device=DEVICES["H100"])
    spec = jax.P("data")

    def share(total, x):
        return second_moment(x, total[0])[None]

    split = jax.shard_map(share, mesh=mesh, in_specs=(spec, spec), out_specs=spec, axis_names={"data"}, check_vma=False)
    total, x = jax.ShapeDtypeStruct((4, 2048, 2048), jnp.float32), jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(split).trace(total, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize("d", D_FF)
def test_lowers_for_a_tpu(d):
    assert_one_kernel_in_place(lowered("TPU", "tpu", d, implementation="mosaic_tpu"), "tpu_custom_call")


def test_auto_takes_the_kernel_on_hopper_and_says_so():
    chosen = resolve("H200")
    if MOSAIC_GPU:
        assert chosen.implementation == "mosaic_gpu" and "NVIDIA H200" in chosen.reason
        assert chosen.spec == HopperSpec() and chosen.cores == 132
    else:
        assert chosen.implementation == "xla" and "or later" in chosen.reason


@pytest.mark.parametrize(
    ("device", "options", "reason"),
    [
        ("TPU", {}, "backend is tpu, not a GPU"),
        ("A100", {}, "A100.* is not of compute capability 9.0"),
        ("B200", {}, "B200 is not of compute capability 9.0"),
        pytest.param("H100", {"dtype": jnp.float32}, "float32, not bfloat16 or float16", marks=needs_mosaic_gpu),
        pytest.param("H100", {"total_dtype": jnp.float64}, "float64, not float32", marks=needs_mosaic_gpu),
        pytest.param("H100", {"d": 14344}, "14344 is not a multiple of 64", marks=needs_mosaic_gpu),
    ],
)
def test_auto_falls_back_to_xla_with_the_reason(device, options, reason):
    chosen = resolve(device, **options)
    assert chosen.implementation == "xla" and chosen.spec is None
    with pytest.raises(ValueError, match=reason) as refused:
        resolve(device, implementation="mosaic_gpu", **options)
    assert chosen.reason.removeprefix("the Mosaic GPU kernel cannot run: ") in str(refused.value)


def test_what_runs_here_follows_the_default_device():
    chosen = resolve_implementation(64, 128, jnp.bfloat16)
    if jax.default_backend() == "cpu":
        assert chosen.implementation == "xla" and "backend is cpu" in chosen.reason


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_is_asked_for_is_used(implementation):
    assert resolve("H200", implementation=implementation).implementation == implementation


@pytest.mark.parametrize(
    ("device", "options", "reason"),
    [("H100", {}, "not a TPU"), ("TPU", {"dtype": jnp.float16}, "float16"), ("TPU", {"d": 6410}, "multiple of")],
)
def test_a_tpu_kernel_that_cannot_run_is_refused(device, options, reason):
    with pytest.raises(ValueError, match=reason):
        resolve(device, implementation="mosaic_tpu", **options)


def test_wrong_arguments_are_explained():
    x = jnp.zeros((4, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match="unknown implementation 'cublas'; choose auto"):
        second_moment(x, implementation="cublas")
    with pytest.raises(ValueError, match=r"needs \[16, 16\]"):
        second_moment(x, jnp.zeros((2, 16, 16)))
    with pytest.raises(ValueError, match=r"needs \[slots, 16, 16\] with slot=0"):
        second_moment(x, jnp.zeros((16, 16)), slot=0)
    with pytest.raises(ValueError, match=r"needs \[4\]"):
        second_moment(x, mask=jnp.ones(5, bool))
    with pytest.raises(ValueError, match="sums are kept in float32"):
        second_moment(x, jnp.zeros((16, 16), jnp.bfloat16))
    with pytest.raises(ValueError, match="takes floats"):
        second_moment(jnp.zeros((4, 16), jnp.int32))


def test_counts_of_work():
    """One multiplication and one addition per pair of columns and row; x once, one triangle there and back."""
    n, d = 7, 5
    pairs = sum(1 for i in range(d) for _ in range(i, d))
    assert flops(n, d) == 2 * n * pairs
    assert bytes_moved(n, d) == n * d * 2 + pairs * 4 * 2
