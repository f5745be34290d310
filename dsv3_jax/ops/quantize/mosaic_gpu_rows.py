"""A Hopper kernel that gathers FP8 rows straight into tiles along the rows, so that they need not be sorted first."""

from collections.abc import Callable

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, Int

from dsv3_jax.ops.hopper import MULTIPROCESSORS, lowered_once, through_slots
from dsv3_jax.ops.quantize.formats import E4M3, TILE, Tiled
from dsv3_jax.ops.quantize.mosaic_gpu_pipeline import (
    COLUMNS,
    HALF,
    LAYOUT,
    scale_and_inverse,
    staging,
    tiled,
    tiled_types,
)

STRIP = 256
"""Features that are fetched of a row: as many as the copy engine counts as one line."""
SLOTS = 3
INDICES = SLOTS + 2
"""Strips whose rows' places are in shared memory."""
FETCHERS = 4
"""Warps, each of which fetches as many of a tile's rows."""
AT_ONCE = 8
"""Places that a warp reads before it fetches their rows: more would not fit into its registers."""

TWO_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((8, HALF), (2, HALF), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
"""Registers for [rows, 64]: a warp has two rows at a time, which share banks, where in other layouts eight do. Rows
that come one by one can be neither padded nor swizzled: the copy engine writes to multiples of 128 bytes."""


class GatherCrew:
    """Four warpgroups turn 64 features each, and a fifth fetches."""

    stages = SLOTS
    warpgroups = STRIP // HALF
    registers = 112, 32


@lowered_once("blocks", "interpret")
def retile_rows(
    values: Float8e4m3fn[Array, "tokens k"],
    scales: Float[Array, "tiles rows"],
    index: Int[Array, " rows"],
    *,
    blocks: int = MULTIPROCESSORS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Tiled:
    """The rows `index` of `values` in tiles along the rows, transposed. Their scales are those of the result's rows; a
    row whose index is out of range is zero, as its scales must be.

    A block takes 128 rows of 256 features, a strip, at a time:

        copy engine    | places of a later strip | rows of the next, one by one | write strip i
        a warpgroup    | 64 features of i, as float16 | transposed, times the rows' scales, quantized
    """
    k, rows = values.shape[1], index.shape[0]
    strips = k // STRIP

    def kernel(values_g, scales_g, index_g, out_g, out_scales_g, *scratch):
        x_s, scales_s, index_s, wide_s, out_s, out_scales_s, full, empty, placed = scratch
        warpgroup, block, grid = lax.axis_index("wg"), lax.axis_index("block"), lax.axis_size("block")
        steps = lax.div(rows // TILE * strips - block + grid - 1, grid)

        def position(step):
            strip = block + step * grid
            return lax.div(strip, jnp.int32(strips)), lax.rem(strip, jnp.int32(strips))

        def for_each_strip(f: Callable[..., None]) -> None:
            @pl.loop(0, steps)
            def _(step):
                f(step, lax.rem(step, jnp.int32(SLOTS)), *position(step))

        def fetch_places(step) -> None:
            slot = lax.rem(step, jnp.int32(INDICES))
            source = index_g.at[pl.ds(position(step)[0] * TILE, TILE)]
            plgpu.copy_gmem_to_smem(source, index_s.at[slot], placed.at[slot])

        def fetch(step, slot, i, j) -> None:
            warp = lax.axis_index("warp")
            first, places = warp * (TILE // FETCHERS), lax.rem(step, jnp.int32(INDICES))
            pl.when((warp == 0) & (step == 0))(lambda: fetch_places(step))
            plgpu.barrier_wait(empty.at[slot])
            # No warp still reads the places that these replace: the strip in this slot came after theirs.
            pl.when((warp == 0) & (step + 1 < steps))(lambda: fetch_places(step + 1))
            plgpu.barrier_wait(placed.at[places])
            for start in range(0, TILE // FETCHERS, AT_ONCE):
                found = [index_s[places, first + start + r] for r in range(AT_ONCE)]
                for r, place in enumerate(found):
                    # The copy engine writes zeros where a place is out of range.
                    row = values_g.at[place, pl.ds(j * STRIP, STRIP)]
                    plgpu.copy_gmem_to_smem(row, x_s.at[slot, first + start + r], full.at[slot])

            @pl.when(warp == 0)
            def _():
                for part in range(STRIP // TILE):
                    source = scales_g.at[j * (STRIP // TILE) + part, pl.ds(i * TILE, TILE)]
                    plgpu.copy_gmem_to_smem(source, scales_s.at[slot, part], full.at[slot])

        def turn(_, slot, i, j) -> None:
            plgpu.barrier_wait(full.at[slot])
            mine = x_s.at[slot, :, pl.ds(warpgroup * HALF, HALF)]
            wide_s[warpgroup] = plgpu.load(mine, layout=TWO_ROWS, optimized=False).astype(jnp.float16)
            tile = lax.div(warpgroup, jnp.int32(TILE // HALF))
            halves = [pl.ds(start, HALF) for start in range(0, TILE, HALF)]
            scaled = []
            for half in halves:
                row_scales = plgpu.load(scales_s.at[slot, tile, half], layout=COLUMNS)
                part = plgpu.load(wide_s.at[warpgroup, half].transpose((1, 0)), layout=LAYOUT).astype(jnp.float32)
                scaled.append(part * lax.broadcast_in_dim(row_scales, part.shape, [1]))
            plgpu.barrier_arrive(empty.at[slot])
            scale, inverse = scale_and_inverse(jnp.maximum(*(jnp.abs(part).max(axis=1) for part in scaled)))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for half, part in zip(halves, scaled, strict=True):
                out_s[warpgroup, :, half] = (part * lax.broadcast_in_dim(inverse, part.shape, [0])).astype(E4M3)
            out_scales_s[warpgroup] = scale
            plgpu.commit_smem()
            features = pl.ds(j * STRIP + warpgroup * HALF, HALF)
            target = out_g.at[features, pl.ds(i * TILE, TILE)]
            plgpu.copy_smem_to_gmem(out_s.at[warpgroup], target, commit_group=False)
            plgpu.copy_smem_to_gmem(out_scales_s.at[warpgroup], out_scales_g.at[i, features])

        through_slots(GatherCrew(), empty, lambda: for_each_strip(fetch), lambda: for_each_strip(turn), FETCHERS)

    run = plgpu.kernel(
        kernel,
        out_type=tiled_types(k, rows),
        scratch_types=[
            plgpu.SMEM((SLOTS, TILE, STRIP), E4M3),
            plgpu.SMEM((SLOTS, STRIP // TILE, TILE), jnp.float32),
            plgpu.SMEM((INDICES, TILE), jnp.int32),
            staging((GatherCrew.warpgroups, TILE, HALF), jnp.float16),
            staging((GatherCrew.warpgroups, HALF, TILE), E4M3, swizzle=HALF),
            plgpu.SMEM((GatherCrew.warpgroups, HALF), jnp.float32),
            plgpu.Barrier(num_arrivals=TILE + STRIP // TILE, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=GatherCrew.warpgroups, num_barriers=SLOTS),
            plgpu.Barrier(num_barriers=INDICES),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=GatherCrew.warpgroups + 1,
        thread_name="wg",
        kernel_name="retile_rows",
        # The other semantics want to swizzle what comes row by row.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({} if interpret is None else {"interpret": interpret}),
    )
    return tiled(*run(values, scales, index))
