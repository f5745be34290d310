"""Quantization against numpy: the references, and the Hopper kernels in interpret mode."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
import quantize_numpy as expected

from dsv3_jax.ops import quantize
from dsv3_jax.ops.quantize import (
    Tiled,
    mosaic_gpu_blocks,
    mosaic_gpu_norm,
    mosaic_gpu_rows,
    mosaic_gpu_swiglu,
    mosaic_gpu_swiglu_backward,
    mosaic_gpu_tiles,
)
from dsv3_jax.ops.quantize import reference as jnp_reference
from dsv3_jax.ops.quantize.mosaic_gpu_pipeline import round_tile_to_e5m6

INTERPRET = {"blocks": 2, "interpret": plgpu.InterpretGPUParams()}
LOWERED = {"lowering_platforms": ("cuda",)}
# Compiled whole: op by op, each shape would compile dozens of programs.
quantize_rows, quantize_blocks, dequantize = map(
    jax.jit, (quantize.quantize_rows, quantize.quantize_blocks, quantize.dequantize)
)


@pytest.mark.parametrize("shape", [(256, 256), (48, 576), (16, 160), (24, 80)])
def test_reference_of_rows_and_columns(shape):
    @jax.jit
    def tiles(x):
        tiled = jnp_reference.quantize_rows, jnp_reference.quantize_columns
        return {power_of_2: [quantize(x, power_of_2) for quantize in tiled] for power_of_2 in (False, True)}

    x = expected.hard(shape) if shape[1] > 128 else expected.wide(0, shape)
    for power_of_2, (rows, columns) in tiles(x).items():
        expected.assert_tiled(rows, expected.rows(x, power_of_2))
        expected.assert_tiled(columns, expected.columns(x, power_of_2))


def test_reference_op_by_op_is_the_same():
    x = expected.hard((16, 160))
    expected.assert_tiled(jnp_reference.quantize_rows(jnp.asarray(x), power_of_2=True), expected.rows(x, True))


def test_special_tiles():
    x = expected.hard((16, 128))
    tiles = quantize_rows(x)
    back = np.asarray(dequantize(tiles))
    assert (np.asarray(tiles.values).astype(np.float32)[3] == 0).all()
    assert (back[3:5] == 0).all()
    assert np.isnan(back[7:10]).all()
    assert np.isfinite(np.delete(back, [7, 8, 9], axis=0)).all()
    ordinary = expected.wide(2, (64, 128))
    back = np.asarray(dequantize(quantize_rows(ordinary)))
    largest = np.abs(ordinary.astype(np.float32)).max(axis=1, keepdims=True)
    assert (np.abs(back - ordinary.astype(np.float32)) <= largest / 28 + 1e-30).all()


def test_ties_go_to_even_mantissas():
    x = expected.hard((16, 128))
    bits = np.asarray(quantize_rows(x).values).view(np.uint8)[5, :126]
    below = np.arange(126)
    np.testing.assert_array_equal(bits, below + below % 2)


@pytest.mark.parametrize("shape", [(256, 384), (200, 72)])
def test_reference_of_blocks(shape):
    weight = expected.wide(3, (2, *shape), np.float32)
    blocks = jax.device_get(quantize_blocks(weight))
    for group in range(2):
        values, transposed, scales = expected.blocks(weight[group])
        expected.assert_identical(blocks.values[group], values)
        expected.assert_identical(blocks.transposed[group], transposed)
        expected.assert_identical(blocks.scales[group], scales)


def test_reference_of_retile():
    values, scales = expected.rows(expected.wide(4, (200, 160)))
    columns = jax.jit(jnp_reference.retile)(Tiled(values, scales))
    expected.assert_tiled(columns, expected.columns(expected.dequantize(values, scales)))


def test_e5m6_takes_the_nearest_of_all_its_numbers():
    numbers = np.sort([m * 2.0 ** (e - 20) for e in range(31) for m in range(64 if e else 0, 128)] + [0.0])
    numbers = np.unique(np.concatenate([numbers[numbers <= 65024], [m * 2.0**-20 for m in range(64)]]))
    ties = (numbers[:-1] + numbers[1:]) / 2
    x = np.concatenate([numbers, ties, np.nextafter(ties, 0), [70000.0]]).astype(np.float32)
    distance = np.abs(x[:, None].astype(np.float64) - numbers)
    odd = np.arange(len(numbers)) % 2  # the order of the numbers is that of their bits
    nearest = numbers[np.lexsort((np.broadcast_to(odd, distance.shape), distance), axis=1)[:, 0]]
    for sign in (1, -1):
        rounded = np.asarray(jax.jit(jnp_reference.round_to_e5m6)(sign * x))
        np.testing.assert_array_equal(rounded, sign * nearest)


def test_e5m6_tiles_have_powers_of_two():
    x = expected.wide(5, (32, 200))

    @jax.jit
    def there_and_back(x):
        tiles = quantize.quantize_e5m6(x)
        return *tiles, quantize.dequantize_e5m6(*tiles)

    values, scales, back = map(np.asarray, there_and_back(x))
    assert (values.view(np.uint16) & 15 == 0).all()
    assert (np.frexp(scales)[0] == 0.5).all()
    smallest = np.repeat(scales.T, 128, axis=1)[:, :200] * 2.0**-21
    error = np.abs(back - x.astype(np.float32))
    assert (error <= np.maximum(np.abs(x.astype(np.float32)) / 128, smallest)).all()


@pytest.mark.parametrize(("k", "power_of_2"), [(384, False), (320, True), (192, False)])
def test_kernel_of_rows_and_columns(k, power_of_2):
    x = expected.hard((256, k), nan=False)
    rows, columns = mosaic_gpu_tiles.quantize(jnp.asarray(x), power_of_2=power_of_2, **INTERPRET)
    expected.assert_tiled(rows, expected.rows(x, power_of_2))
    expected.assert_tiled(columns, expected.columns(x, power_of_2))


def test_kernels_of_one_orientation():
    x = expected.hard((256, 128), nan=False)
    (columns,) = mosaic_gpu_tiles.quantize(jnp.asarray(x), along_rows=False, **INTERPRET)
    expected.assert_tiled(columns, expected.columns(x))
    x = expected.hard((200, 128), nan=False)
    (rows,) = mosaic_gpu_tiles.quantize(jnp.asarray(x), along_columns=False, **INTERPRET)
    expected.assert_tiled(rows, expected.rows(x))


def test_rounding_in_registers_gives_e5m6_of_all_magnitudes():
    x = jnp.asarray(expected.hard((2048, 128), nan=False))
    theirs = jax.jit(lambda x: jnp_reference.dequantize_e5m6(*jnp_reference.quantize_e5m6(x)).astype(x.dtype))(x)
    expected.assert_identical(jax.jit(round_tile_to_e5m6)(x), theirs)


def test_kernel_of_columns_through_e5m6():
    x = expected.hard((256, 256), nan=False)
    (columns,) = mosaic_gpu_tiles.quantize(
        jnp.asarray(x), along_rows=False, power_of_2=True, through_e5m6=True, **INTERPRET
    )
    theirs = jax.jit(jnp_reference.quantize_columns_through_e5m6)(x)
    expected.assert_identical(columns.values, np.asarray(theirs.values))
    expected.assert_identical(columns.scales, np.asarray(theirs.scales))


def test_kernel_of_retile():
    x = Tiled(*map(jnp.asarray, expected.rows(expected.wide(6, (256, 256)))))
    columns = mosaic_gpu_tiles.retile(x, **INTERPRET)
    expected.assert_tiled(columns, expected.columns(expected.dequantize(np.asarray(x.values), np.asarray(x.scales))))


def test_kernel_of_retile_of_gathered_rows():
    values, scales = expected.rows(expected.wide(6, (40, 512)), power_of_2=True)
    rows = np.random.default_rng(7).integers(0, 44, 256, dtype=np.int32)  # 40 and more hold nothing
    assert (rows >= 40).any()
    taken, taken_scales = (np.concatenate([x, np.zeros((4, x.shape[1]), x.dtype)])[rows] for x in (values, scales.T))
    wanted = expected.columns(expected.dequantize(taken, taken_scales.T))
    columns = mosaic_gpu_rows.retile_rows(
        jnp.asarray(values), jnp.asarray(taken_scales.T), jnp.asarray(rows), **INTERPRET
    )
    expected.assert_tiled(columns, wanted)
    expected.assert_tiled(jax.jit(quantize.retile)(Tiled(jnp.asarray(values), jnp.asarray(scales)), rows), wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("n", [256, 192])
def test_kernel_of_blocks(n, dtype):
    weight = expected.wide(7, (2, 128, n), np.float32).astype(dtype)
    blocks = jax.device_get(mosaic_gpu_blocks.quantize_blocks(jnp.asarray(weight), **INTERPRET))
    for group in range(2):
        values, transposed, scales = expected.blocks(weight[group])
        expected.assert_identical(blocks.values[group], values)
        expected.assert_identical(blocks.transposed[group], transposed)
        expected.assert_identical(blocks.scales[group], scales)


@pytest.mark.parametrize("d", [256, 1024])
def test_kernel_of_rms_norm(d):
    x, gain = jnp.asarray(expected.wide(8, (16, d))), jnp.asarray(expected.wide(9, (d,), np.float32))
    normed, tiles = mosaic_gpu_norm.rms_norm_quantize(x, gain, 1e-6, **INTERPRET)
    reference_normed, _ = jax.jit(jnp_reference.rms_norm_quantize)(x, gain, 1e-6)
    np.testing.assert_allclose(normed.astype(np.float32), reference_normed.astype(np.float32), rtol=2.0**-7)
    expected.assert_tiled(tiles, expected.rows(normed))  # of its own rounded result, exactly
    nothing, alone = mosaic_gpu_norm.rms_norm_quantize(x, gain, 1e-6, power_of_2=True, keep=False, **INTERPRET)
    assert nothing is None
    expected.assert_tiled(alone, expected.rows(normed, power_of_2=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_kernels_of_swiglu(weighted):
    hidden, d_out = jnp.asarray(expected.wide(10, (128, 512))), jnp.asarray(expected.wide(11, (128, 256)))
    weights = jnp.asarray(np.random.default_rng(12).uniform(size=128), jnp.float32) if weighted else None
    kept, out = mosaic_gpu_swiglu.swiglu_quantize(hidden, weights, **INTERPRET)
    expected.assert_tiled(kept, expected.rows(hidden))
    theirs = jax.jit(jnp_reference.swiglu_quantize)(hidden, weights)[1]
    expected.assert_close(out, theirs.values, theirs.scales)
    ours = mosaic_gpu_swiglu_backward.swiglu_quantize_backward(kept, d_out, weights, **INTERPRET)
    theirs = jax.jit(jnp_reference.swiglu_quantize_backward)(kept, d_out, weights)
    for name in ("d_hidden_rows", "d_hidden_columns", "output_columns"):
        expected.assert_close(getattr(ours, name), getattr(theirs, name).values, getattr(theirs, name).scales)
    if weighted:
        scale = np.abs(np.asarray(theirs.d_weights)).max()
        np.testing.assert_allclose(ours.d_weights, theirs.d_weights, rtol=1e-4, atol=1e-6 * scale)
    else:
        assert ours.d_weights is None


def test_reference_swiglu_backward_is_the_gradient():
    rng = np.random.default_rng(0)
    hidden, d_out = (rng.standard_normal((64, width)).astype(np.float32) for width in (512, 256))
    weights = rng.uniform(size=64).astype(np.float32)

    def swiglu(hidden, weights):
        gate, up = jnp.split(hidden, 2, axis=-1)
        return jax.nn.silu(gate) * up * weights[:, None]

    @jax.jit
    def both(hidden, d_out, weights):
        kept = jnp_reference.quantize_rows(hidden)
        out, pullback = jax.vjp(swiglu, quantize.dequantize(kept), weights)
        d_hidden, d_weights = pullback(d_out)
        ours = jnp_reference.swiglu_quantize_backward(kept, d_out, weights)
        tiles = ours.d_hidden_rows, ours.d_hidden_columns, ours.output_columns
        return [quantize.dequantize(t) for t in tiles], (d_hidden, d_hidden.T, out.T), ours.d_weights, d_weights

    ours, exact, d_weights, exact_d_weights = jax.device_get(both(hidden, d_out, weights))
    for got, want in zip(ours, exact, strict=True):
        assert np.linalg.norm(got - want) < 0.04 * np.linalg.norm(want)
    np.testing.assert_allclose(d_weights, exact_d_weights, rtol=1e-4, atol=1e-4)


def _tiled_shape(rows, k):
    return Tiled(
        jax.ShapeDtypeStruct((rows, k), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((k // 128, rows), jnp.float32)
    )


def _gathered_shape(tokens, rows, k):
    values, scales = jax.tree.leaves(_tiled_shape(tokens, k))
    return values, F32(scales.shape[0], rows), jax.ShapeDtypeStruct((rows,), jnp.int32)


BF16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
F32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731


@pytest.mark.parametrize(
    ("kernel", "inputs"),
    [
        (mosaic_gpu_tiles.quantize, [BF16(4096, 7168)]),
        (mosaic_gpu_tiles.quantize, [BF16(4096, 576)]),
        (lambda x: mosaic_gpu_tiles.quantize(x, along_columns=False, power_of_2=True), [BF16(4104, 18432)]),
        (mosaic_gpu_tiles.retile, [_tiled_shape(32768, 2048)]),
        (mosaic_gpu_rows.retile_rows, [*_gathered_shape(4096, 33280, 7168)]),
        (lambda x, gain: mosaic_gpu_norm.rms_norm_quantize(x, gain, 1e-6), [BF16(4096, 7168), F32(7168)]),
        (lambda x, gain: mosaic_gpu_norm.rms_norm_quantize(x, gain, 1e-6), [BF16(4096, 1280), F32(1280)]),
        (mosaic_gpu_swiglu.swiglu_quantize, [BF16(4096, 4096), F32(4096)]),
        (mosaic_gpu_swiglu_backward.swiglu_quantize_backward, [_tiled_shape(4096, 4096), BF16(4096, 2048), F32(4096)]),
        (mosaic_gpu_blocks.quantize_blocks, [F32(4, 7168, 4096)]),
        (mosaic_gpu_blocks.quantize_blocks, [F32(4, 7168, 576)]),
    ],
    ids=[
        "both",
        "narrow last tile",
        "rows",
        "retile",
        "gathered",
        "rms_norm",
        "narrow rms_norm",
        "swiglu",
        "swiglu backward",
        "blocks",
        "narrow last block",
    ],
)
def test_kernels_lower_for_the_gpu(kernel, inputs):
    jax.jit(kernel).trace(*inputs).lower(**LOWERED)


def test_implementations_are_named_and_refused():
    x = jnp.ones((128, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="choose one of 'reference', 'mosaic_gpu'"):
        quantize.quantize_rows(x, implementation="cuda")
    for refused, why in (
        (x, "needs a Hopper GPU"),
        (x[:, :72], "widths in multiples of 64, not 72"),
        (x[:7], "rows in mult"),
    ):
        with pytest.raises(NotImplementedError, match=why):
            quantize.quantize_rows(refused, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="takes bfloat16, not float32"):
        quantize.quantize_both(x.astype(jnp.float32), implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="do not fit"):
        quantize.rms_norm_quantize(
            jnp.ones((4, 20480), jnp.bfloat16), jnp.ones(20480), 1e-6, implementation="mosaic_gpu"
        )


def test_quotients_are_the_nearest_whatever_the_division_gives():
    divisors = np.abs(expected.wide(13, 4000)).astype(np.float32)
    divisors = np.maximum(np.concatenate([divisors, np.random.default_rng(14).uniform(1, 2, 4000)]), 1e-30)
    divisors = divisors.astype(np.float32)
    nearest_quotient = jax.jit(jnp_reference.nearest_quotient)
    for numerator in (448, 65024):
        nearest = np.float32(numerator) / divisors
        for units in (-2, -1, 0, 1, 2):
            off = (nearest.view(np.int32) + units).view(np.float32)
            corrected = nearest_quotient(off, divisors)
            expected.assert_identical(corrected, nearest)
