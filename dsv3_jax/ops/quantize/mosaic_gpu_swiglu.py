"""Hopper kernels for the SwiGLU between two FP8 products: forward, and backward from the kept FP8 input."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from dsv3_jax.ops.quantize.formats import E4M3, TILE, SwiGLUBackward, Tiled
from dsv3_jax.ops.quantize.mosaic_gpu_pipeline import (
    HALF,
    LAYOUT,
    MULTIPROCESSORS,
    ROWS,
    WARPGROUPS,
    for_each_tile,
    launch,
    output_staging,
    quantize_tile,
    staging,
    tiled_types,
    write,
)

BLOCKS = 2 * MULTIPROCESSORS
PARAMS = plgpu.CompilerParams(approx_math=True)


def swiglu_quantize(
    hidden: BFloat16[Array, "rows two_ff"],
    weights: Float[Array, " rows"] | None,
    *,
    blocks: int = BLOCKS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Tiled, Tiled]:
    """`hidden` in 1x128 tiles, and its weighted SwiGLU.

    A block takes a 128x128 tile of the gate half and that of the up half; each warpgroup, 64 rows of both:

        copy engine    |                                 | fetch i+1         | write gate, up, output i
        a warpgroup    | quantize gate i, quantize up i  | reread both, SwiGLU, quantize
    """
    rows, two_ff = hidden.shape
    gate_tiles = two_ff // 2 // TILE
    weighted = weights is not None

    def kernel(hidden_g, *refs):
        weights_g, refs = (refs[0], refs[1:]) if weighted else (None, refs)
        kept, output, (hidden_s, weights_s, values_s, scales_s, fetched, released) = refs[:2], refs[2:4], refs[4:]
        buffers = values_s, scales_s
        start = lax.axis_index("warpgroup") * HALF
        mine = pl.ds(start, HALF)

        def fetch(slot, i, j):
            tile_rows = pl.ds(i * TILE, TILE)
            for half in range(2):
                tile = hidden_g.at[tile_rows, pl.ds((j + half * gate_tiles) * TILE, TILE)]
                plgpu.copy_gmem_to_smem(tile, hidden_s.at[half], fetched.at[slot])
            if weighted:
                plgpu.copy_gmem_to_smem(weights_g.at[tile_rows], weights_s, fetched.at[slot])

        def work(slot, i, j, refill):
            plgpu.barrier_wait(fetched.at[slot])
            row = i * TILE + start
            for half in range(2):
                tile = plgpu.load(hidden_s.at[half, mine], layout=LAYOUT).astype(jnp.float32)
                write(quantize_tile(tile), buffers, half, kept, row, j + half * gate_tiles)
            gate, up = (plgpu.load(hidden_s.at[half, mine], layout=LAYOUT) for half in range(2))
            row_weights = plgpu.load(weights_s.at[mine], layout=ROWS) if weighted else None
            plgpu.barrier_arrive(released.at[slot])
            refill()
            gate = gate.astype(jnp.float32)
            out = gate * _sigmoid(gate) * up.astype(jnp.float32)
            if weighted:
                out = out * lax.broadcast_in_dim(row_weights, out.shape, [0])
            write(quantize_tile(out), buffers, 2, output, row, j)

        for_each_tile((pl.cdiv(rows, TILE), gate_tiles), [(fetch, released)], work)

    scratch = [
        staging((2, TILE, TILE), hidden.dtype),
        plgpu.SMEM((TILE,), jnp.float32),
        *output_staging(buffers=3),
        plgpu.Barrier(num_arrivals=2 + weighted, num_barriers=1),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=1),
    ]
    outputs = launch(
        kernel,
        [hidden, weights] if weighted else [hidden],
        blocks=blocks,
        interpret=interpret,
        out_type=tiled_types(rows, two_ff) + tiled_types(rows, two_ff // 2),
        scratch_types=scratch,
        compiler_params=PARAMS,
    )
    return Tiled(*outputs[:2]), Tiled(*outputs[2:])


def swiglu_quantize_backward(
    hidden: Tiled,
    d_out: BFloat16[Array, "rows ff"],
    weights: Float[Array, " rows"] | None,
    *,
    blocks: int = BLOCKS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> SwiGLUBackward:
    """All five results of the reference in one pass.

    A block takes a 128x128 tile of the gate, of the up half and of `d_out`. A warpgroup computes 64 rows of the three
    results, quantizes those rows, and hands each result to shared memory, where `d_out` was, as BF16: from there both
    warpgroups read 64 columns of it.

        copy engine  |                              | fetch gate, up i+1, write the five          | fetch d_out i+1
        a warpgroup  | rows of d_gate, d_up, output | d_gate | columns | d_up | columns | output | columns
    """
    rows, ff = d_out.shape
    tiles = ff // TILE
    weighted = weights is not None
    partials_type = [jax.ShapeDtypeStruct((tiles, rows), jnp.float32)] if weighted else []

    def kernel(hidden_g, hidden_scales_g, d_out_g, *refs):
        weights_g, refs = (refs[0], refs[1:]) if weighted else (None, refs)
        d_rows, d_columns, out_columns, refs = refs[:2], refs[2:4], refs[4:6], refs[6:]
        partials_g, refs = (refs[0], refs[1:]) if weighted else (None, refs)
        hidden_s, hidden_scales_s, d_out_s, weights_s, values_s, scales_s, *barriers = refs
        fetched, d_out_fetched, released, d_out_released, written, read = barriers
        buffers = values_s, scales_s
        start = lax.axis_index("warpgroup") * HALF
        mine = pl.ds(start, HALF)

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
            plgpu.copy_gmem_to_smem(tile, d_out_s, d_out_fetched.at[slot])

        def gate_up(half):
            scales = plgpu.load(hidden_scales_s.at[half, mine], layout=ROWS)
            values = plgpu.load(hidden_s.at[half, mine], layout=LAYOUT).astype(jnp.float32)
            return values * lax.broadcast_in_dim(scales, values.shape, [0])

        def work(slot, i, j, refill, refill_d_out):
            row, column = i * TILE + start, j * TILE + start
            plgpu.barrier_wait(fetched.at[slot])
            row_weights = plgpu.load(weights_s.at[mine], layout=ROWS) if weighted else None
            gate, up = gate_up(0), gate_up(1)
            plgpu.barrier_wait(d_out_fetched.at[slot])
            d_out = plgpu.load(d_out_s.at[mine], layout=LAYOUT).astype(jnp.float32)
            plgpu.barrier_arrive(released.at[slot])
            refill()
            sigmoid = _sigmoid(gate)
            silu = gate * sigmoid
            out = silu * up
            if weighted:
                partials_g[j, pl.ds(row, HALF)] = (d_out * out).sum(axis=1)
                row_weights = lax.broadcast_in_dim(row_weights, out.shape, [0])
                out, d_out = out * row_weights, d_out * row_weights
            d_gate = d_out * up * (sigmoid + silu * (1 - sigmoid))
            results = [r.astype(d_out_g.dtype) for r in (d_gate, d_out * silu, out)]
            for half in range(2):
                quantized = quantize_tile(results[half].astype(jnp.float32))
                write(quantized, buffers, half, d_rows, row, j + half * tiles)
            for n, result in enumerate(results):
                if n > 0:
                    plgpu.barrier_wait(read)
                d_out_s[mine] = result
                plgpu.barrier_arrive(written)
                plgpu.barrier_wait(written)
                columns = plgpu.load(d_out_s.at[:, mine].transpose((1, 0)), layout=LAYOUT).astype(jnp.float32)
                plgpu.barrier_arrive(read if n < 2 else d_out_released.at[slot])
                destination, tile_row = (d_columns, column + n * ff) if n < 2 else (out_columns, column)
                write(quantize_tile(columns), buffers, n % 2, destination, tile_row, i)
            refill_d_out()

        streams = (fetch, released), (fetch_d_out, d_out_released)
        for_each_tile((pl.cdiv(rows, TILE), tiles), streams, work)

    scratch = [
        staging((2, TILE, TILE), E4M3),
        plgpu.SMEM((2, TILE), jnp.float32),
        staging((TILE, TILE), d_out.dtype),
        plgpu.SMEM((TILE,), jnp.float32),
        *output_staging(buffers=2),
        plgpu.Barrier(num_arrivals=4 + weighted, num_barriers=1),
        plgpu.Barrier(num_barriers=1),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=1),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=1),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    ]
    outputs = launch(
        kernel,
        [hidden.values, hidden.scales, d_out, *([weights] if weighted else [])],
        blocks=blocks,
        interpret=interpret,
        out_type=[*tiled_types(rows, 2 * ff), *tiled_types(2 * ff, rows), *tiled_types(ff, rows), *partials_type],
        scratch_types=scratch,
        compiler_params=PARAMS,
    )
    pairs = [Tiled(*outputs[n : n + 2]) for n in (0, 2, 4)]
    return SwiGLUBackward(*pairs, outputs[6].sum(axis=0) if weighted else None)


def _sigmoid(x: Float[Array, "rows 128"]) -> Float[Array, "rows 128"]:
    """Without a division, which costs more than the rest: a reciprocal is the square of a reciprocal square root."""
    root = lax.rsqrt(1 + jnp.exp(-x))
    return root * root
