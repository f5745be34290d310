"""Hopper kernel of the forward product and the input gradient: 1x128 tiles times 128x128 blocks (report 3.3.2).

A persistent grid, one block an SM. Its last warpgroup is the producer: one warp of it brings 128 columns of both
operands into the next free slot of shared memory. The others compute, 64 rows of the output tile each:

    producer   | load k+2 | load k+3 | ...
    compute 0  | wgmma k     | promote k | wgmma k+1      | promote k+1 | ...
    compute 1  |      wgmma k       | promote k | wgmma k+1       | promote k+1 | ...

so that the tensor cores work for one warpgroup while another promotes: Hopper sums FP8 products in about 14 bits, so
the sum over each 128 columns is scaled and added to float32 registers by ordinary instructions.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, Int

from dsv3_jax.ops.fp8_matmul.kernel_parts import chunk_width, promoted_sums, unrolled_by_slot
from dsv3_jax.ops.hopper import WARPGROUP_ROWS, Config, Store, operand, producer_and_consumers, walk
from dsv3_jax.ops.quantize.formats import E4M3, TILE


def matmul(
    a: Float8e4m3fn[Array, "m k"],
    a_scales: Float[Array, "k_tiles m"],
    b: Float8e4m3fn[Array, "*groups n k"],
    b_scales: Float[Array, "*groups x y"],
    *,
    scales_by_k: bool,
    config: Config,
    tile_group: Int[Array, " tiles"] | None = None,
    dtype: jnp.dtype = jnp.bfloat16,
    num_sms: int = 132,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """a @ b^T, where b has one scale a 128x128 block: `b_scales` are [k_blocks, n_blocks], or the reverse unless
    `scales_by_k`. With `tile_group`, each tile of `config.rows` rows meets the b of its group; a tile of no group (the
    number of groups) is skipped and its rows are left undefined.
    """
    m, k = a.shape
    n = b.shape[-2]
    grouped = tile_group is not None
    k_blocks, n_blocks = pl.cdiv(k, TILE), pl.cdiv(n, TILE)
    grid = (pl.cdiv(m, config.rows), pl.cdiv(n, config.cols))
    warpgroups, stages = config.warpgroups, config.stages
    store = Store(chunk_width(config), dtype)

    def body(*refs):
        groups_ref = refs[0] if grouped else None
        a_ref, as_ref, b_ref, bs_ref, out_ref, a_s, b_s, as_s, out_s, full, empty = refs[grouped:]
        wg = lax.axis_index("wg")

        def for_each_tile(f: Callable) -> None:
            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="sm")
            def _(info):
                mi, ni = walk(info.index[0], grid, config.band)
                if not grouped:
                    f(mi, ni, b_ref, bs_ref)
                    return
                group = groups_ref[mi]
                pl.when(group < b.shape[0])(lambda: f(mi, ni, b_ref.at[group], bs_ref.at[group]))

        def load_tile(mi, ni, b_of, bs_of):
            rows, cols = pl.ds(mi * config.rows, config.rows), pl.ds(ni * config.cols, config.cols)

            def load(k_block, slot):
                ks = pl.ds(k_block * TILE, TILE)
                plgpu.barrier_wait(empty.at[slot])
                plgpu.copy_gmem_to_smem(a_ref.at[rows, ks], a_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(b_of.at[cols, ks], b_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(as_ref.at[k_block, rows], as_s.at[slot], full.at[slot])

            unrolled_by_slot(k_blocks, stages, load)

        def compute_tile(mi, ni, b_of, bs_of):
            mine = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
            scales_at = functools.partial(_chunk_scales, bs_of, scales_by_k, n_blocks, ni * config.cols, config)

            def step(sums, chunk_scales, slot):
                def product(partial_ref):
                    plgpu.barrier_wait(full.at[slot])
                    row_scale = plgpu.load(as_s.at[slot, mine], layout=plgpu.Layout.WGMMA.reduce(1))
                    plgpu.wgmma(partial_ref, a_s.at[slot, mine], b_s.at[slot].transpose((1, 0)))
                    return partial_ref[...], row_scale

                partial, row_scale = pl.run_scoped(product, plgpu.ACC((WARPGROUP_ROWS, config.cols), jnp.float32))
                plgpu.barrier_arrive(empty.at[slot])
                return _promote(sums, partial, row_scale, chunk_scales)

            sums = promoted_sums(k_blocks, stages, config, step, scales_at)
            store(sums, out_s.at[wg], out_ref, mi * config.rows + wg * WARPGROUP_ROWS, ni * config.cols)

        producer_and_consumers(config, empty, lambda: for_each_tile(load_tile), lambda: for_each_tile(compute_tile))

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), dtype),
        scratch_types=[
            operand((stages, config.rows, TILE), E4M3),
            operand((stages, config.cols, TILE), E4M3),
            plgpu.SMEM((stages, config.rows), jnp.float32),
            store.scratch(warpgroups),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        ],
        grid=(num_sms,),
        grid_names=("sm",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )
    operands = (a, a_scales, b, b_scales)
    return run(tile_group, *operands) if grouped else run(*operands)


def _chunk_scales(
    scales_ref: Any, by_k: bool, n_blocks: int, first: Array, config: Config, k_block: Array
) -> list[Array]:
    """The weight's scale for each chunk of a tile's columns, which start at column `first`."""
    width = chunk_width(config)
    spanned = 1 + pl.cdiv(config.cols - width, TILE)
    block = lax.div(first, jnp.int32(TILE))
    blocks = [lax.min(block + i, jnp.int32(n_blocks - 1)) for i in range(spanned)]
    loaded = [scales_ref[k_block, b] if by_k else scales_ref[b, k_block] for b in blocks]
    if config.cols % TILE == 0:
        return loaded
    offset = lax.rem(first, jnp.int32(TILE))
    crossed = [offset + col >= TILE for col in range(0, config.cols, width)]
    return [lax.select(c, loaded[1], loaded[0]) for c in crossed]


def _promote(sums: list[Array], partial: Array, row_scale: Array, chunk_scales: list[Array]) -> list[Array]:
    """Float32 sums plus the scaled sums of 128 columns, chunk by chunk."""
    width = partial.shape[1] // len(sums)
    chunks = [partial] if len(sums) == 1 else [partial[:, i * width : (i + 1) * width] for i in range(len(sums))]
    return [
        total + chunk * lax.broadcast_in_dim(row_scale * scale, chunk.shape, [0])
        for total, chunk, scale in zip(sums, chunks, chunk_scales, strict=True)
    ]
