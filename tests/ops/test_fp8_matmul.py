"""FP8 products: the reference against numpy, and the Hopper kernels, interpreted on CPU, against the reference."""

import json
from functools import partial
from importlib import resources

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from products_numpy import calc_diff, numpy_blocks, numpy_rows

from dsv3_jax.ops import quantize
from dsv3_jax.ops.fp8_matmul import (
    bench,
    fp8_grouped_matmul,
    fp8_grouped_matmul_transposed,
    fp8_grouped_wgrad,
    fp8_grouped_wgrad_with_squares,
    fp8_matmul,
    fp8_matmul_transposed,
    fp8_wgrad,
    mosaic_gpu,
    reference,
    tune,
)
from dsv3_jax.ops.fp8_matmul.tiles import SHAPES_671B, TUNED, config_for, tiles_key
from dsv3_jax.ops.hopper import Config

INTERPRET = plgpu.InterpretGPUParams()
# The bf16 result of a kernel is off by at most 2^-9 in every element, which makes a calc_diff of about 1.4e-6.
BAR = 1e-5
# Compiled whole: op by op, each shape would compile dozens of programs.
quantize_rows, quantize_columns, quantize_blocks = map(
    jax.jit, (quantize.quantize_rows, quantize.quantize_columns, quantize.quantize_blocks)
)


