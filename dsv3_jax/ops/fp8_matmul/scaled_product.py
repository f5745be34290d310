"""The Hopper kernel under all FP8 products: tiles of a @ b^T with float32 promotion every 128 (report 3.3.2).

A persistent grid, one block an SM, in clusters that share the rows' operand: what an SM reads from L2 is what bounds
the product otherwise. One warp of a block's last warpgroup produces: it brings 128 columns of both operands into the
next free slot of shared memory. The others compute, 64 rows of the output tile each:

    producer   | load k+2 | load k+3 | ...
    compute 0  | wgmma k     | promote k | wgmma k+1      | promote k+1 | ...
    compute 1  |      wgmma k       | promote k | wgmma k+1       | promote k+1 | ...

so that the tensor cores work for one warpgroup while the others promote: Hopper sums FP8 products in about 14 bits, so
the sum over each 128 columns is scaled and added to float32 registers by ordinary instructions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dsv3_jax.ops.hopper import (
    MULTIPROCESSORS,
    WARPGROUP_ROWS,
    Config,
    RowSquares,
    Store,
    in_turns,
    operand,
    through_slots,
    walk,
)
from dsv3_jax.ops.quantize.formats import E4M3, TILE

_STORED_BYTES = 256
"""Of a row, in one slot of shared memory."""
_CHUNK = 32
"""Columns promoted at a time where each has its scale: all of them would not fit into the registers."""
_PREFETCHED_ROWS = 32
"""Of the output, at a time: all at once would hold up the operands."""


@dataclass(frozen=True)
class Work:
    """One output tile: where it lies, which group's b and output it belongs to, and what it sums over."""

    row: Array
    col: Array
    group: Array
    first: Array
    """First block of 128 columns."""
    count: Array | int
    """Blocks of 128 columns."""
    end: Array | None = None
    """The first row that is another group's: a tile that begins there has no rows, and is skipped. None where all rows
    are its own."""


