"""The Hopper kernel under all FP8 products: tiles of a @ b^T with float32 promotion every 128 (report 3.3.2).

A persistent grid, one block an SM. One warp of a block's last warpgroup produces: it brings 128 columns of both
operands into the next free slot of shared memory. The others compute, 64 rows of the output tile each:

    producer   | load k+2 | load k+3 | ...
    compute 0  | wgmma k     | promote k | wgmma k+1      | promote k+1 | ...
    compute 1  |      wgmma k       | promote k | wgmma k+1       | promote k+1 | ...

so that the tensor cores work for one warpgroup while the others promote: Hopper sums FP8 products in about 14 bits, so
the sum over each 128 columns is scaled and added to float32 registers by ordinary instructions. Two neighbouring blocks
form a cluster: their output tiles lie side by side and share the rows of a, of which each loads half for both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dsv3_jax.ops.hopper import WARPGROUP_ROWS, Config, Store, operand, producer_and_consumers, walk
from dsv3_jax.ops.quantize.formats import E4M3, TILE

Promote = Callable[[list[Array], Array, Array, Any], list[Array]]


@dataclass(frozen=True)
class Work:
    """One output tile: where it lies, which group's b and output it belongs to, and what it sums over."""

    row: Array
    col: Array
    group: Array
    first: Array
    """First block of 128 columns."""
    count: Array | int
    """Blocks of 128 columns; a constant where it is known, since loops of known length are faster."""


@dataclass(frozen=True)
class Problem:
    """What sets one product apart from another."""

    grid: tuple[int, int, int]
    """Groups that are walked one after the other, and rows and columns of tiles of each."""
    work: Callable[..., Work]
    """(index_ref, group, row tile, column tile) -> Work."""
    chunks: int
    """Parts of a warpgroup's sums, each of columns that share what `scales` gives."""
    scales: Callable[..., Any]
    """(b_scales_ref, Work, block) -> what promotion needs of the scales in global memory, read a block ahead."""
    promote: Callable[..., list[Array]]
    """(sums, partial, row scales, those scales, column scales in shared memory) -> sums."""
    column_tiles: bool
    """Whether b, too, is scaled by 1x128 tiles, whose scales come into shared memory with it."""
    skip_empty: bool
    """Whether a tile that sums over nothing is left undefined, rather than set to zero."""


def scaled_product(
    problem: Problem,
    index: Array,
    a: Array,
    a_scales: Array,
    b: Array,
    b_scales: Array,
    out: jax.ShapeDtypeStruct,
    config: Config,
    total: Array | None = None,
    num_sms: int = 132,
    interpret: Any = None,
) -> Array:
    """Run a problem; `index` is what its `work` reads, `total` is added to. Operands are [..., rows, k]."""
    stages, cluster = config.stages, config.cluster
    groups, row_tiles, col_tiles = problem.grid
    pairs = (row_tiles, pl.cdiv(col_tiles, cluster))
    store = Store(config.cols, config.cols // problem.chunks, out.dtype)
    add = total is not None and interpret is None  # the interpreter cannot add on the way to global memory

    def body(index_ref, a_ref, as_ref, b_ref, bs_ref, out_ref, a_s, b_s, as_s, bs_s, out_s, full, empty):
        wg = lax.axis_index("wg")

        def for_each_tile(f: Callable[[Work], None]) -> None:
            @plgpu.nd_loop((groups, pairs[0] * pairs[1]), collective_axes="sm")
            def _(info):
                group, tile = info.index
                row, pair = walk(tile, pairs, config.band)
                col = pair * cluster + lax.axis_index("cluster") if cluster > 1 else pair
                f(problem.work(index_ref, group, row, col))

        def slot_of(i: Array) -> Array:
            """Every tile starts with the first slot."""
            return lax.rem(i, jnp.int32(stages))

        def load_tile(work):
            rows, cols = pl.ds(work.row, config.rows), pl.ds(work.col, config.cols)
            b_of = b_ref.at[work.group] if b.ndim == 3 else b_ref

            @pl.loop(0, work.count)
            def _(i):
                block, slot = work.first + i, slot_of(i)
                ks = pl.ds(block * TILE, TILE)
                plgpu.barrier_wait(empty.at[slot])
                plgpu.copy_gmem_to_smem(
                    a_ref.at[rows, ks], a_s.at[slot], full.at[slot], collective_axes="cluster" if cluster > 1 else None
                )
                plgpu.copy_gmem_to_smem(b_of.at[cols, ks], b_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(as_ref.at[block, rows], as_s.at[slot], full.at[slot])
                if problem.column_tiles:
                    plgpu.copy_gmem_to_smem(bs_ref.at[block, cols], bs_s.at[slot], full.at[slot])

        def compute_tile(work):
            mine = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)

            def step(i, carry):
                sums, scales = carry
                slot = slot_of(i)
                following = problem.scales(bs_ref, work, work.first + lax.min(i + 1, work.count - 1))

                def product(partial_ref):
                    plgpu.barrier_wait(full.at[slot])
                    row_scale = plgpu.load(as_s.at[slot, mine], layout=plgpu.Layout.WGMMA.reduce(1))
                    plgpu.wgmma(partial_ref, a_s.at[slot, mine], b_s.at[slot].transpose((1, 0)))
                    return partial_ref[...], row_scale

                partial, row_scale = pl.run_scoped(product, plgpu.ACC((WARPGROUP_ROWS, config.cols), jnp.float32))
                if problem.column_tiles:
                    sums = problem.promote(sums, partial, row_scale, bs_s.at[slot])
                    plgpu.barrier_arrive(empty.at[slot])
                else:
                    plgpu.barrier_arrive(empty.at[slot])
                    sums = problem.promote(sums, partial, row_scale, scales)
                return sums, following

            carry = (_zeros(config, problem.chunks), problem.scales(bs_ref, work, work.first))
            sums, _ = lax.fori_loop(0, work.count, step, carry)
            out_of = out_ref.at[work.group] if len(out.shape) == 3 else out_ref

            def write() -> None:
                store(sums, out_s.at[wg], out_of, work.row + wg * WARPGROUP_ROWS, work.col, add)

            pl.when(work.count > 0)(write) if problem.skip_empty else write()

        producer_and_consumers(config, empty, lambda: for_each_tile(load_tile), lambda: for_each_tile(compute_tile))

    arrivals = 4 if problem.column_tiles else 3
    clustered = {"cluster": (cluster,), "cluster_names": ("cluster",)} if cluster > 1 else {}
    run = plgpu.kernel(
        body,
        out_type=() if add else out,
        scratch_types=[
            operand((stages, config.rows, TILE), E4M3),
            operand((stages, config.cols, TILE), E4M3),
            plgpu.SMEM((stages, config.rows), jnp.float32),
            plgpu.SMEM((stages, config.cols) if problem.column_tiles else (1, 32), jnp.float32),
            store.scratch(config.warpgroups),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=config.warpgroups, num_barriers=stages)
            if cluster > 1
            else plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=stages),
        ],
        grid=(num_sms // cluster,),
        grid_names=("sm",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **clustered,
        **({} if interpret is None else {"interpret": interpret}),
    )
    operands = (index, a, a_scales, b, b_scales)
    if not add:
        result = run(*operands)
        return result if total is None else total + result
    sums = jax.new_ref(total)
    run(*operands, sums)
    return jax.freeze(sums)


def _zeros(config: Config, chunks: int) -> list[Array]:
    zeros = jnp.zeros((WARPGROUP_ROWS, config.cols // chunks), jnp.float32)
    return [plgpu.layout_cast(zeros, plgpu.Layout.WGMMA) for _ in range(chunks)]
