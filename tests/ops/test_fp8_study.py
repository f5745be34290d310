"""The simulated short accumulator against a slow one in numpy, and against the reference where it is wide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.ops import quantize
from dsv3_jax.ops.fp8_matmul import api, study
from dsv3_jax.ops.fp8_matmul.study import Accumulator
from dsv3_jax.ops.quantize import TILE, Blocked, Tiled

few = settings(max_examples=5, deadline=None)
# Compiled whole: op by op, each shape would compile dozens of programs.
quantize_rows, quantize_columns, quantize_blocks, dequantize, dequantize_blocks = map(
    jax.jit,
    (
        quantize.quantize_rows,
        quantize.quantize_columns,
        quantize.quantize_blocks,
        quantize.dequantize,
        quantize.dequantize_blocks,
    ),
)
accumulators = st.builds(
    Accumulator,
    bits=st.integers(5, 24),
    step=st.sampled_from([16, 32, 128]),
    interval=st.sampled_from([128, 256, None]),
)


def cut(x, bits):
    """Towards zero, by arithmetic rather than by masks."""
    mantissa, exponent = np.frexp(np.float64(x))
    return np.ldexp(np.trunc(np.ldexp(mantissa, bits)), exponent - bits)


def slow_dot(a, b, a_scales, b_scales, accumulator):
    """One element of the product, one step after the other."""
    total = short = 0.0
    interval = accumulator.interval or len(a) + TILE
    for start in range(0, len(a), accumulator.step):
        part = slice(start, start + accumulator.step)
        scale = a_scales[start // TILE] * b_scales[start // TILE]
        partial = (a[part] * b[part]).sum()
        short = cut(short + (partial if interval == TILE else partial * scale), accumulator.bits)
        if (start + accumulator.step) % interval == 0:
            total, short = total + (short * scale if interval == TILE else short), 0.0
    return total + (short * scale if interval == TILE else short)


def slow_product(a, b, accumulator):
    a_values, b_values = (np.asarray(q.values, np.float64) for q in (a, b))
    a_scales, b_scales = (np.asarray(q.scales, np.float64) for q in (a, b))
    return np.array(
        [
            [slow_dot(x, y, a_scales[:, i], b_scales[:, j], accumulator) for j, y in enumerate(b_values)]
            for i, x in enumerate(a_values)
        ]
    )


def whole_numbers(rng, rows, k):
    """Small integers, and scales that are powers of two: float32 sums of them are exact in any order."""
    values = rng.integers(-15, 16, (rows, k)).astype(np.float32).astype(jnp.float8_e4m3fn)
    return Tiled(values, np.exp2(rng.integers(-3, 4, (-(-k // TILE), rows)).astype(np.float32)))


def rows_as_weight(q):
    """The operand q, [n, k], as the transposed layout of a weight whose blocks all have the first row's scales."""
    scales = q.scales[:, :1]
    weight = Blocked(q.values.T, q.values, scales, scales.T)
    return weight, Tiled(q.values, np.broadcast_to(scales, q.scales.shape))


def error(got, exact):
    return jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@few
@given(st.integers(0, 2**32 - 1), accumulators, st.sampled_from([64, 128, 200, 640]))
def test_dense_products_are_those_of_a_slow_simulation(seed, accumulator, k):
    rng = np.random.default_rng(seed)
    a, (weight, b) = whole_numbers(rng, 3, k), rows_as_weight(whole_numbers(rng, 5, k))
    expected = slow_product(a, b, accumulator)
    as_read_backward = Blocked(weight.transposed, weight.values, weight.scales.T, weight.scales)

    @jax.jit  # of arguments: constants would be folded, slowly
    def products(a, b, weight, as_read_backward):
        return (
            study.fp8_matmul(a, weight, jnp.float32, accumulator=accumulator),
            study.fp8_matmul_transposed(a, as_read_backward, jnp.float32, accumulator=accumulator),
            study.fp8_wgrad(a, b, accumulator=accumulator),
        )

    for got in products(a, b, weight, as_read_backward):
        np.testing.assert_array_equal(got, expected)


@few
@given(st.integers(0, 2**32 - 1), accumulators)
def test_grouped_products_are_those_of_a_slow_simulation(seed, accumulator):
    rng = np.random.default_rng(seed)
    tile_group = np.array([0, 2, 2, 2, 3])  # group 1 is empty, and the last tile is of no group
    rows, k, n = TILE * len(tile_group), 3, 2
    x, dy = whole_numbers(rng, k, rows), whole_numbers(rng, n, rows)
    dw = jax.jit(lambda *a: study.fp8_grouped_wgrad(*a, 3, accumulator=accumulator))(x, dy, tile_group)
    for group, tiles in enumerate([slice(0, 1), slice(0, 0), slice(1, 4)]):
        part = slice(tiles.start * TILE, tiles.stop * TILE)
        x_part, dy_part = (Tiled(q.values[:, part], q.scales[tiles]) for q in (x, dy))
        expected = slow_product(x_part, dy_part, accumulator) if tiles.stop else np.zeros((k, n))
        np.testing.assert_array_equal(dw[group], expected)


