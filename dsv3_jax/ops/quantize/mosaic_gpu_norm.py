"""A Hopper kernel for RMSNorm that also writes its result in FP8, so that the next product need not read it again."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from dsv3_jax.ops.quantize.formats import E4M3, TILE, Tiled
from dsv3_jax.ops.quantize.mosaic_gpu_pipeline import MULTIPROCESSORS, WARPGROUPS, launch, quantize_tile

ROWS = 4
"""Of a warpgroup, one for each warp."""
SHARED_MEMORY = 220 * 1024


def fits(d: int) -> bool:
    """Whether a block's rows of both types and the gain fit in shared memory."""
    return _shared_bytes(d) <= SHARED_MEMORY


def _shared_bytes(d: int) -> int:
    return WARPGROUPS * ROWS * d * 3 + 4 * d


def rms_norm_quantize(
    x: BFloat16[Array, "rows d"],
    gain: Float[Array, " d"],
    eps: float,
    *,
    blocks: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[BFloat16[Array, "rows d"], Tiled]:
    """The rows over their root mean square, times the gain, in BF16 and in 1x128 tiles.

    Each warpgroup has four whole rows in shared memory at a time, one per warp, and its own fetches; while one waits
    for a fetch the others of the multiprocessor compute:

        copy engine    | fetch rows i |                                                      | write both results
        a warpgroup    |              | sum of squares | normalize in place, quantize a copy |
    """
    rows, d = x.shape
    tiles = d // TILE
    chunk = max(n for n in (2, 4, 8) if tiles % n == 0)
    layout = _row_of_tiles(min(chunk, 4))
    if blocks is None:
        blocks = MULTIPROCESSORS * min(4, SHARED_MEMORY // _shared_bytes(d))

    def kernel(x_g, gain_g, normed_g, values_g, scales_g, x_s, gain_s, values_s, fetched, gain_fetched):
        warpgroup = lax.axis_index("warpgroup")
        x_s, values_s, fetched = x_s.at[warpgroup], values_s.at[warpgroup], fetched.at[warpgroup]
        pl.when(warpgroup == 0)(lambda: plgpu.copy_gmem_to_smem(gain_g, gain_s, gain_fetched))
        plgpu.barrier_wait(gain_fetched)

        def tiles_first(ref, n):
            return ref.at[:, pl.ds(n * chunk, chunk)].transpose((1, 0, 2))

        def load(n):
            return plgpu.load(tiles_first(x_s, n), layout=layout, optimized=False).astype(jnp.float32)

        @plgpu.nd_loop((rows // ROWS,), collective_axes=("block", "warpgroup"))
        def _rows(info):
            mine = pl.ds(info.index[0] * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(x_g.at[mine], x_s, fetched)
            plgpu.barrier_wait(fetched)

            def add_squares(n, total):
                part = load(n)
                return total + part * part

            zeros = plgpu.layout_cast(jnp.zeros((chunk, ROWS, TILE), jnp.float32), layout)
            squares = lax.fori_loop(0, tiles // chunk, add_squares, zeros)
            mean = squares.sum(axis=2).sum(axis=0) / d
            root = lax.rsqrt(mean + eps)

            @pl.loop(0, tiles // chunk)
            def _chunk(n):
                part = load(n)
                part = part * lax.broadcast_in_dim(root, part.shape, [1])
                chunk_gain = plgpu.load(gain_s.at[pl.ds(n * chunk, chunk)], layout=layout.reduce(1), optimized=False)
                part = (part * lax.broadcast_in_dim(chunk_gain, part.shape, [0, 2])).astype(x.dtype)
                tiles_first(x_s, n)[...] = part
                values, scales = quantize_tile(part.astype(jnp.float32))
                tiles_first(values_s, n)[...] = values
                scales_g[pl.ds(n * chunk, chunk), mine] = scales

            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x_s, normed_g.at[mine])
            plgpu.copy_smem_to_gmem(values_s, values_g.at[mine])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        plgpu.wait_smem_to_gmem(0)

    cube = (rows, tiles, TILE)
    normed, values, scales = launch(
        kernel,
        [x.reshape(cube), gain.astype(jnp.float32).reshape(tiles, TILE)],
        blocks=blocks,
        interpret=interpret,
        out_type=[
            jax.ShapeDtypeStruct(cube, x.dtype),
            jax.ShapeDtypeStruct(cube, E4M3),
            jax.ShapeDtypeStruct((tiles, rows), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((WARPGROUPS, ROWS, tiles, TILE), x.dtype),
            plgpu.SMEM((tiles, TILE), jnp.float32),
            plgpu.SMEM((WARPGROUPS, ROWS, tiles, TILE), E4M3),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            plgpu.Barrier(),
        ],
    )
    return normed.reshape(rows, d), Tiled(values.reshape(rows, d), scales)


def _row_of_tiles(tiles: int):
    """Registers for [tiles, 4 rows, 128], 2 or 4 tiles: a warp has a row of them, and a lane eight neighbours of it,
    two times where there are four tiles."""
    base = (tiles, ROWS, TILE)
    if tiles == 2:
        return plgpu.Layout.TILED(plgpu.Tiling((base, (8,))), warp_dims=(-3,), lane_dims=(-4, -2), vector_dim=-1)
    return plgpu.Layout.TILED(plgpu.Tiling((base, (64,), (8,))), warp_dims=(-4,), lane_dims=(-5, -2), vector_dim=-1)
