"""The FP8 products' Hopper kernels on a GPU: the reference's numbers, and wgmmas that the compiler lets overlap."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.ops import fp8_matmul as products
from dsv3_jax.ops.fp8_matmul import mosaic_gpu
from dsv3_jax.ops.fp8_matmul.tiles import config_for
from dsv3_jax.ops.quantize import quantize_blocks, quantize_columns, quantize_rows

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

# In blocks of 128 columns: one turn of the four slots and less, more than one with and without a rest, many.
REDUCTIONS = [128, 512, 640, 768, 1024, 1280, 2112]
BAR = 1e-5
"""Of bf16 results, and more than is needed of float32 ones."""


def difference(x, y):
    """1 - 2<x, y> / (<x, x> + <y, y>)."""
    x, y = (np.asarray(v, np.float64) for v in (x, y))
    return 1 - 2 * np.vdot(x, y) / (np.vdot(x, x) + np.vdot(y, y))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def both(product, *operands):
    return [jax.jit(partial(product, implementation=name))(*operands) for name in ("mosaic_gpu", "reference")]


@pytest.mark.parametrize("k", REDUCTIONS)
def test_products_of_every_length(k):
    x, weight = quantize_rows(normal(0, 1000, k).astype(jnp.bfloat16)), quantize_blocks(normal(1, k, 576))
    assert difference(*both(products.fp8_matmul, x, weight)) < BAR
    dy, weight = quantize_rows(normal(2, 1000, k).astype(jnp.bfloat16)), quantize_blocks(normal(3, 576, k))
    assert difference(*both(products.fp8_matmul_transposed, dy, weight)) < BAR


@pytest.mark.parametrize("k", [k for k in REDUCTIONS if k % 128 == 0])
def test_grouped_products_of_every_length(k):
    tile_group = jnp.repeat(jnp.arange(5, dtype=jnp.int32), jnp.asarray([3, 0, 1, 7, 2]), total_repeat_length=13)
    x, weight = quantize_rows(normal(0, 13 * 128, k).astype(jnp.bfloat16)), quantize_blocks(normal(1, 4, k, 576))
    ours, theirs = both(products.fp8_grouped_matmul, x, weight, tile_group)
    assert difference(ours[: 11 * 128], theirs[: 11 * 128]) < BAR


@pytest.mark.parametrize("tokens", [k for k in REDUCTIONS if k % 128 == 0])
def test_weight_gradients_of_every_length(tokens):
    x, dy = (quantize_columns(normal(seed, tokens, 576).astype(jnp.bfloat16)) for seed in range(2))
    assert difference(*both(products.fp8_wgrad, x, dy)) < BAR


def test_grouped_weight_gradients_where_a_group_has_no_tokens():
    tile_group = jnp.repeat(jnp.arange(5, dtype=jnp.int32), jnp.asarray([3, 0, 1, 9, 2]), total_repeat_length=15)
    x, dy = (quantize_columns(normal(seed, 15 * 128, 576).astype(jnp.bfloat16)) for seed in range(2))
    ours, theirs = both(lambda *given, **how: products.fp8_grouped_wgrad(*given, groups=4, **how), x, dy, tile_group)
    assert difference(ours, theirs) < BAR
    assert not np.asarray(ours[1]).any()


def test_the_compiler_puts_no_products_in_sequence():
    """ptxas does where registers do not suffice (C7510 to C7514), and a kernel takes up to four times as long."""
    environment = os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, __file__, *map(str, REDUCTIONS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("Used ") >= 3 * len(REDUCTIONS) + 1, "ptxas did not report"
    assert [line for line in said.splitlines() if "serialized" in line] == []


def compile_kernels(reductions):
    """Dense, grouped and weight gradient products with reductions of these lengths, and a weight gradient of groups."""
    f8, f32, shape = jnp.float8_e4m3fn, jnp.float32, jax.ShapeDtypeStruct
    for k in reductions:
        blocks = -(-k // 128)
        a, a_scales = shape((8192, blocks * 128), f8), shape((blocks, 8192), f32)
        b, b_scales = shape((64, 2048, blocks * 128), f8), shape((64, 16, blocks), f32)
        groups = shape((64,), jnp.int32)
        config = config_for("grouped_matmul", 8192, 2048, k)
        run = jax.jit(lambda a, s, b, t, g, c=config: mosaic_gpu.matmul(a, s, b, t, tile_group=g, config=c))
        run.lower(a, a_scales, b, b_scales, groups).compile()
        config = config_for("matmul", 8192, 2048, k)
        run = jax.jit(lambda a, s, b, t, c=config: mosaic_gpu.matmul(a, s, b, t, config=c))
        run.lower(a, a_scales, shape(b.shape[1:], f8), shape(b_scales.shape[1:], f32)).compile()
        config = config_for("wgrad", 8192, 2048, k)
        run = jax.jit(lambda a, s, b, t, c=config: mosaic_gpu.wgrad(a, s, b, t, config=c))
        run.lower(a, a_scales, shape(b.shape[1:], f8), shape((blocks, 2048), f32)).compile()
    run = jax.jit(partial(mosaic_gpu.wgrad, config=config_for("wgrad", 2048, 1536, 1664, 64)))
    scales = [shape((832, rows), f32) for rows in (2048, 1536)]
    a, b = (shape((rows, 832 * 128), f8) for rows in (2048, 1536))
    run.lower(a, scales[0], b, scales[1], shape((65,), jnp.int32)).compile()


if __name__ == "__main__":
    compile_kernels(map(int, sys.argv[1:]))
