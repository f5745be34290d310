"""Hopper kernel of the weight gradient: both operands in 1x128 tiles along the tokens (report 3.3.2).

Warpgroups divide the work as in `mosaic_gpu`. A promotion multiplies by a scale of the row and one of the column, and
the float32 result is stored or, by the copy engine, added to what is there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, Int

from dsv3_jax.ops.fp8_matmul.kernel_parts import chunk_width, zero_sums
from dsv3_jax.ops.hopper import WARPGROUP_ROWS, Config, Store, operand, producer_and_consumers, walk
from dsv3_jax.ops.quantize.formats import E4M3, TILE


def wgrad(
    a: Float8e4m3fn[Array, "m tokens"],
    a_scales: Float[Array, "tiles m"],
    b: Float8e4m3fn[Array, "n tokens"],
    b_scales: Float[Array, "tiles n"],
    bounds: Int[Array, " groups_and_1"],
    *,
    config: Config,
    total: Float[Array, "groups m n"] | None = None,
    num_sms: int = 132,
    interpret: Any = None,
) -> Float[Array, "groups m n"]:
    """a @ b^T over the 128-token tiles bounds[g] to bounds[g + 1] of each group g, in float32, added to `total`.

    A group without tokens gets zero.
    """
    m, n = a.shape[0], b.shape[0]
    groups = bounds.shape[0] - 1
    grid = (pl.cdiv(m, config.rows), pl.cdiv(n, config.cols))
    stages = config.stages
    store = Store(chunk_width(config), jnp.float32)
    add = total is not None and interpret is None  # the interpreter cannot add on the way to global memory

    def body(bounds_ref, a_ref, as_ref, b_ref, bs_ref, out_ref, a_s, b_s, as_s, bs_s, out_s, full, empty):
        def for_each_tile(f: Callable) -> None:
            @plgpu.nd_loop((groups, grid[0] * grid[1]), collective_axes="sm")
            def _(info):
                group, index = info.index
                mi, ni = walk(index, grid, config.band)
                f(group, mi, ni, bounds_ref[group], bounds_ref[group + 1])

        def load_tile(group, mi, ni, first, last):
            rows, cols = pl.ds(mi * config.rows, config.rows), pl.ds(ni * config.cols, config.cols)

            def load(tile, slot):
                tokens = pl.ds(tile * TILE, TILE)
                plgpu.barrier_wait(empty.at[slot])
                plgpu.copy_gmem_to_smem(a_ref.at[rows, tokens], a_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(b_ref.at[cols, tokens], b_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(as_ref.at[tile, rows], as_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(bs_ref.at[tile, cols], bs_s.at[slot], full.at[slot])

            rounds = lax.div(last - first, jnp.int32(stages))

            @pl.loop(0, rounds)
            def _(i):
                for slot in range(stages):
                    load(first + i * stages + slot, slot)

            rest = first + rounds * stages
            pl.loop(0, last - rest)(lambda slot: load(rest + slot, slot))

        def compute_tile(group, mi, ni, first, last):
            wg = lax.axis_index("wg")
            mine = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)

            def step(slot, sums):
                def product(partial_ref):
                    plgpu.barrier_wait(full.at[slot])
                    row_scale = plgpu.load(as_s.at[slot, mine], layout=plgpu.Layout.WGMMA.reduce(1))
                    plgpu.wgmma(partial_ref, a_s.at[slot, mine], b_s.at[slot].transpose((1, 0)))
                    return partial_ref[...], row_scale

                partial, row_scale = pl.run_scoped(product, plgpu.ACC((WARPGROUP_ROWS, config.cols), jnp.float32))
                sums = _promote(sums, partial, row_scale, bs_s.at[slot])
                plgpu.barrier_arrive(empty.at[slot])
                return sums

            def one_round(_, carry):
                sums, base = carry
                # Opaque, or every slot's descriptors are computed before the loop and spill.
                base = lax.optimization_barrier(base)
                for slot in range(stages):
                    sums = step(base + slot, sums)
                return sums, base

            rounds = lax.div(last - first, jnp.int32(stages))
            sums, _ = lax.fori_loop(0, rounds, one_round, (zero_sums(config), jnp.int32(0)))
            sums = lax.fori_loop(0, last - first - rounds * stages, step, sums)
            row = mi * config.rows + wg * WARPGROUP_ROWS
            store(sums, out_s.at[wg], out_ref.at[group], row, ni * config.cols, add=add)

        producer_and_consumers(config, empty, lambda: for_each_tile(load_tile), lambda: for_each_tile(compute_tile))

    out_type = jax.ShapeDtypeStruct((groups, m, n), jnp.float32)
    run = plgpu.kernel(
        body,
        out_type=() if add else out_type,
        scratch_types=[
            operand((stages, config.rows, TILE), E4M3),
            operand((stages, config.cols, TILE), E4M3),
            plgpu.SMEM((stages, config.rows), jnp.float32),
            plgpu.SMEM((stages, config.cols), jnp.float32),
            store.scratch(config.warpgroups),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=stages),
        ],
        grid=(num_sms,),
        grid_names=("sm",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )
    operands = (bounds, a, a_scales, b, b_scales)
    if not add:
        dw = run(*operands)
        return dw if total is None else total + dw
    sums = jax.new_ref(total)
    run(*operands, sums)
    return jax.freeze(sums)


def _promote(sums: list[Array], partial: Array, row_scale: Array, col_scales_ref: Any) -> list[Array]:
    """Float32 sums plus the scaled sums of 128 tokens; column scales are read chunk by chunk to save registers."""
    width = partial.shape[1] // len(sums)
    promoted = []
    for i, total in enumerate(sums):
        cols = pl.ds(i * width, width)
        col_scale = plgpu.load(col_scales_ref.at[cols], layout=plgpu.Layout.WGMMA.reduce(0))
        chunk = partial if len(sums) == 1 else partial[:, i * width : (i + 1) * width]
        chunk = chunk * lax.broadcast_in_dim(row_scale, chunk.shape, [0])
        promoted.append(total + chunk * lax.broadcast_in_dim(col_scale, chunk.shape, [1]))
    return promoted
