"""A Hopper kernel for the SwiGLU between two FP8 products: backward, from the kept FP8 input."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from dsv3_jax.ops.hopper import MULTIPROCESSORS, lowered_once
from dsv3_jax.ops.quantize.formats import E4M3, TILE, SwiGLUBackward, Tiled
from dsv3_jax.ops.quantize.mosaic_gpu_pipeline import (
    HALF,
    LAYOUT,
    ROWS,
    for_each_tile,
    launch,
    output_staging,
    quantize_tile,
    staging,
    tiled_types,
    write,
)
from dsv3_jax.ops.quantize.mosaic_gpu_swiglu import APPROXIMATE, sigmoid

WARPGROUPS = 4
PIECE = 32
"""Columns that a warpgroup computes at once. Of more, intermediate results would not fit into 128 registers, and what
leaves them comes back from beyond the L1 cache, most of which is shared memory here."""


@lowered_once("blocks", "interpret")
def swiglu_quantize_backward(
    hidden: Tiled,
    d_out: BFloat16[Array, "rows ff"],
    weights: Float[Array, " rows"] | None,
    *,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> SwiGLUBackward:
    """All five results of the reference in one pass.

    A block takes a 128x128 tile of the gate, of the up half and of `d_out`. Each of its four warpgroups computes a
    quarter of the output, which replaces `d_out` in shared memory, and of the two gradients, all in BF16 and piece by
    piece. Then they share out the halves that there are to quantize:

        copy engine       |                          | fetch gate, up i+1 | fetch d_out i+1 | write the five results
        warpgroups 0, 1   | a quarter of the results | output columns     | d_gate rows     | d_gate columns
        warpgroups 2, 3   | a quarter                | d_up rows          | d_up columns    |
    """
    rows, ff = d_out.shape
    tiles = ff // TILE
    weighted = weights is not None
    partials_type = [jax.ShapeDtypeStruct((tiles, rows), jnp.float32)] if weighted else []

    def kernel(hidden_g, hidden_scales_g, d_out_g, *refs):
        weights_g, refs = (refs[0], refs[1:]) if weighted else (None, refs)
        d_rows, d_columns, out_columns, refs = refs[:2], refs[2:4], refs[4:6], refs[6:]
        partials_g, refs = (refs[0], refs[1:]) if weighted else (None, refs)
        hidden_s, hidden_scales_s, out_s, gradients_s, weights_s, partials_s, values_s, scales_s, *barriers = refs
        fetched, d_out_fetched, released, out_released, written, read = barriers
        buffers = values_s, scales_s
        warpgroup = lax.axis_index("wg")
        first, second = lax.div(warpgroup, jnp.int32(2)), lax.rem(warpgroup, jnp.int32(2))

        def fetch(slot, i, j):
            tile_rows = pl.ds(i * TILE, TILE)
            for half in range(2):
                tile = j + half * tiles
                columns = pl.ds(tile * TILE, TILE)
                plgpu.copy_gmem_to_smem(hidden_g.at[tile_rows, columns], hidden_s.at[half], fetched.at[slot])
                plgpu.copy_gmem_to_smem(hidden_scales_g.at[tile, tile_rows], hidden_scales_s.at[half], fetched.at[slot])
            if weighted:
                plgpu.copy_gmem_to_smem(weights_g.at[tile_rows], weights_s, fetched.at[slot])

        def fetch_d_out(slot, i, j):
            tile = d_out_g.at[pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)]
            plgpu.copy_gmem_to_smem(tile, out_s, d_out_fetched.at[slot])

        def work(slot, i, j, refill, refill_d_out):
            quarter = pl.ds(first * HALF, HALF), pl.ds(second * HALF, HALF)
            plgpu.barrier_wait(fetched.at[slot])
            scales = [plgpu.load(hidden_scales_s.at[half, quarter[0]], layout=ROWS) for half in range(2)]
            row_weights = plgpu.load(weights_s.at[quarter[0]], layout=ROWS) if weighted else None
            plgpu.barrier_wait(d_out_fetched.at[slot])
            plgpu.barrier_wait(read)
            d_weights = []
            for start in range(0, HALF, PIECE):
                piece = quarter[0], pl.ds(second * HALF + start, PIECE)
                inputs = [plgpu.load(hidden_s.at[half, *piece], layout=LAYOUT) for half in range(2)]
                if start + PIECE == HALF:
                    plgpu.barrier_arrive(released.at[slot])
                d_out = plgpu.load(out_s.at[piece], layout=LAYOUT)
                *results, of_piece = _backward(*inputs, *scales, d_out, row_weights)
                out_s[piece], gradients_s[0, *piece], gradients_s[1, *piece] = results
                d_weights.append(of_piece)
            if weighted:
                partials_s[second, quarter[0]] = sum(d_weights[1:], d_weights[0])
            plgpu.barrier_arrive(written)
            refill()
            plgpu.barrier_wait(written)

            half, start = pl.ds(second * HALF, HALF), second * HALF
            # Who has the output to quantize as well in this tile has not in the next.
            turn = lax.rem(lax.div(i * tiles + j, jnp.int32(blocks)), jnp.int32(2))
            gradient = lax.bitwise_xor(first, turn)

            @pl.when(gradient == 0)
            def _output():
                tile = plgpu.load(out_s.at[:, half].transpose((1, 0)), layout=LAYOUT)
                plgpu.barrier_arrive(out_released.at[slot])
                quantized = quantize_tile(tile)
                write(quantized, buffers, 1, out_columns, j * TILE + start, i, in_flight=0)

            if weighted:

                @pl.when(gradient == 1)
                def _weights():
                    both = [plgpu.load(partials_s.at[n, half], layout=ROWS) for n in range(2)]
                    partials_g[j, pl.ds(i * TILE + start, HALF)] = both[0] + both[1]

            refill_d_out()
            tile = plgpu.load(gradients_s.at[gradient, half], layout=LAYOUT)
            write(quantize_tile(tile), buffers, 0, d_rows, i * TILE + start, j + gradient * tiles)
            tile = plgpu.load(gradients_s.at[gradient, :, half].transpose((1, 0)), layout=LAYOUT)
            plgpu.barrier_arrive(read)
            quantized = quantize_tile(tile)
            write(quantized, buffers, 1, d_columns, gradient * ff + j * TILE + start, i)

        plgpu.barrier_arrive(read)
        for_each_tile((rows // TILE, tiles), [(fetch, released), (fetch_d_out, out_released)], work)
        plgpu.barrier_wait(read)

    scratch = [
        staging((2, TILE, TILE), E4M3, swizzle=32),
        plgpu.SMEM((2, TILE), jnp.float32),
        staging((TILE, TILE), d_out.dtype, swizzle=64),
        staging((2, TILE, TILE), d_out.dtype, swizzle=64),
        plgpu.SMEM((TILE,), jnp.float32),
        plgpu.SMEM((2, TILE), jnp.float32),
        *output_staging(buffers=2, warpgroups=WARPGROUPS),
        plgpu.Barrier(num_arrivals=4 + weighted, num_barriers=1),
        plgpu.Barrier(num_barriers=1),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=1),
        plgpu.Barrier(num_arrivals=2, num_barriers=1),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    ]
    outputs = launch(
        "swiglu_quantize_backward",
        kernel,
        [hidden.values, hidden.scales, d_out, *([weights] if weighted else [])],
        blocks=blocks,
        warpgroups=WARPGROUPS,
        interpret=interpret,
        out_type=[*tiled_types(rows, 2 * ff), *tiled_types(2 * ff, rows), *tiled_types(ff, rows), *partials_type],
        scratch_types=scratch,
        compiler_params=APPROXIMATE,
    )
    pairs = [Tiled(*outputs[n : n + 2]) for n in (0, 2, 4)]
    return SwiGLUBackward(*pairs, outputs[6].sum(axis=0) if weighted else None)


def _backward(
    gate: Array, up: Array, gate_scales: Array, up_scales: Array, d_out: Array, weights: Array | None
) -> tuple[Array, Array, Array, Array | None]:
    """Output, gradient of gate and of up, all in the type of `d_out`, and of the weights, of a piece in registers."""
    g, u = (
        values.astype(jnp.float32) * lax.broadcast_in_dim(scales, values.shape, [0])
        for values, scales in ((gate, gate_scales), (up, up_scales))
    )
    d, d_weights = d_out.astype(jnp.float32), None
    s = sigmoid(g)
    silu = g * s
    out = silu * u
    if weights is not None:
        d_weights = (d * out).sum(axis=1)
        row_weights = lax.broadcast_in_dim(weights, d.shape, [0])
        out, d = out * row_weights, d * row_weights
    results = out, d * u * (s + silu * (1 - s)), d * silu
    return *(x.astype(d_out.dtype) for x in results), d_weights
