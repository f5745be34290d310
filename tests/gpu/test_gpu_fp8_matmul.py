"""The FP8 products' Hopper kernels on a GPU: the reference's numbers, and wgmmas that the compiler lets overlap."""

import os
import re
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products_numpy import calc_diff, numpy_blocks, numpy_rows

from dsv3_jax.ops import fp8_matmul as products
from dsv3_jax.ops.fp8_matmul import mosaic_gpu
from dsv3_jax.ops.hopper import Config
from dsv3_jax.ops.quantize import quantize_blocks, quantize_columns, quantize_rows

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

# In blocks of 128 columns: one turn of the four slots and less, more than one with and without a rest, many.
REDUCTIONS = [128, 512, 640, 768, 1024, 1408, 2112]
BAR = 1e-5
"""Of bf16 results, and more than is needed of float32 ones."""
SPILLED = 64
"""Bytes a thread: of a tile, not of each step."""


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def kernel(product):
    return jax.jit(partial(product, implementation="mosaic_gpu"))


@pytest.mark.parametrize("k", REDUCTIONS)
def test_products_of_every_length(k):
    x, weight = quantize_rows(normal(0, 1000, k).astype(jnp.bfloat16)), quantize_blocks(normal(1, k, 576))
    y = kernel(products.fp8_matmul)(x, weight)
    assert calc_diff(y, numpy_rows(x) @ numpy_blocks(weight)) < BAR
    dy, weight = quantize_rows(normal(2, 1000, k).astype(jnp.bfloat16)), quantize_blocks(normal(3, 576, k))
    dx = kernel(products.fp8_matmul_transposed)(dy, weight)
    assert calc_diff(dx, numpy_rows(dy) @ numpy_blocks(weight).T) < BAR


@pytest.mark.parametrize("k", REDUCTIONS)
def test_grouped_products_of_every_length(k):
    tile_group = jnp.repeat(jnp.arange(5, dtype=jnp.int32), jnp.asarray([3, 0, 1, 7, 2]), total_repeat_length=13)
    x, weight = quantize_rows(normal(0, 13 * 128, k).astype(jnp.bfloat16)), quantize_blocks(normal(1, 4, k, 576))
    y = kernel(products.fp8_grouped_matmul)(x, weight, tile_group)
    rows, wide = numpy_rows(x).reshape(13, 128, k), numpy_blocks(weight)
    expected = np.concatenate(
        [tile @ wide[group] for tile, group in zip(rows[:11], [0] * 3 + [2] + [3] * 7, strict=True)]
    )
    assert calc_diff(y[: 11 * 128], expected) < BAR


@pytest.mark.parametrize("tokens", [k for k in REDUCTIONS if k % 128 == 0])
def test_weight_gradients_of_every_length(tokens):
    x, dy = (quantize_columns(normal(seed, tokens, 576).astype(jnp.bfloat16)) for seed in range(2))
    expected, before = numpy_rows(x) @ numpy_rows(dy).T, 30 * normal(2, 576, 576)
    assert calc_diff(kernel(products.fp8_wgrad)(x, dy), expected) < BAR
    assert calc_diff(kernel(products.fp8_wgrad)(x, dy, before) - before, expected) < BAR


@pytest.mark.parametrize("grouped", [False, True], ids=["dense", "grouped"])
def test_clusters_change_no_bit(grouped):
    """A slot that is given back too early shows in some of many runs."""
    tile_group = jnp.repeat(jnp.arange(4, dtype=jnp.int32), 16) if grouped else None
    x, weight = quantize_rows(normal(0, 64 * 128, 2048).astype(jnp.bfloat16)), normal(1, 4, 2048, 4096)
    weight = quantize_blocks(weight if grouped else weight[0])
    operands = x.values, x.scales, weight.transposed, weight.transposed_scales
    one, two = (
        jax.jit(partial(mosaic_gpu.matmul, tile_group=tile_group, config=Config(192, cluster=c))) for c in (1, 2)
    )
    expected = one(*operands)
    assert not any(bool(jnp.any(two(*operands) != expected)) for _ in range(200))


def test_grouped_weight_gradients_where_a_group_has_no_tokens():
    tile_group = jnp.repeat(jnp.arange(5, dtype=jnp.int32), jnp.asarray([3, 0, 1, 9, 2]), total_repeat_length=15)
    x, dy = (quantize_columns(normal(seed, 15 * 128, 576).astype(jnp.bfloat16)) for seed in range(2))
    run, before = kernel(partial(products.fp8_grouped_wgrad, groups=4)), 30 * normal(2, 4, 576, 576)
    stored, added = run(x, dy, tile_group), run(x, dy, tile_group, total=before) - before
    layers = jnp.stack([before, -before])
    second = run(x, dy, tile_group, total=layers, layer=jnp.int32(1))
    np.testing.assert_array_equal(second[0], before)
    wide_x, wide_dy = numpy_rows(x), numpy_rows(dy)
    bounds = [0, 3 * 128, 3 * 128, 4 * 128, 13 * 128]
    expected = [wide_x[:, a:b] @ wide_dy[:, a:b].T for a, b in pairwise(bounds)]
    assert calc_diff(stored, expected) < BAR
    assert calc_diff(added, expected) < BAR
    assert calc_diff(second[1] + before, expected) < BAR
    assert not np.asarray(stored[1]).any()
    again, squares = kernel(partial(products.fp8_grouped_wgrad_with_squares, groups=4))(x, dy, tile_group)
    np.testing.assert_array_equal(again, stored)
    np.testing.assert_allclose(squares, np.square(np.asarray(stored, np.float64)).sum(axis=(1, 2)), rtol=1e-5)


def test_registers_suffice():
    """Where they do not, ptxas puts products in sequence (C7510 to C7514) or spills: up to four times the time."""
    # The process finds the package where this one does, installed or not.
    wanted = {"MOSAIC_GPU_DUMP_PTXAS": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment = os.environ | wanted | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, Path(__file__).with_name("compile_fp8_products.py"), *map(str, REDUCTIONS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("Used ") >= 3 * len(REDUCTIONS) + 4, "ptxas did not report"
    assert [line for line in said.splitlines() if "serialized" in line] == []
    assert max(map(int, re.findall(r"(\d+) bytes spill stores", said))) <= SPILLED
