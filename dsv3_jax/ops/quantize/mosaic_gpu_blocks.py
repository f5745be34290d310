"""A Hopper kernel from weights to FP8 in 128x128 blocks, in both layouts."""

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv3_jax.ops.hopper import MULTIPROCESSORS, lowered_once
from dsv3_jax.ops.quantize.formats import E4M3, TILE, Blocked, blocked
from dsv3_jax.ops.quantize.mosaic_gpu_pipeline import (
    COLUMNS,
    HALF,
    LAYOUT,
    WARPGROUPS,
    for_each_tile,
    launch,
    output_staging,
    scale_and_inverse,
    staging,
    write_values,
)

BLOCKS = 2 * MULTIPROCESSORS
PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)  # infers no layout for SINGLE otherwise

SINGLE = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))), warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1
)
"""LAYOUT with registers of one element, as float32 must be read through a transposing view."""


@lowered_once("blocks", "interpret")
def quantize_blocks(
    weight: Float[Array, "*groups k n"],
    *,
    blocks: int = BLOCKS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Blocked:
    """128x128 blocks and their transposes, from one reading of a float32 or BF16 weight.

    The two warpgroups of a block find the largest value of 64 rows each and exchange it:

        copy engine    |                         |                           | fetch i+1          | write both
        a warpgroup    | 64 rows, largest values | exchange, quantize rows i | reread transposed, quantize
    """
    *groups, k, n = weight.shape
    rows, k_blocks, n_blocks = math.prod(groups) * k, k // TILE, pl.cdiv(n, TILE)

    def kernel(x_g, values_g, transposed_g, scales_g, x_s, largest_s, values_s, fetched, released, exchanged):
        start = lax.axis_index("wg") * HALF
        mine = pl.ds(start, HALF)

        def fetch(slot, i, j):
            tile = x_g.at[pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)]
            plgpu.copy_gmem_to_smem(tile, x_s.at[slot], fetched.at[slot])

        def load_transposed(slot):
            view = x_s.at[slot, :, mine].transpose((1, 0))
            if weight.dtype != jnp.float32:
                return plgpu.load(view, layout=LAYOUT).astype(jnp.float32)
            return plgpu.layout_cast(plgpu.load(view, layout=SINGLE), LAYOUT)

        def work(slot, i, j, refill):
            plgpu.barrier_wait(fetched.at[slot])
            tile = plgpu.load(x_s.at[slot, mine], layout=LAYOUT).astype(jnp.float32)
            largest_s[mine] = jnp.abs(tile).max(axis=1)
            plgpu.barrier_arrive(exchanged)
            plgpu.barrier_wait(exchanged)
            scale, inverse = scale_and_inverse(plgpu.load(largest_s, layout=COLUMNS).max())

            @pl.when(start == 0)
            def _():
                scales_g[i, j] = scale

            group, block = lax.div(i, jnp.int32(k_blocks)), lax.rem(i, jnp.int32(k_blocks))
            write_values((tile * inverse).astype(E4M3), values_s, 0, values_g, i * TILE + start, j)
            tile = load_transposed(slot)
            plgpu.barrier_arrive(released.at[slot])
            refill()
            write_values((tile * inverse).astype(E4M3), values_s, 1, transposed_g.at[group], j * TILE + start, block)

        for_each_tile((rows // TILE, n_blocks), [(fetch, released)], work)

    values, transposed, scales = launch(
        "quantize_blocks",
        kernel,
        [weight.reshape(rows, n)],
        blocks=blocks,
        interpret=interpret,
        compiler_params=PARAMS,
        out_type=[
            jax.ShapeDtypeStruct((rows, n), E4M3),
            jax.ShapeDtypeStruct((rows // k, n, k), E4M3),
            jax.ShapeDtypeStruct((rows // TILE, n_blocks), jnp.float32),
        ],
        scratch_types=[
            staging((1, TILE, TILE), weight.dtype),
            plgpu.SMEM((TILE,), jnp.float32),
            output_staging(buffers=2, width=n)[0],
            plgpu.Barrier(num_barriers=1),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=1),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
    )
    return blocked(
        values.reshape(*groups, k, n),
        transposed.reshape(*groups, n, k),
        scales.reshape(*groups, k_blocks, n_blocks),
    )