def normal(seed: int, *shape: int):
    """Rows of very different magnitude, so that a scale in the wrong place shows."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(2 * rng.standard_normal((*shape[:-1], -(-shape[-1] // 64))))
    return jnp.asarray(rng.standard_normal(shape) * np.repeat(sizes, 64, axis=-1)[..., : shape[-1]], jnp.bfloat16)


@pytest.mark.parametrize(("m", "k", "n"), [(96, 200, 144), (128, 128, 256)])
def test_dense_products_are_those_of_the_dequantized_operands(m, k, n):
    x, w, dy = normal(0, m, k), quantize_blocks(normal(1, k, n).astype(jnp.float32)), normal(2, m, n)
    rows, dy_rows, wide = quantize_rows(x), quantize_rows(dy), numpy_blocks(w)
    x_columns, dy_columns = quantize_columns(x), quantize_columns(dy)

    @jax.jit
    def products(rows, dy_rows, x_columns, dy_columns, w):
        return (
            fp8_matmul(rows, w, jnp.float32),
            fp8_matmul_transposed(dy_rows, w, jnp.float32),
            fp8_wgrad(x_columns, dy_columns),
            fp8_wgrad(x_columns, dy_columns, jnp.ones((k, n))),
        )

    dw = numpy_rows(x_columns) @ numpy_rows(dy_columns).T
    expected = numpy_rows(rows) @ wide, numpy_rows(dy_rows) @ wide.T, dw, dw + 1
    for got, want in zip(products(rows, dy_rows, x_columns, dy_columns, w), expected, strict=True):
        assert calc_diff(got, want) < 1e-12


def test_grouped_products_are_those_of_each_tile_with_its_groups_weight():
    groups, k, n, tile_group = 3, 136, 72, jnp.array([0, 0, 2, 3], jnp.int32)  # group 1 and the last tile are empty
    x, dy = normal(0, 512, k).at[384:].set(0), normal(2, 512, n).at[384:].set(0)
    w = quantize_blocks(normal(1, groups, k, n).astype(jnp.float32))
    rows, dy_rows, x_columns, dy_columns = (
        quantize_rows(x),
        quantize_rows(dy),
        quantize_columns(x),
        quantize_columns(dy),
    )

    @jax.jit
    def products(rows, dy_rows, x_columns, dy_columns, w):
        return (
            fp8_grouped_matmul(rows, w, tile_group, jnp.float32),
            fp8_grouped_matmul_transposed(dy_rows, w, tile_group, jnp.float32),
            fp8_grouped_wgrad(x_columns, dy_columns, tile_group, groups, jnp.ones((groups, k, n))),
        )

    y, dx, dw = map(np.asarray, products(rows, dy_rows, x_columns, dy_columns, w))
    wide = numpy_blocks(w)
    for tile, group in enumerate([0, 0, 2]):
        part = slice(128 * tile, 128 * (tile + 1))
        assert calc_diff(y[part], numpy_rows(rows)[part] @ wide[group]) < 1e-12
        assert calc_diff(dx[part], numpy_rows(dy_rows)[part] @ wide[group].T) < 1e-12
    wide_x, wide_dy = numpy_rows(x_columns), numpy_rows(dy_columns)
    for group, part in enumerate([slice(0, 256), slice(0, 0), slice(256, 384)]):
        assert calc_diff(dw[group], wide_x[:, part] @ wide_dy[:, part].T + 1) < 1e-12


def test_weight_gradients_are_added_to_one_layer_of_a_total():
    tile_group = jnp.array([0, 2], jnp.int32)  # group 1 is empty
    x, dy = quantize_columns(normal(0, 256, 136)), quantize_columns(normal(1, 256, 72))
    total, grouped_total = np.ones((4, 136, 72), np.float32), np.ones((4, 3, 136, 72), np.float32)
    dense = jax.jit(fp8_wgrad)(x, dy, total.copy(), jnp.int32(2))
    grouped = jax.jit(fp8_grouped_wgrad, static_argnums=3)(x, dy, tile_group, 3, grouped_total.copy(), jnp.int32(2))
    wide_x, wide_dy = numpy_rows(x), numpy_rows(dy)
    total[2] += wide_x @ wide_dy.T
    for group, part in ((0, slice(0, 128)), (2, slice(128, 256))):
        grouped_total[2, group] += wide_x[:, part] @ wide_dy[:, part].T
    for got, want in ((dense, total), (grouped, grouped_total)):
        assert calc_diff(got, want) < 1e-12
        np.testing.assert_array_equal(np.delete(got, 2, axis=0), 1)
    with pytest.raises(ValueError, match="give the total that is added to"):
        fp8_wgrad(x, dy, layer=jnp.int32(2))


@pytest.mark.parametrize(
    ("config", "k"),
    # Four steps are two turns of two slots; five are counted at run time.
    [(Config(128, stages=2), 512), (Config(192, stages=3), 640), (Config(192, stages=2, cluster=2), 512)],
    ids=["two-warpgroups", "three-warpgroups", "three-warpgroups-in-clusters"],
)
def test_blockwise_kernel_is_the_reference(config, k):
    x, w = quantize_rows(normal(0, 200, k)), quantize_blocks(normal(1, k, 336).astype(jnp.float32))
    run = {"config": config, "num_sms": 2 * config.cluster, "interpret": INTERPRET}
    y = mosaic_gpu.matmul(x.values, x.scales, w.transposed, w.transposed_scales, **run)
    assert calc_diff(y, jax.jit(reference.matmul)(x, w)) < BAR


def test_blockwise_kernel_of_a_transposed_weight_is_the_reference():
    dy, w = quantize_rows(normal(0, 136, 256)), quantize_blocks(normal(1, 144, 256).astype(jnp.float32))
    run = {"config": Config(128, stages=2), "num_sms": 2, "interpret": INTERPRET}
    dx = mosaic_gpu.matmul(dy.values, dy.scales, w.values, w.scales, dtype=jnp.float32, **run)
    assert calc_diff(dx, jax.jit(reference.matmul_transposed)(dy, w)) < 1e-9


@pytest.mark.parametrize(("rows", "cluster"), [(128, 1), (192, 1), (192, 2)])
def test_grouped_kernel_is_the_reference_on_tiles_that_have_rows(rows, cluster):
    tile_group = jnp.array([0, 2, 2, 3], jnp.int32)
    x, w = quantize_rows(normal(0, 512, 128)), quantize_blocks(normal(1, 3, 128, 136).astype(jnp.float32))
    y = mosaic_gpu.matmul(
        x.values,
        x.scales,
        w.transposed,
        w.transposed_scales,
        tile_group=tile_group,
        config=Config(rows, stages=2, cluster=cluster),
        num_sms=2 * cluster,
        interpret=INTERPRET,
    )
    assert calc_diff(y[:384], jax.jit(reference.grouped_matmul)(x, w, tile_group)[:384]) < BAR


@pytest.mark.parametrize(
    ("config", "tokens"),
    [(Config(128, stages=2), 512), (Config(192, stages=2), 640)],
    ids=["two-warpgroups", "three-warpgroups"],
)
def test_wgrad_kernel_is_the_reference(config, tokens):
    x, dy = quantize_columns(normal(0, tokens, 136)), quantize_columns(normal(1, tokens, 144))
    run = {"config": config, "num_sms": 2, "interpret": INTERPRET}
    dw = mosaic_gpu.wgrad(x.values, x.scales, dy.values, dy.scales, **run)
    expected = jax.jit(reference.wgrad)(x, dy)
    assert calc_diff(dw[0], expected) < 1e-9
    total = jnp.ones((3, 136, 144))
    dw = mosaic_gpu.wgrad(x.values, x.scales, dy.values, dy.scales, total=total, first=jnp.int32(1), **run)
    assert calc_diff(dw, jnp.ones_like(total).at[1].add(expected)) < 1e-9
    np.testing.assert_array_equal(dw[::2], 1)


def test_grouped_wgrad_kernel_is_the_reference_and_zero_without_tokens():
    x, dy = quantize_columns(normal(0, 512, 72)), quantize_columns(normal(1, 512, 136))
    bounds, tile_group = jnp.array([0, 1, 1, 3], jnp.int32), jnp.array([0, 2, 2, 3], jnp.int32)
    run = {"config": Config(128, stages=2), "num_sms": 2, "interpret": INTERPRET}
    dw = mosaic_gpu.wgrad(x.values, x.scales, dy.values, dy.scales, bounds, **run)
    expected = jax.jit(reference.grouped_wgrad, static_argnums=3)(x, dy, tile_group, 3)
    assert calc_diff(dw, expected) < 1e-9
    assert not np.asarray(dw[1]).any()
    # To the second of two layers.
    total = jnp.ones((6, 72, 136))
    dw = mosaic_gpu.wgrad(x.values, x.scales, dy.values, dy.scales, bounds, total=total, first=jnp.int32(3), **run)
    np.testing.assert_array_equal(dw[:3], 1)
    assert calc_diff(dw[3:], expected + 1) < 1e-9


@pytest.mark.parametrize("config", [Config(128, stages=2), Config(192, stages=2)], ids=["two", "three"])
def test_grouped_wgrad_kernel_sums_the_squares_of_what_it_stores(config):
    # Tiles reach beyond the last row and the last column.
    x, dy = quantize_columns(normal(0, 512, 200)), quantize_columns(normal(1, 512, 136))
    bounds = jnp.array([0, 1, 1, 3], jnp.int32)
    run = partial(mosaic_gpu.wgrad, config=config, num_sms=2, interpret=INTERPRET)
    operands = x.values, x.scales, dy.values, dy.scales, bounds
    dw, squares = jax.device_get(run(*operands, squares=True))
    np.testing.assert_array_equal(dw, run(*operands))
    np.testing.assert_allclose(squares, np.square(dw.astype(np.float64)).sum(axis=(1, 2)), rtol=1e-5)
    tile_group = jnp.array([0, 2, 2, 3], jnp.int32)
    by_reference = jax.jit(fp8_grouped_wgrad_with_squares, static_argnums=3)(x, dy, tile_group, 3)
    assert calc_diff(dw, by_reference[0]) < 1e-9
    np.testing.assert_allclose(squares, by_reference[1], rtol=1e-5)


def test_cuts_that_would_compute_wrong_numbers_are_refused():
    x, dy = quantize_columns(normal(0, 128, 72)), quantize_columns(normal(1, 128, 136))
    operands = x.values, x.scales, dy.values, dy.scales
    with pytest.raises(ValueError, match="squares are of what is stored"):
        mosaic_gpu.wgrad(*operands, config=Config(), total=jnp.ones((1, 72, 136)), squares=True)
    with pytest.raises(ValueError, match="cluster=2: products with a scale for each row of b must run with cluster=1"):
        mosaic_gpu.wgrad(*operands, config=Config(cluster=2))
    with pytest.raises(ValueError, match="cols=64: FP8 products are cut into tiles of 128 columns"):
        mosaic_gpu.wgrad(*operands, config=Config(cols=64))


def test_kernels_lower_for_every_linear_of_the_671b_model():
    f8, f32 = jnp.float8_e4m3fn, jnp.float32
    for n, k in SHAPES_671B.linears.values():
        shapes = [(4096, k), (-(-k // 128), 4096), (n, k), (-(-n // 128), -(-k // 128))]
        avals = [jax.ShapeDtypeStruct(shape, f8 if i % 2 == 0 else f32) for i, shape in enumerate(shapes)]
        config = config_for("matmul", 4096, n, k)
        run = jax.jit(lambda *operands, config=config: mosaic_gpu.matmul(*operands, config=config))
        run.trace(*avals).lower(lowering_platforms=("cuda",))


def test_weight_gradients_that_are_added_to_float32_lower():
    # The interpreter adds in another way.
    f8, f32, shape = jnp.float8_e4m3fn, jnp.float32, jax.ShapeDtypeStruct
    a, b, scales = shape((2048, 1664), f8), shape((512, 1664), f8), [shape((13, rows), f32) for rows in (2048, 512)]
    run = jax.jit(partial(mosaic_gpu.wgrad, config=Config()))
    for groups, bounds in ((1, None), (3, shape((4,), jnp.int32))):
        for layers, first in ((1, None), (4, shape((), jnp.int32))):
            total = shape((layers * groups, 2048, 512), f32)
            traced = run.trace(a, scales[0], b, scales[1], bounds, total=total, first=first)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert "cp.async.bulk.prefetch.tensor" in text
            assert "output_operand_alias" in text  # in place


def test_a_cut_that_was_not_tuned_leaves_few_multiprocessors_idle():
    # 55 tiles of 192 rows or 80 of 128: one round either way. 128 tiles of 192 are one round, 192 of 128 are two.
    assert config_for("wgrad", 2048, 640, 16384).rows == 128
    assert config_for("wgrad", 1536, 2000, 16384).rows == 192
    assert config_for("grouped_wgrad", 2048, 640, 1664, groups=64).rows == 192


@pytest.mark.parametrize(
    "problem",
    [
        ("matmul", 256, 136, 256, 1),
        ("grouped_matmul", 256, 136, 128, 2),
        ("wgrad", 72, 136, 256, 1),
        ("grouped_wgrad", 72, 136, 256, 2),
    ],
    ids=lambda problem: problem[0],
)
def test_what_is_tuned_and_timed_is_the_product_of_its_operands(problem):
    given, run = tune.operands(problem, 0), tune.product(problem[0], Config(128, stages=2))
    bench.check(problem, partial(run, num_sms=2, interpret=INTERPRET), given)
    with pytest.raises(RuntimeError, match="differs from the float32 product"):
        bench.check(problem, lambda **given: 1.01 * bench.expected(problem, given), given)


def test_every_product_of_the_tuned_models_has_its_cut():
    cuts = json.loads(resources.files("dsv3_jax.ops.fp8_matmul").joinpath("tiles.json").read_text())
    wanted = {tiles_key(*problem[:4]) for shapes in TUNED.values() for problem in tune.problems(shapes)}
    assert set(cuts) == wanted
    assert all(cut["cluster"] == 1 for key, cut in cuts.items() if "wgrad" in key)


def test_naming_an_implementation_that_cannot_run_says_why():
    x, w = quantize_rows(normal(0, 8, 128)), quantize_blocks(normal(1, 128, 128).astype(jnp.float32))
    with pytest.raises(NotImplementedError, match="FP8 products needs a Hopper GPU, the backend is cpu"):
        fp8_matmul(x, w, implementation="mosaic_gpu")
    odd = quantize_rows(normal(0, 9, 128))
    with pytest.raises(NotImplementedError, match="takes operands whose rows are a multiple of 8, not 9"):
        fp8_matmul(odd, w, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="implementation='cutlass': choose one of 'reference', 'mosaic_gpu', or None"):
        fp8_matmul(x, w, implementation="cutlass")


def test_tuning_times_the_two_fastest_again(monkeypatch):
    cuts = slow, lucky, best = Config(128), Config(192, band=4), Config(192, band=8)
    heats = iter([{slow: 3.0, lucky: 1.0, best: 1.1}, {lucky: 1.2, best: 1.1}])
    monkeypatch.setattr(tune, "candidates", lambda kind: list(cuts))
    monkeypatch.setattr(tune, "compile_all", lambda functions, _: functions)

    def timed(contenders, *_, **__):
        seconds = next(heats)
        assert seconds.keys() == contenders.keys()
        return seconds

    monkeypatch.setattr(tune, "interleaved_medians", timed)
    problem = ("matmul", 128, 128, 128, 1)
    assert list(tune.fastest([problem])) == [(problem, best)]