@dataclass(frozen=True)
class Problem:
    """What sets one product apart from another."""

    name: str
    """In profiles."""
    grid: tuple[int, int, int]
    """Groups that are walked one after the other, and rows and columns of tiles of each."""
    fetch: Callable[..., tuple[Array, ...]]
    """(index_ref, group, row tile) -> what `work` needs from global memory."""
    work: Callable[..., Work]
    """(what was fetched, group, row tile, column tile) -> Work."""
    block_scale: Callable[..., Array] | None
    """(b_scales_ref, Work, block) -> the scale of a 128x128 block of b; None where b has a scale for each of its rows
    in each block, which comes into shared memory with it."""
    ahead: bool = False
    """Whether those who compute fetch while earlier tiles are computed: hides reading memory, costs registers."""


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
    first: Array | None = None,
    squares: bool = False,
    num_sms: int = MULTIPROCESSORS,
    interpret: Any = None,
) -> Array | tuple[Array, Array]:
    """Run a problem; `index` is what its `fetch` reads, `total` is added to: from its element `first` on, where the
    problem's `work` says so. Operands are [..., rows, k].

    `squares` asks for the sums of the squares of each group's results too: of what is stored, so of no total.
    Raises ValueError for cuts that would compute wrong numbers.
    """
    if squares and total is not None:
        raise ValueError("squares are of what is stored: they cannot be had of what is added to a total")
    if config.cols != TILE:
        raise ValueError(f"cols={config.cols}: FP8 products are cut into tiles of {TILE} columns, the width of a scale")
    if problem.block_scale is None and config.cluster > 1:
        # To a cluster, one warp gives a slot back for its warpgroup. Products are done then, but another warp may not
        # have read the column scales yet.
        raise ValueError(f"cluster={config.cluster}: products with a scale for each row of b must run with cluster=1")
    groups, row_tiles, col_tiles = problem.grid
    tiles = (row_tiles, pl.cdiv(col_tiles, config.cluster))
    of_group = math.prod(tiles)
    chunk = _CHUNK if problem.block_scale is None else TILE
    width = min(TILE, _STORED_BYTES // jnp.dtype(out.dtype).itemsize)
    store = Store(TILE, chunk, out.dtype, out.shape[-1], width, slots=1)
    add = total is not None and interpret is None  # the interpreter cannot add on the way to global memory
    row_squares = RowSquares(groups, row_tiles * config.rows, col_tiles, TILE) if squares else None

    def body(index_ref, a_ref, as_ref, b_ref, bs_ref, out_ref, *refs):
        *squares_ref, a_s, b_s, as_s, bs_s, out_s, full, empty = refs
        wg, stages = lax.axis_index("wg"), config.stages
        mate = lax.axis_index("mate") if config.cluster > 1 else 0
        together = "mate" if config.cluster > 1 else None

        def place(index: Array) -> tuple[Array, ...]:
            group = lax.div(index, jnp.int32(of_group)) if groups > 1 else jnp.int32(0)
            row, col = walk(index - group * of_group, tiles, config.band)
            return group, row, col * config.cluster + mate, *problem.fetch(index_ref, group, row)

        def work_at(group: Array, row: Array, col: Array, *fetched: Array) -> Work:
            return problem.work(fetched, group, row, col)

        def scale_of(work: Work, i: Array) -> Array | None:
            return problem.block_scale and problem.block_scale(bs_ref, work, work.first + i)

        def out_of(work: Work) -> Any:
            return out_ref.at[work.group] if len(out.shape) == 3 else out_ref

        def for_each_tile(f: Callable[[Work], None]) -> None:
            @plgpu.nd_loop((groups * of_group,), collective_axes="sm")
            def _(info):
                work = work_at(*place(info.index[0]))
                f(work) if work.end is None else pl.when(work.row < work.end)(lambda: f(work))

        def for_each_tile_ahead(f: Callable[[Work, Array | None], None]) -> None:
            """Calls f with each tile and its first scale, which come from global memory while earlier tiles are
            computed: a tile's place two tiles before, its scale one before."""
            block, blocks, last = lax.axis_index("sm"), lax.axis_size("sm"), groups * of_group - 1

            def place_of(turn: Array) -> tuple[Array, ...]:
                return place(lax.min(block + turn * blocks, jnp.int32(last)))

            def tile(turn: Array, carry: tuple[tuple[Array, ...], tuple[Array, ...], Array | None]) -> Any:
                now, following, scale = carry
                later, following_scale = place_of(turn + 2), scale_of(work_at(*following), jnp.int32(0))
                work = work_at(*now)
                f(work, scale) if work.end is None else pl.when(work.row < work.end)(lambda: f(work, scale))
                return following, later, following_scale

            first = place_of(jnp.int32(0))
            start = first, place_of(jnp.int32(1)), scale_of(work_at(*first), jnp.int32(0))
            turns = lax.div(last - block + blocks, jnp.int32(blocks))  # none of a block that the tiles do not reach
            lax.fori_loop(0, turns, tile, start)

        def load_tile(work: Work) -> None:
            rows, cols = pl.ds(work.row, config.rows), pl.ds(work.col, TILE)
            b_of = b_ref.at[work.group] if b.ndim == 3 else b_ref

            def prefetch(i: Array) -> None:
                """A part of what is added to, into L2, in each of a tile's last turns."""
                part = i - (work.count - config.rows // _PREFETCHED_ROWS)
                at = pl.ds(work.row + part * _PREFETCHED_ROWS, _PREFETCHED_ROWS), cols
                plgpu.async_prefetch(out_of(work).at[at], predicate=part >= 0)

            def load(i: Array, slot: Array, _: None) -> None:
                block = work.first + i
                ks = pl.ds(block * TILE, TILE)
                plgpu.barrier_wait(empty.at[slot])
                plgpu.copy_gmem_to_smem(a_ref.at[rows, ks], a_s.at[slot], full.at[slot], collective_axes=together)
                plgpu.copy_gmem_to_smem(b_of.at[cols, ks], b_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(as_ref.at[block, rows], as_s.at[slot], full.at[slot])
                if problem.block_scale is None:
                    plgpu.copy_gmem_to_smem(bs_ref.at[block, cols], bs_s.at[slot], full.at[slot])
                if add:
                    prefetch(i)

            in_turns(work.count, stages, load)

        def compute_tile(work: Work, first_scale: Array | None) -> None:
            mine = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)

            def step(i, slot, carry):
                sums, scale = carry
                following = scale_of(work, lax.min(i + 1, jnp.int32(work.count - 1)))
                # Nothing may come between the fresh accumulator and its product: the compiler would put a fence there.
                plgpu.barrier_wait(full.at[slot])
                row_scale = plgpu.load(as_s.at[slot, mine], layout=plgpu.Layout.WGMMA.reduce(1))

                def product(partial_ref):
                    plgpu.wgmma(partial_ref, a_s.at[slot, mine], b_s.at[slot].transpose((1, 0)))
                    return partial_ref[...]

                partial = pl.run_scoped(product, plgpu.ACC((WARPGROUP_ROWS, TILE), jnp.float32))
                if scale is None:
                    sums = _promote_tiles(sums, partial, row_scale, bs_s.at[slot])
                    plgpu.barrier_arrive(empty.at[slot])
                else:
                    plgpu.barrier_arrive(empty.at[slot])
                    sums = [sums[0] + partial * lax.broadcast_in_dim(row_scale * scale, partial.shape, [0])]
                return sums, following

            zeros = jnp.zeros((WARPGROUP_ROWS, chunk), jnp.float32)
            zeros = [plgpu.layout_cast(zeros, plgpu.Layout.WGMMA) for _ in range(TILE // chunk)]
            sums, _ = in_turns(work.count, stages, step, (zeros, first_scale))
            row = work.row + wg * WARPGROUP_ROWS

            def write() -> None:
                store(sums, out_s.at[wg], out_of(work), row, work.col, add)
                if row_squares:
                    row_squares(sums, squares_ref[0].at[work.group], row, work.col)

            write() if work.end is None else pl.when(row < work.end)(write)

        def compute_each_tile() -> None:
            if problem.ahead:
                for_each_tile_ahead(compute_tile)
            else:
                for_each_tile(lambda work: compute_tile(work, scale_of(work, jnp.int32(0))))

        through_slots(config, empty, lambda: for_each_tile(load_tile), compute_each_tile)

    arrivals = 4 if problem.block_scale is None else 3
    run = plgpu.kernel(
        body,
        out_type=() if add else [out, row_squares.out_type] if row_squares else out,
        scratch_types=[
            operand((config.stages, config.rows, TILE), E4M3),
            operand((config.stages, TILE, TILE), E4M3),
            plgpu.SMEM((config.stages, config.rows), jnp.float32),
            plgpu.SMEM((config.stages if problem.block_scale is None else 1, TILE), jnp.float32),
            store.scratch(config.warpgroups),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.stages),
            _released(config),
        ],
        grid=(num_sms // config.cluster,),
        grid_names=("sm",),
        **({"cluster": (config.cluster,), "cluster_names": ("mate",)} if config.cluster > 1 else {}),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        kernel_name=problem.name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )
    operands = (index, a, a_scales, b, b_scales)
    if not add:
        result = run(*operands)
        if row_squares:
            return result[0], result[1].sum(axis=(1, 2))
        if total is None:
            return result
        added_to = jnp.arange(groups) + (0 if first is None else first)
        return total.at[added_to].add(result[added_to])
    sums = jax.new_ref(total)
    run(*operands, sums)
    return jax.freeze(sums)


def _released(config: Config) -> Any:
    """A barrier a slot, on which all warpgroups that read it give it back, those of the cluster's other blocks too."""
    count = {"num_arrivals": config.warpgroups, "num_barriers": config.stages}
    return plgpu.ClusterBarrier(collective_axes=("mate",), **count) if config.cluster > 1 else plgpu.Barrier(**count)


def _promote_tiles(sums: list[Array], partial: Array, row_scale: Array, col_scales_ref: Any) -> list[Array]:
    """Sums plus a partial sum scaled by row and column; column scales are read chunk by chunk to save registers."""
    promoted = []
    for i, total in enumerate(sums):
        cols = slice(i * _CHUNK, (i + 1) * _CHUNK)
        col_scale = plgpu.load(col_scales_ref.at[cols], layout=plgpu.Layout.WGMMA.reduce(0))
        scaled = partial[:, cols] * lax.broadcast_in_dim(row_scale, total.shape, [0])
        promoted.append(total + scaled * lax.broadcast_in_dim(col_scale, total.shape, [1]))
    return promoted
