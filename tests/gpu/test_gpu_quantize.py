"""The Hopper kernels of quantization on a GPU, against numpy or, where exponentials and roots enter, the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantize_numpy as expected

from dsv3_jax.ops import quantize
from dsv3_jax.ops.quantize import Tiled

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

KERNEL = {"implementation": "mosaic_gpu"}


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("shape", [(128, 128), (384, 512), (4096, 1536), (8, 256), (200, 1280), (1024, 576)])
def test_rows_and_columns(shape, power_of_2):
    x = expected.hard(shape) if shape[0] > 8 else expected.wide(0, shape)
    on_gpu = jnp.asarray(x)
    rows = quantize.quantize_rows(on_gpu, power_of_2, **KERNEL)
    expected.assert_tiled(rows, expected.rows(x, power_of_2))
    if shape[0] % 128 == 0:
        columns = quantize.quantize_columns(on_gpu, power_of_2, **KERNEL)
        expected.assert_tiled(columns, expected.columns(x, power_of_2))


@pytest.mark.parametrize("shape", [(128, 128), (384, 7168), (4096, 512), (16384, 576)])
def test_both(shape):
    x = expected.hard(shape)
    rows, columns = quantize.quantize_both(jnp.asarray(x), **KERNEL)
    expected.assert_tiled(rows, expected.rows(x))
    expected.assert_tiled(columns, expected.columns(x))


@pytest.mark.parametrize("shape", [(128, 128), (384, 7168), (4096, 512)])
def test_retile(shape):
    values, scales = expected.rows(expected.wide(1, shape))
    retiled = quantize.retile(Tiled(jnp.asarray(values), jnp.asarray(scales)), **KERNEL)
    expected.assert_tiled(retiled, expected.columns(expected.dequantize(values, scales)))


@pytest.mark.parametrize("shape", [(384, 512), (4096, 2048)])
def test_columns_through_e5m6(shape):
    x = jnp.asarray(expected.hard(shape))
    ours, theirs = (quantize.quantize_columns_through_e5m6(x, implementation=i) for i in ("mosaic_gpu", "reference"))
    expected.assert_tiled(ours, (np.asarray(theirs.values), np.asarray(theirs.scales)))


@pytest.mark.parametrize("shape", [(100, 256), (4096, 7168), (16384, 2048)])
def test_retile_of_gathered_rows(shape):
    tokens = Tiled(*map(jnp.asarray, expected.rows(expected.wide(1, shape), power_of_2=True)))
    # More strips than multiprocessors, and a share of places out of range.
    rows = jnp.asarray(np.random.default_rng(2).integers(0, shape[0] * 9 // 8, 24832, dtype=np.int32))
    taken = [jnp.take(x, rows, axis=0, mode="fill", fill_value=0) for x in (tokens.values, tokens.scales.T)]
    wanted = quantize.retile(Tiled(taken[0], taken[1].T), implementation="reference")
    run = jax.jit(lambda tokens, rows: quantize.retile(tokens, rows, **KERNEL))
    for _ in range(20):  # a place that is replaced too early shows in some of many runs
        got = run(tokens, rows)
        assert (got.values.view(jnp.uint8) == wanted.values.view(jnp.uint8)).all()
        assert (got.scales == wanted.scales).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("n", [640, 576])
def test_blocks(n, dtype):
    weight = jnp.asarray(expected.wide(2, (3, 256, n), np.float32)).astype(dtype)
    blocks = quantize.quantize_blocks(weight, **KERNEL)
    for group in range(3):
        values, transposed, scales = expected.blocks(weight[group])
        expected.assert_identical(blocks.values[group], values)
        expected.assert_identical(blocks.transposed[group], transposed)
        expected.assert_identical(blocks.scales[group], scales)


@pytest.mark.parametrize("shape", [(1024, 7168), (12, 256), (256, 1280), (64, 1536)])
def test_rms_norm(shape):
    x, gain = jnp.asarray(expected.wide(3, shape)), jnp.asarray(expected.wide(4, shape[1:], np.float32))
    normed, tiles = quantize.rms_norm_quantize(x, gain, 1e-6, **KERNEL)
    theirs, _ = quantize.rms_norm_quantize(x, gain, 1e-6, implementation="reference")
    np.testing.assert_allclose(normed.astype(np.float32), theirs.astype(np.float32), rtol=2.0**-7)
    expected.assert_tiled(tiles, expected.rows(normed))


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu(weighted):
    hidden, d_out = jnp.asarray(expected.wide(5, (1024, 4096))), jnp.asarray(expected.wide(6, (1024, 2048)))
    weights = jax.random.uniform(jax.random.key(0), (1024,)) if weighted else None
    kept, out = quantize.swiglu_quantize(hidden, weights, **KERNEL)
    expected.assert_tiled(kept, expected.rows(hidden))
    theirs = quantize.swiglu_quantize(hidden, weights, "reference")[1]
    expected.assert_close(out, theirs.values, theirs.scales)
    ours = quantize.swiglu_quantize_backward(kept, d_out, weights, **KERNEL)
    theirs = quantize.swiglu_quantize_backward(kept, d_out, weights, "reference")
    for name in ("d_hidden_rows", "d_hidden_columns", "output_columns"):
        tiled = getattr(theirs, name)
        expected.assert_close(getattr(ours, name), tiled.values, tiled.scales, rounded=True)
    if weighted:
        scale = np.abs(np.asarray(theirs.d_weights)).max()
        np.testing.assert_allclose(ours.d_weights, theirs.d_weights, rtol=1e-4, atol=1e-6 * scale)
