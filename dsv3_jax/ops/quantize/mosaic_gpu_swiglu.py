"""A Hopper kernel for the SwiGLU between two FP8 products: forward."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from dsv3_jax.ops.hopper import MULTIPROCESSORS, lowered_once
from dsv3_jax.ops.quantize.formats import TILE, Tiled
from dsv3_jax.ops.quantize.mosaic_gpu_pipeline import (
    HALF,
    LAYOUT,
    ROWS,
    WARPGROUPS,
    for_each_tile,
    launch,
    output_staging,
    quantize_tile,
    staging,
    tiled,
    tiled_types,
    write,
)

APPROXIMATE = plgpu.CompilerParams(approx_math=True)


@lowered_once("blocks", "interpret")
def swiglu_quantize(
    hidden: BFloat16[Array, "rows two_ff"],
    weights: Float[Array, " rows"] | None,
    *,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Tiled, Tiled]:
    """`hidden` in 1x128 tiles, and its weighted SwiGLU.

    A block takes a 128x128 tile of the gate half and that of the up half; each warpgroup, 64 rows of both:

        copy engine    | fetch i+1                       | write gate, up, output i      | fetch i+2
        a warpgroup    | quantize gate i, quantize up i  | reread both, SwiGLU, quantize |
    """
    rows, two_ff = hidden.shape
    gate_tiles = two_ff // 2 // TILE
    weighted = weights is not None

    def kernel(hidden_g, *refs):
        weights_g, refs = (refs[0], refs[1:]) if weighted else (None, refs)
        kept, output, (hidden_s, weights_s, values_s, scales_s, fetched, released) = refs[:2], refs[2:4], refs[4:]
        buffers = values_s, scales_s
        start = lax.axis_index("wg") * HALF
        mine = pl.ds(start, HALF)

        def fetch(slot, i, j):
            tile_rows = pl.ds(i * TILE, TILE)
            for half in range(2):
                tile = hidden_g.at[tile_rows, pl.ds((j + half * gate_tiles) * TILE, TILE)]
                plgpu.copy_gmem_to_smem(tile, hidden_s.at[slot, half], fetched.at[slot])
            if weighted:
                plgpu.copy_gmem_to_smem(weights_g.at[tile_rows], weights_s.at[slot], fetched.at[slot])

        def work(slot, i, j, refill):
            plgpu.barrier_wait(fetched.at[slot])
            row = i * TILE + start
            for half in range(2):
                tile = plgpu.load(hidden_s.at[slot, half, mine], layout=LAYOUT)
                write(quantize_tile(tile), buffers, half, kept, row, j + half * gate_tiles)
            gate, up = (plgpu.load(hidden_s.at[slot, half, mine], layout=LAYOUT) for half in range(2))
            row_weights = plgpu.load(weights_s.at[slot, mine], layout=ROWS) if weighted else None
            plgpu.barrier_arrive(released.at[slot])
            refill()
            gate = gate.astype(jnp.float32)
            out = gate * sigmoid(gate) * up.astype(jnp.float32)
            if weighted:
                out = out * lax.broadcast_in_dim(row_weights, out.shape, [0])
            write(quantize_tile(out), buffers, 2, output, row, j)

        for_each_tile((pl.cdiv(rows, TILE), gate_tiles), [(fetch, released)], work)

    scratch = [
        staging((2, 2, TILE, TILE), hidden.dtype),
        plgpu.SMEM((2, TILE), jnp.float32),
        *output_staging(buffers=3),
        plgpu.Barrier(num_arrivals=2 + weighted, num_barriers=2),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=2),
    ]
    outputs = launch(
        "swiglu_quantize",
        kernel,
        [hidden, jnp.pad(weights, (0, -rows % TILE))] if weighted else [hidden],
        blocks=blocks,
        interpret=interpret,
        out_type=tiled_types(rows, two_ff) + tiled_types(rows, two_ff // 2),
        scratch_types=scratch,
        compiler_params=APPROXIMATE,
    )
    return tiled(*outputs[:2]), tiled(*outputs[2:])


def sigmoid(x: Float[Array, "rows 128"]) -> Float[Array, "rows 128"]:
    """Without a division, which costs more than the rest: a reciprocal is the square of a reciprocal square root."""
    root = lax.rsqrt(1 + jnp.exp(-x))
    return root * root