@pytest.mark.parametrize(("tile", "interval"), [(8, 128), (128, 128), (128, None)])
def test_a_wide_accumulator_gives_the_reference(tile, interval):
    wide = Accumulator(bits=24, interval=interval)
    tile_group = np.array([0, 0, 0, 1, 3, 3, 4, 4])
    rows, k, n, groups = 8 * tile, 200, 160, 4
    x, dy = normal(0, rows, k), normal(1, rows, n)
    x[6 * tile :] = dy[6 * tile :] = 0
    one, many = quantize_blocks(normal(2, k, n)), quantize_blocks(normal(2, groups, k, n))
    rows_of, columns_of = (quantize_rows(x), quantize_rows(dy)), (quantize_columns(x), quantize_columns(dy))
    total = normal(3, groups, k, n)
    operands = (rows_of, columns_of, one, many, tile_group, total)

    def products(op, operands):
        (x, dy), (x_columns, dy_columns), one, many, tile_group, total = operands
        return {
            "forward": op("fp8_matmul")(x, one, jnp.float32),
            "input gradient": op("fp8_matmul_transposed")(dy, one, jnp.float32),
            "weight gradient": op("fp8_wgrad")(x_columns, dy_columns, total[0]),
            "grouped forward": op("fp8_grouped_matmul")(x, many, tile_group, jnp.float32),
            "grouped input gradient": op("fp8_grouped_matmul_transposed")(dy, many, tile_group, jnp.float32),
            "grouped weight gradient": op("fp8_grouped_wgrad")(x_columns, dy_columns, tile_group, groups, total),
        }

    studied = functools.partial(products, lambda name: functools.partial(getattr(study, name), accumulator=wide))
    got_all = jax.jit(studied)(operands)
    expected_all = jax.jit(functools.partial(products, lambda name: getattr(api, name)))(operands)
    for name, expected in expected_all.items():
        got = got_all[name]
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=2e-5 * float(np.abs(expected).max()), err_msg=name)


def test_without_promotion_the_error_grows_with_the_length_of_the_sum():
    @jax.jit
    def errors(x, weight):
        x, weight = quantize_rows(jnp.abs(x)), quantize_blocks(jnp.abs(weight))
        exact = api.fp8_matmul(x, weight, jnp.float32)
        kinds = (study.NEVER_PROMOTED, study.HOPPER)
        return [error(study.fp8_matmul(x, weight, jnp.float32, accumulator=a), exact) for a in kinds]

    never, promoted = zip(*(errors(normal(0, 8, k), normal(1, k, 8)) for k in (128, 1024, 8192)), strict=True)
    assert never[0] < 3e-4
    assert never[1] > 4 * never[0]
    assert never[2] > 4 * never[1]
    assert max(promoted) < 3e-4


@few
@given(st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False), st.integers(1, 24))
def test_truncation_keeps_the_leading_bits(x, bits):
    assert float(study.truncate(jnp.float32(x), bits)) == cut(x, bits)


def test_what_is_not_finite_stays_so():
    special = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(study.truncate(special, 5), special)


@pytest.mark.parametrize("shape", [(128, 256), (200, 130)])
def test_gradients_by_block_share_the_scale_of_their_block(shape):
    x = normal(0, *shape) * np.exp2(np.float32(np.arange(shape[0]) % 40 - 20))[:, None]
    rows, columns = jax.jit(study.quantize_both_by_block)(x)
    in_rows = np.asarray(dequantize(rows))
    like = jax.eval_shape(quantize_rows, x), jax.eval_shape(quantize_columns, x)
    assert jax.tree.map(jnp.shape, (rows, columns)) == jax.tree.map(jnp.shape, like)
    np.testing.assert_array_equal(in_rows, dequantize_blocks(quantize_blocks(x)))
    np.testing.assert_array_equal(in_rows, np.asarray(dequantize(columns)).T)
    scales = np.asarray(rows.scales)
    assert (scales[:, :TILE] == scales[:, :1]).all()
    small = np.abs(x).max(axis=1) < 1e-5  # far below the largest of the block, these vanish; by tile they do not
    assert (in_rows[small] == 0).all()
    by_tile = np.asarray(dequantize(quantize_rows(x)))[small]
    assert np.linalg.norm(by_tile - x[small]) < 0.05 * np.linalg.norm(x[small])


@pytest.mark.parametrize("bad", [{"bits": 0}, {"bits": 25}, {"step": 48}, {"step": 0}, {"interval": 64}])
def test_accumulators_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        Accumulator(**bad)
