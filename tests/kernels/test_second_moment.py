"""Every implementation of second_moment against float64 numpy: shapes, masks, sums that go on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_second_moment import SMALL, assert_upper, gram, needs_mosaic_gpu, running
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxedit_kernels.second_moment import second_moment
from jaxedit_kernels.second_moment.specs import HOPPER_CANDIDATES, HopperSpec, TPUSpec, tile_order

EVERYWHERE = ["reference", "xla", pytest.param("mosaic_gpu", marks=needs_mosaic_gpu), "mosaic_tpu"]
each = pytest.mark.parametrize("implementation", EVERYWHERE)
# d where tiles hang over the edge, as far as an implementation allows: TPU tiles must divide d
ODD = {"reference": 77, "xla": 1101, "mosaic_gpu": 320, "mosaic_tpu": 384}


def normal(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def call(implementation: str, x, total=None, mask=None, **options):
    spec = SMALL.get(implementation)
    return second_moment(x, total, mask, implementation=implementation, spec=spec, **options)


@each
@pytest.mark.parametrize("n", [1, 130])
def test_the_upper_triangle_is_x_transposed_x(implementation, n, capfd):
    x = normal(n, n, ODD[implementation])
    with running(implementation, capfd):
        found = call(implementation, x)
    assert found.dtype == jnp.float32
    assert_upper(found, gram(x), x)


@each
def test_masked_rows_count_as_zeros_whatever_they_hold(implementation, capfd):
    x, mask = normal(0, 100, 128), np.arange(100) % 3 > 0
    x = jnp.where(mask[:, None], x, jnp.nan)
    with running(implementation, capfd):
        found = call(implementation, x, mask=jnp.asarray(mask))
    assert_upper(found, gram(x[mask]), x[mask])


@each
def test_a_mask_of_nothing_leaves_the_sum_as_it_was(implementation, capfd):
    x, total = normal(0, 40, 128), normal(1, 128, 128, dtype=jnp.float32)
    with running(implementation, capfd):
        found = call(implementation, x, total, jnp.zeros(40, bool))
    np.testing.assert_array_equal(np.triu(found), np.triu(total))


@each
def test_adds_to_one_slot_of_a_stack_in_a_compiled_loop(implementation, capfd):
    """As statistics do: one batch after the other, a slot per layer, with the slot known only when it runs."""
    d = ODD[implementation]
    batches, total = normal(0, 2, 70, d), normal(1, 3, d, d, dtype=jnp.float32)

    @jax.jit
    def run(total, slot):
        step = lambda total, x: (call(implementation, x, total, slot=slot), None)  # noqa: E731
        return jax.lax.scan(step, total, batches)[0]

    with running(implementation, capfd):
        found = np.asarray(run(total, 1))
    before, rows = np.asarray(total, np.float64), batches.reshape(-1, d)
    assert_upper(found[1], before[1] + gram(rows), rows, before[1])
    np.testing.assert_array_equal(found[[0, 2]], np.asarray(total)[[0, 2]])


@pytest.mark.parametrize("implementation", EVERYWHERE[:2])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_other_dtypes(implementation, dtype):
    x = normal(0, 65, 130, dtype=dtype)
    assert_upper(call(implementation, x), gram(x), x)


@needs_mosaic_gpu
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (HopperSpec(), jnp.bfloat16),
        (HopperSpec(cluster=1, delay_release=1), jnp.float16),
        (HopperSpec(tile_m=256, tile_n=128, stages=3, cluster=1), jnp.bfloat16),
        (HopperSpec(tile_m=64, tile_n=64, consumers=1, tile_k=32, stages=2, epilogue_n=32), jnp.float16),
    ],
    ids=["default", "one block", "tall", "small"],
)
def test_mosaic_gpu_under_other_tunings(spec, dtype, capfd):
    x, total = normal(0, 130, 320, dtype=dtype), normal(1, 320, 320, dtype=jnp.float32)
    with running("mosaic_gpu", capfd):
        found = second_moment(x, total, implementation="mosaic_gpu", spec=spec)
    before = np.asarray(total, np.float64)
    assert_upper(found, before + gram(x), x, before)


def test_float64_is_kept():
    with jax.enable_x64(True):
        x = normal(0, 50, 200, dtype=jnp.float64)
        found = second_moment(x)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(np.triu(found), np.triu(gram(x)), rtol=0, atol=1e-12)


def test_no_rows_change_nothing():
    total = normal(0, 16, 16, dtype=jnp.float32)
    np.testing.assert_array_equal(second_moment(jnp.zeros((0, 16), jnp.bfloat16), total), total)


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 20), d=st.integers(1, 300), strips=st.integers(1, 9), seed=st.integers(0, 99))
def test_xla_strips_cover_the_upper_triangle(n, d, strips, seed):
    from jaxedit_kernels.second_moment import xla

    x = np.random.default_rng(seed).integers(-3, 4, (n, d)).astype(np.float32)
    found = xla.second_moment(jnp.asarray(x), jnp.zeros((1, d, d)), 0, strips)[0]
    np.testing.assert_array_equal(np.triu(found), np.triu(gram(x)))


@given(
    d=st.integers(1, 3000),
    tile_m=st.sampled_from([64, 128, 256]),
    tile_n=st.sampled_from([64, 128, 256]),
    group=st.integers(1, 9),
)
def test_tiles_cover_the_upper_triangle_once_and_nothing_below_it(d, tile_m, tile_n, group):
    order = tile_order(d, tile_m, tile_n, group)
    touched = np.zeros((-(-d // tile_m), -(-d // tile_n)), int)
    np.add.at(touched, tuple(order.T), 1)
    top, right = np.arange(touched.shape[0]) * tile_m, np.arange(1, touched.shape[1] + 1) * tile_n
    # A tile holds something on or right of the diagonal where its right edge lies beyond its top edge
    np.testing.assert_array_equal(touched, right[None] > top[:, None])


@pytest.mark.parametrize("d", [6400, 14336, 16384, 18944])
def test_less_than_a_24th_of_the_tiles_work_is_wasted_on_the_diagonal(d):
    spec = HopperSpec()
    done = len(tile_order(d, spec.cluster * spec.tile_m, spec.tile_n, spec.group)) * spec.cluster * spec.tile_m
    assert done * spec.tile_n / (d * (d + 1) / 2) < 1 + 1 / 24


@pytest.mark.parametrize(
    "wrong",
    [
        {"tile_m": 96},
        {"tile_n": 512},
        {"tile_k": 24},
        {"stages": 1, "delay_release": 1},
        {"epilogue_n": 48},
        {"stages": 6},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_a_spec_that_the_hardware_cannot_run_is_refused(wrong):
    with pytest.raises(ValueError, match="HopperSpec"):
        HopperSpec(**wrong)


def test_a_spec_that_a_tpu_cannot_run_is_refused():
    with pytest.raises(ValueError, match="multiples of 128"):
        TPUSpec(tile=100)


def test_candidates_differ():
    assert len(set(HOPPER_CANDIDATES)) == len(HOPPER_CANDIDATES) and HOPPER_CANDIDATES[0] == HopperSpec()


@needs_mosaic_gpu
def test_the_simulator_reports_a_race(capfd):
    """Guards the tests above: two warpgroups write one place of shared memory, and nothing keeps them apart."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def racy(out, shared):
        shared[...] = jnp.full((128,), jax.lax.axis_index("warpgroup"), jnp.int32)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared, out)
        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        racy,
        out_type=jax.ShapeDtypeStruct((128,), jnp.int32),
        scratch_types={"shared": plgpu.SMEM((128,), jnp.int32)},
        num_threads=2,
        thread_name="warpgroup",
    )
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match="RACE DETECTED"):
        with running("mosaic_gpu", capfd):
            jax.block_until_ready(kernel())
