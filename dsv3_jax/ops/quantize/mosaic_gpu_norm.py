"""A Hopper kernel for RMSNorm that also writes its result in FP8, so that the next product need not read it again."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from dsv3_jax.ops.hopper import MULTIPROCESSORS, lowered_once
from dsv3_jax.ops.quantize.formats import E4M3, TILE, Tiled
from dsv3_jax.ops.quantize.mosaic_gpu_pipeline import launch, quantize_tile

ROWS = 4
"""Of a warpgroup, one for each warp."""
SHARED_MEMORY = 224 * 1024
"""Bytes of a multiprocessor, less what the compiler takes."""


def warpgroups(d: int) -> int:
    """How many of a block, at most 3, fit with the rows they hold; 0 if none does."""
    return max((n for n in (1, 2, 3) if _shared_bytes(d, n) <= SHARED_MEMORY), default=0)


def _shared_bytes(d: int, warpgroups: int) -> int:
    """BF16 rows and two FP8 chunks of each warpgroup, and the gain."""
    return warpgroups * ROWS * (2 * d + 2 * _chunk(d) * TILE) + 4 * d


def _chunk(d: int) -> int:
    # Registers of eight tiles were read in the wrong order on an H200, and rightly in the interpreter.
    return max(n for n in (2, 4) if d // TILE % n == 0)


@lowered_once("eps", "power_of_2", "keep", "blocks", "interpret")
def rms_norm_quantize(
    x: BFloat16[Array, "rows d"],
    gain: Float[Array, " d"],
    eps: float,
    power_of_2: bool = False,
    keep: bool = True,
    *,
    blocks: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[BFloat16[Array, "rows d"] | None, Tiled]:
    """The rows over their root mean square, times the gain, in BF16 where they are to `keep`, and in 1x128 tiles.

    Each warpgroup has four whole rows in shared memory at a time, one per warp, and its own fetches. It normalizes them
    in place, some tiles after the other, and writes while it goes on. While it waits for rows, the other warpgroups of
    the multiprocessor compute:

        copy engine    | fetch rows |                | write chunk 0 | write chunk 1 |
        a warpgroup    |            | sum of squares | chunk 0: normalize, quantize | chunk 1 | ...
    """
    rows, d = x.shape
    tiles, chunk = d // TILE, _chunk(d)
    chunks = tiles // chunk
    layout = _row_of_tiles(chunk)
    if blocks is None:
        blocks = MULTIPROCESSORS * min(4, SHARED_MEMORY // _shared_bytes(d, warpgroups(d)))

    def kernel(x_g, gain_g, *refs):
        *normed_g, values_g, scales_g, x_s, gain_s, values_s, fetched, gain_fetched = refs
        warpgroup = lax.axis_index("wg")
        x_s, values_s, fetched = x_s.at[warpgroup], values_s.at[warpgroup], fetched.at[warpgroup]
        pl.when(warpgroup == 0)(lambda: plgpu.copy_gmem_to_smem(gain_g, gain_s, gain_fetched))
        plgpu.barrier_wait(gain_fetched)

        def tiles_of(n):
            return pl.ds(n * chunk, chunk)

        def load(n):
            return plgpu.load(_tiles_first(x_s.at[n]), layout=layout, optimized=False).astype(jnp.float32)

        @plgpu.nd_loop((rows // ROWS,), collective_axes=("block", "wg"))
        def _rows(info):
            mine = pl.ds(info.index[0] * ROWS, ROWS)
            for n in range(chunks):
                plgpu.copy_gmem_to_smem(x_g.at[mine, tiles_of(n)], x_s.at[n], fetched)
            plgpu.barrier_wait(fetched)

            def add_squares(n, total):
                part = load(n)
                return total + part * part

            zeros = plgpu.layout_cast(jnp.zeros((chunk, ROWS, TILE), jnp.float32), layout)
            squares = lax.fori_loop(0, chunks, add_squares, zeros)
            root = lax.rsqrt(squares.sum(axis=2).sum(axis=0) / d + eps)

            @pl.loop(0, chunks)
            def _chunk_of_tiles(n):
                part = load(n)
                part = part * lax.broadcast_in_dim(root, part.shape, [1])
                chunk_gain = plgpu.load(gain_s.at[tiles_of(n)], layout=layout.reduce(1), optimized=False)
                part = (part * lax.broadcast_in_dim(chunk_gain, part.shape, [0, 2])).astype(x.dtype)
                values, scales = quantize_tile(part.astype(jnp.float32), power_of_2)
                scales_g[tiles_of(n), mine] = scales
                buffer = values_s.at[lax.rem(n, jnp.int32(2))]
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                if keep:
                    _tiles_first(x_s.at[n])[...] = part
                _tiles_first(buffer)[...] = values
                plgpu.commit_smem()
                if keep:
                    plgpu.copy_smem_to_gmem(x_s.at[n], normed_g[0].at[mine, tiles_of(n)], commit_group=False)
                plgpu.copy_smem_to_gmem(buffer, values_g.at[mine, tiles_of(n)])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        plgpu.wait_smem_to_gmem(0)

    cube = (rows, tiles, TILE)
    *normed, values, scales = launch(
        "rms_norm_quantize",
        kernel,
        [x.reshape(cube), gain.astype(jnp.float32).reshape(tiles, TILE)],
        blocks=blocks,
        warpgroups=warpgroups(d),
        interpret=interpret,
        out_type=[
            *([jax.ShapeDtypeStruct(cube, x.dtype)] if keep else []),
            jax.ShapeDtypeStruct(cube, E4M3),
            jax.ShapeDtypeStruct((tiles, rows), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((warpgroups(d), chunks, ROWS, chunk, TILE), x.dtype),
            plgpu.SMEM((tiles, TILE), jnp.float32),
            plgpu.SMEM((warpgroups(d), 2, ROWS, chunk, TILE), E4M3),
            plgpu.Barrier(num_arrivals=chunks, num_barriers=warpgroups(d)),
            plgpu.Barrier(),
        ],
    )
    return normed[0].reshape(rows, d) if keep else None, Tiled(values.reshape(rows, d), scales)


def _tiles_first(ref: jax.Ref) -> jax.Ref:
    """[rows, tiles, 128] as [tiles, rows, 128], the order of the scales."""
    return ref.transpose((1, 0, 2))


def _row_of_tiles(tiles: int) -> plgpu.Layout:
    """Registers for [tiles, 4 rows, 128], 2 or 4 tiles: a warp has a row of them, and a lane eight neighbours of it,
    two times where there are four tiles."""
    base = (tiles, ROWS, TILE)
    if tiles == 2:
        return plgpu.Layout.TILED(plgpu.Tiling((base, (8,))), warp_dims=(-3,), lane_dims=(-4, -2), vector_dim=-1)
    return plgpu.Layout.TILED(plgpu.Tiling((base, (64,), (8,))), warp_dims=(-4,), lane_dims=(-5, -2), vector_dim=-1)
