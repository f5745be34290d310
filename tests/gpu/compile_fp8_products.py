"""Compiles the FP8 products' Hopper kernels for reductions of the lengths that are given.

In a process of its own, whose environment makes ptxas report.
"""

import sys

import jax
import jax.numpy as jnp

from dsv3_jax.ops.fp8_matmul import mosaic_gpu
from dsv3_jax.ops.fp8_matmul.tiles import config_for


def compile_kernels(reductions):
    """Dense, grouped and weight gradient products with reductions of these lengths, and a weight gradient of groups,
    stored, with its squares, and added."""
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
    config = config_for("grouped_wgrad", 2048, 1536, 1664, 64)
    scales = [shape((832, rows), f32) for rows in (2048, 1536)]
    a, b = (shape((rows, 832 * 128), f8) for rows in (2048, 1536))
    operands = a, scales[0], b, scales[1], shape((65,), jnp.int32)
    for squares in (False, True):
        run = jax.jit(lambda *x, s=squares: mosaic_gpu.wgrad(*x, config=config, squares=s))
        run.lower(*operands).compile()
    run = jax.jit(lambda total, first, *x: mosaic_gpu.wgrad(*x, total=total, first=first, config=config))
    run.lower(shape((64, 2048, 1536), f32), None, *operands).compile()
    run.lower(shape((128, 2048, 1536), f32), shape((), jnp.int32), *operands).compile()


if __name__ == "__main__":
    compile_kernels(map(int, sys.argv[1:]))
