"""The product of each row with its group's weight, and its gradients, against a loop over rows."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv3_jax.ops.grouped_matmul import grouped_matmul, mosaic_gpu, reference
from dsv3_jax.ops.hopper import Config
from dsv3_jax.ops.weights import MixedWeight

GROUPS, TILE, TILES, K, N = 4, 8, 12, 6, 5


def layout(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Group of each row (-1: padding) and of each tile."""
    row_group, tile_group = [], []
    for group, size in enumerate(sizes):
        tiles = -(-size // TILE)
        row_group += [group] * size + [-1] * (tiles * TILE - size)
        tile_group += [group] * tiles
    spare = TILES - len(tile_group)
    return np.array(row_group + [-1] * spare * TILE), np.array(tile_group + [GROUPS - 1] * spare, np.int32)


def row_by_row(x, weight, dy, row_group):
    """Product and gradients in float64; rows that hold nothing contribute nothing."""
    x, weight, dy = (np.asarray(a, np.float64) for a in (x, weight, dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(weight)
    for row, group in enumerate(row_group):
        if group >= 0:
            y[row] = x[row] @ weight[group]
            dx[row] = weight[group] @ dy[row]
            dw[group] += np.outer(x[row], dy[row])
    return y, dx, dw


@jax.jit
def product_and_gradients(x, weight, tile_group, dy):
    y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, tile_group), x, weight)
    return y, *pullback(dy)


def operands(sizes: list[int], dtype) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(sum(sizes))
    row_group, tile_group = layout(sizes)
    x = np.where(row_group[:, None] >= 0, rng.normal(size=(TILES * TILE, K)), 0)
    weight, dy = rng.normal(size=(GROUPS, K, N)), rng.normal(size=(TILES * TILE, N))
    return x.astype(dtype), weight.astype(dtype), dy.astype(dtype), row_group, tile_group


group_sizes = st.lists(st.integers(0, 19), min_size=GROUPS, max_size=GROUPS)


@settings(max_examples=20, deadline=None)
@example([TILES * TILE, 0, 0, 0])
@example([0, 0, 0, 37])
@example([0, 0, 0, 0])
@example([1, 0, 1, 0])
@given(group_sizes)
def test_float32_product_and_gradients_are_those_of_a_loop(sizes):
    x, weight, dy, row_group, tile_group = operands(sizes, np.float32)
    y, dx, dw = map(np.asarray, product_and_gradients(x, weight, tile_group, dy))
    expected_y, expected_dx, expected_dw = row_by_row(x, weight, dy, row_group)
    held = row_group >= 0
    np.testing.assert_allclose(y, expected_y, atol=1e-5)
    np.testing.assert_allclose(dx[held], expected_dx[held], atol=1e-5)
    np.testing.assert_allclose(dw, expected_dw, atol=1e-5)


@pytest.mark.parametrize("sizes", [[19, 0, 7, 16], [TILES * TILE, 0, 0, 0]], ids=["uneven", "all-in-one"])
def test_bf16_weights_get_the_float32_gradient_of_their_bf16_operands(sizes):
    x, value, dy, row_group, tile_group = operands(sizes, ml_dtypes.bfloat16)
    weight = MixedWeight(value, np.zeros(value.shape, np.float32))
    y, dx, dw = product_and_gradients(x, weight, tile_group, dy)
    expected_y, expected_dx, expected_dw = row_by_row(x, value, dy, row_group)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert dw.slot.dtype == jnp.float32
    np.testing.assert_allclose(dw.slot, expected_dw, atol=2e-5)  # rounded to bf16 it would be off by 1e-2
    held = row_group >= 0
    np.testing.assert_allclose(np.float32(y), expected_y, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(np.float32(dx)[held], expected_dx[held], rtol=2**-8, atol=1e-5)


def test_a_plain_float32_weight_under_bf16_rows_keeps_its_gradient_in_float32():
    x, weight, dy, row_group, tile_group = operands([19, 0, 7, 16], ml_dtypes.bfloat16)
    _, _, dw = product_and_gradients(x, weight.astype(np.float32), tile_group, dy)
    assert dw.dtype == jnp.float32
    np.testing.assert_allclose(dw, row_by_row(x, weight, dy, row_group)[2], atol=2e-5)


def test_hopper_kernels_interpreted_are_the_reference_on_tiles_that_have_rows():
    rng = np.random.default_rng(0)
    shapes = ((512, 192), (512, 136), (3, 192, 136))
    x, dy, w = (rng.normal(size=shape).astype(ml_dtypes.bfloat16) for shape in shapes)
    tile_group, bounds = np.array([0, 2, 2, 3], np.int32), np.array([0, 1, 1, 3], np.int32)
    run = {"config": Config(128, 128, 2), "num_sms": 2, "interpret": plgpu.InterpretGPUParams()}
    held = slice(0, 384)
    narrow_dy, narrow_w = dy[:, :128], w[:, :, :128]

    @jax.jit  # of arguments: constants would be folded, slowly
    def products(x, dy, w, narrow_dy, narrow_w):
        y = mosaic_gpu.grouped_product(x, w, tile_group, **run)
        dx = mosaic_gpu.grouped_product(narrow_dy, narrow_w, tile_group, transposed=True, **run)
        return y, dx, *(mosaic_gpu.grouped_wgrad(x, dy, bounds, squares=squares, **run) for squares in (False, True))

    @jax.jit
    def expected(x, dy, w, narrow_dy, narrow_w):
        y = reference.grouped_forward(x, w, tile_group)
        return (
            y,
            reference.grouped_dgrad(narrow_dy, narrow_w, tile_group),
            reference.grouped_wgrad(x, dy, tile_group, 3),
        )

    *got, dw, (again, squares) = jax.device_get(products(x, dy, w, narrow_dy, narrow_w))
    *want, want_dw = jax.device_get(expected(x, dy, w, narrow_dy, narrow_w))
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(np.float32(ours[held]), np.float32(theirs[held]), rtol=2**-7, atol=1e-2)
    np.testing.assert_allclose(dw, want_dw, atol=1e-4)
    assert not dw[1].any()
    np.testing.assert_array_equal(again, dw)
    np.testing.assert_allclose(squares, np.square(dw.astype(np.float64)).sum(axis=(1, 2)), rtol=1e-5)


def test_naming_a_kernel_that_cannot_run_says_why():
    x, w = jnp.zeros((128, 64), jnp.bfloat16), jnp.zeros((2, 64, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="takes groups in tiles of 128 rows, not 64"):
        grouped_matmul(x, w, jnp.zeros(2, jnp.int32), implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU, the backend is cpu"):
        grouped_matmul(x, w, jnp.zeros(1, jnp.int32), implementation="mosaic_gpu")


def test_clusters_that_the_bf16_kernels_do_not_have_are_refused():
    x, w = jnp.zeros((128, 64), jnp.bfloat16), jnp.zeros((1, 64, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"cluster=2: .* cluster must be 1"):
        mosaic_gpu.grouped_product(x, w, jnp.zeros(1, jnp.int32), config=Config(cols=64, cluster=2))
