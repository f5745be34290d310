"""Hopper kernels from BF16 to FP8 tiles along either axis or both, and from FP8 tiles of one axis to the other."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16

from dsv3_jax.ops.hopper import MULTIPROCESSORS, lowered_once
from dsv3_jax.ops.quantize.formats import E4M3, TILE, Tiled
from dsv3_jax.ops.quantize.mosaic_gpu_pipeline import (
    COLUMNS,
    HALF,
    LAYOUT,
    WARPGROUPS,
    for_each_tile,
    launch,
    output_staging,
    quantize_tile,
    round_tile_to_e5m6,
    staging,
    tiled,
    tiled_types,
    write,
)


@lowered_once("along_rows", "along_columns", "power_of_2", "through_e5m6", "blocks", "interpret")
def quantize(
    x: BFloat16[Array, "rows k"],
    *,
    along_rows: bool = True,
    along_columns: bool = True,
    power_of_2: bool = False,
    through_e5m6: bool = False,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Tiled, ...]:
    """Tiles along the rows of x, of its transpose along its columns, or both, from one reading.

    A block takes 128x128 of x at a time. Of each, a warpgroup quantizes 64 rows, then 64 columns, which it reads from
    shared memory through transposing loads, so that a column's largest value is found as a row's is:

        copy engine    | fetch i+1             | write rows i, columns i
        warpgroup 0    | rows 0:64 of tile i   | columns 0:64   | refill the slot
        warpgroup 1    | rows 64:128           | columns 64:128 |

    The last tile of a row may be a half: the copy engine reads zeros there, and drops what is written. `through_e5m6`
    rounds x before that: the warpgroups put their rows back into the slot, and wait for one another.
    """
    rows, k = x.shape
    types = (tiled_types(rows, k) if along_rows else ()) + (tiled_types(k, rows) if along_columns else ())
    both = along_rows and along_columns

    def kernel(x_g, *refs):
        *outputs, x_s, values_s, scales_s, fetched, released, rounded = refs
        buffers = values_s, scales_s
        start = lax.axis_index("wg") * HALF

        def fetch(slot, i, j):
            tile = x_g.at[pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)]
            plgpu.copy_gmem_to_smem(tile, x_s.at[slot], fetched.at[slot])

        def work(slot, i, j, refill):
            plgpu.barrier_wait(fetched.at[slot])
            if through_e5m6:
                mine = x_s.at[slot, pl.ds(start, HALF)]
                mine[...] = round_tile_to_e5m6(plgpu.load(mine, layout=LAYOUT))
                plgpu.commit_smem()
                plgpu.barrier_arrive(rounded)
                plgpu.barrier_wait(rounded)
            if along_rows:
                tile = plgpu.load(x_s.at[slot, pl.ds(start, HALF)], layout=LAYOUT)
                if not along_columns:
                    plgpu.barrier_arrive(released.at[slot])
                quantized = quantize_tile(tile, power_of_2)
                write(quantized, buffers, 0 if both else slot, outputs[:2], i * TILE + start, j)
            if along_columns:
                transposed = x_s.at[slot, :, pl.ds(start, HALF)].transpose((1, 0))
                tile = plgpu.load(transposed, layout=LAYOUT)
                plgpu.barrier_arrive(released.at[slot])
                quantized = quantize_tile(tile, power_of_2)
                write(quantized, buffers, 1 if both else slot, outputs[-2:], j * TILE + start, i)
            refill()

        for_each_tile((pl.cdiv(rows, TILE), pl.cdiv(k, TILE)), [(fetch, released)], work)

    scratch = [
        staging((2, TILE, TILE), x.dtype),
        *output_staging(buffers=2, width=k if along_rows else TILE),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=2),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    ]
    options = {"blocks": blocks, "interpret": interpret, "out_type": types, "scratch_types": scratch}
    outputs = launch("quantize", kernel, [x], **options)
    return tuple(tiled(*pair) for pair in zip(outputs[::2], outputs[1::2], strict=True))


@lowered_once("blocks", "interpret")
def retile(x: Tiled, *, blocks: int = MULTIPROCESSORS, interpret: plgpu.InterpretGPUParams | None = None) -> Tiled:
    """From tiles along the features to tiles along the rows, transposed.

    Hopper has no transposing load of bytes, so a warpgroup widens the values of its 64 features to float16, which holds
    them exactly, and reads them back from shared memory transposed:

        copy engine    | fetch i+2                    | write columns i
        a warpgroup    | 64 features of i, as float16 | transposed, times the rows' scales, quantized
    """
    rows, k = x.values.shape

    def kernel(x_g, x_scales_g, values_g, scales_g, x_s, x_scales_s, wide_s, values_s, scales_s, fetched, released):
        warpgroup = lax.axis_index("wg")
        start = warpgroup * HALF

        def fetch(slot, i, j):
            tile_rows = pl.ds(i * TILE, TILE)
            plgpu.copy_gmem_to_smem(x_g.at[tile_rows, pl.ds(j * TILE, TILE)], x_s.at[slot], fetched.at[slot])
            plgpu.copy_gmem_to_smem(x_scales_g.at[j, tile_rows], x_scales_s.at[slot], fetched.at[slot])

        def work(slot, i, j, refill):
            plgpu.barrier_wait(fetched.at[slot])
            row_scales = plgpu.load(x_scales_s.at[slot], layout=COLUMNS)
            values = plgpu.load(x_s.at[slot, :, pl.ds(start, HALF)], layout=plgpu.Layout.WGMMA_8BIT)
            plgpu.barrier_arrive(released.at[slot])
            wide_s[warpgroup] = values.astype(jnp.float16)
            refill()
            tile = plgpu.load(wide_s.at[warpgroup].transpose((1, 0)), layout=LAYOUT).astype(jnp.float32)
            tile = tile * lax.broadcast_in_dim(row_scales, tile.shape, [1])
            write(quantize_tile(tile), (values_s, scales_s), slot, (values_g, scales_g), j * TILE + start, i)

        for_each_tile((rows // TILE, k // TILE), [(fetch, released)], work)

    scratch = [
        staging((2, TILE, TILE), E4M3, swizzle=HALF),
        plgpu.SMEM((2, TILE), jnp.float32),
        staging((WARPGROUPS, TILE, HALF), jnp.float16),
        *output_staging(buffers=2),
        plgpu.Barrier(num_arrivals=2, num_barriers=2),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=2),
    ]
    inputs = [x.values, x.scales]
    types = tiled_types(k, rows)
    options = {"blocks": blocks, "interpret": interpret, "out_type": types, "scratch_types": scratch}
    return tiled(*launch("retile", kernel, inputs, **options))
