"""Hopper kernels of the bf16 grouped products: forward, gradient of the rows, gradient of the weights.

A persistent grid, one block an SM; the last warpgroup's first warp loads 64 of the reduced dimension of both operands
into the next free slot of shared memory, and two warpgroups multiply, 64 rows of the output tile each. wgmma sums into
float32 registers over the whole reduction, and a slot is free again once the next product is under way.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.hopper import (
    MULTIPROCESSORS,
    WARPGROUP_ROWS,
    Config,
    RowSquares,
    Store,
    in_turns,
    lowered_once,
    operand,
    through_slots,
    walk,
)

DEFAULT = Config(rows=128, cols=256)
_STEP = 64
_ROWS = 128
"""Rows of a tile that belongs to one group."""


def unsupported(x: Array, weight: Array, tile_group: Array) -> str | None:
    """Why the kernels cannot take these operands; None where they can."""
    k, n = weight.shape[1:]
    if x.dtype != jnp.bfloat16:
        return f"takes bfloat16, not {x.dtype}"
    if x.shape[0] != tile_group.shape[0] * _ROWS:
        return f"takes groups in tiles of {_ROWS} rows, not {x.shape[0] // tile_group.shape[0]}"
    if k % _STEP or n % _STEP:
        return f"takes widths that are multiples of {_STEP}, not {k} and {n}"
    return None


@lowered_once("transposed", "config", "num_sms", "interpret")
def grouped_product(
    x: Float[Array, "m k"],
    weight: Float[Array, "groups k n"],
    tile_group: Int[Array, " tiles"],
    *,
    transposed: bool = False,
    config: Config = DEFAULT,
    num_sms: int = MULTIPROCESSORS,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """Each tile of 128 rows times the weight of its group, or times its transpose ([groups, n, k]).

    A tile of no group (the number of groups) is skipped and its rows are left undefined.
    """
    m, k = x.shape
    groups, n = weight.shape[0], weight.shape[1 if transposed else 2]
    grid = (m // _ROWS, pl.cdiv(n, config.cols))

    def body(groups_ref, x_ref, w_ref, out_ref, x_s, w_s, out_s, full, empty):
        def for_each_tile(f: Callable) -> None:
            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="sm")
            def _(info):
                mi, ni = walk(info.index[0], grid, config.band)
                group = groups_ref[mi]
                pl.when(group < groups)(lambda: f(mi, ni, group))

        def load_tile(mi, ni, group):
            rows, cols = pl.ds(mi * _ROWS, _ROWS), pl.ds(ni * config.cols, config.cols)

            def load(step, slot, _):
                plgpu.barrier_wait(empty.at[slot])
                ks = pl.ds(step * _STEP, _STEP)
                part = w_ref.at[group, cols, ks] if transposed else w_ref.at[group, ks, cols]
                plgpu.copy_gmem_to_smem(x_ref.at[rows, ks], x_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(part, w_s.at[slot], full.at[slot])

            in_turns(k // _STEP, config.stages, load)

        def compute_tile(mi, ni, group):
            wg = lax.axis_index("wg")
            mine = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)

            def multiply(acc, slot):
                plgpu.wgmma(acc, x_s.at[slot, mine], w_s.at[slot].transpose((1, 0)) if transposed else w_s.at[slot])

            sums = _sum(multiply, jnp.int32(k // _STEP), config, full, empty)
            store([sums], out_s.at[wg], out_ref, mi * _ROWS + wg * WARPGROUP_ROWS, ni * config.cols)

        through_slots(config, empty, lambda: for_each_tile(load_tile), lambda: for_each_tile(compute_tile))

    store = Store(config.cols, config.cols, x.dtype, n, width=64, slots=2)
    w_shape = (config.cols, _STEP) if transposed else (_STEP, config.cols)
    run = _kernel(
        "bf16_grouped_matmul",
        body,
        jax.ShapeDtypeStruct((m, n), x.dtype),
        [operand((config.stages, _ROWS, _STEP), x.dtype), operand((config.stages, *w_shape), x.dtype)],
        store,
        config,
        num_sms,
        interpret,
    )
    return run(tile_group, x, weight)


@lowered_once("config", "squares", "num_sms", "interpret")
def grouped_wgrad(
    x: Float[Array, "rows m"],
    dy: Float[Array, "rows n"],
    bounds: Int[Array, " groups_and_1"],
    *,
    config: Config = DEFAULT,
    squares: bool = False,
    num_sms: int = MULTIPROCESSORS,
    interpret: Any = None,
) -> Float[Array, "groups m n"] | tuple[Float[Array, "groups m n"], Float[Array, " groups"]]:
    """x^T @ dy over the 128-row tiles bounds[g] to bounds[g + 1] of each group g, in float32; with `squares` the sum of
    the squares of each group's result too."""
    m, n = x.shape[1], dy.shape[1]
    groups = bounds.shape[0] - 1
    grid = (pl.cdiv(m, _ROWS), pl.cdiv(n, config.cols))
    per_tile = _ROWS // _STEP
    row_squares = RowSquares(groups, grid[0] * _ROWS, grid[1], config.cols) if squares else None

    def body(bounds_ref, x_ref, dy_ref, out_ref, *refs):
        *squares_ref, x_s, dy_s, out_s, full, empty = refs

        def for_each_tile(f: Callable) -> None:
            @plgpu.nd_loop((groups, grid[0] * grid[1]), collective_axes="sm")
            def _(info):
                group, index = info.index
                first = bounds_ref[group]
                f(group, *walk(index, grid, config.band), first, (bounds_ref[group + 1] - first) * per_tile)

        def load_tile(group, mi, ni, first, count):
            rows, cols = pl.ds(mi * _ROWS, _ROWS), pl.ds(ni * config.cols, config.cols)

            def load(step, slot, _):
                plgpu.barrier_wait(empty.at[slot])
                tokens = pl.ds(first * _ROWS + step * _STEP, _STEP)
                plgpu.copy_gmem_to_smem(x_ref.at[tokens, rows], x_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(dy_ref.at[tokens, cols], dy_s.at[slot], full.at[slot])

            in_turns(count, config.stages, load)

        def compute_tile(group, mi, ni, first, count):
            wg = lax.axis_index("wg")
            mine = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)

            def multiply(acc, slot):
                plgpu.wgmma(acc, x_s.at[slot, :, mine].transpose((1, 0)), dy_s.at[slot])

            sums = _sum(multiply, count, config, full, empty)
            row, col = mi * _ROWS + wg * WARPGROUP_ROWS, ni * config.cols
            store([sums], out_s.at[wg], out_ref.at[group], row, col)
            if row_squares:
                row_squares([sums], squares_ref[0].at[group], row, col)

        through_slots(config, empty, lambda: for_each_tile(load_tile), lambda: for_each_tile(compute_tile))

    store = Store(config.cols, config.cols, jnp.float32, n, width=32, slots=2)
    run = _kernel(
        "bf16_grouped_wgrad",
        body,
        [jax.ShapeDtypeStruct((groups, m, n), jnp.float32), *([row_squares.out_type] if row_squares else [])],
        [operand((config.stages, _STEP, _ROWS), x.dtype), operand((config.stages, _STEP, config.cols), x.dtype)],
        store,
        config,
        num_sms,
        interpret,
    )
    result, *sums = run(bounds, x, dy)
    return (result, sums[0].sum(axis=(1, 2))) if squares else result


def _sum(multiply: Callable, count: Array, config: Config, full: Any, empty: Any) -> Float[Array, "rows cols"]:
    """The warpgroup's sums over all steps; multiply(acc, slot) adds one."""
    stages = config.stages
    rounds = lax.div(count, jnp.int32(stages))

    def use(acc: Any, slot: Array) -> None:
        plgpu.barrier_wait(full.at[slot])
        multiply(acc, slot)
        plgpu.wgmma_wait(1)

    def all_steps(acc: Any) -> Array:
        @pl.loop(0, rounds)
        def _(i):
            for slot in range(stages):
                use(acc, slot)
                if slot:
                    plgpu.barrier_arrive(empty.at[slot - 1])
                else:
                    pl.when(i > 0)(lambda: plgpu.barrier_arrive(empty.at[stages - 1]))

        @pl.loop(0, count - rounds * stages)
        def _(slot):
            use(acc, slot)
            before = lax.select(slot > 0, slot - 1, jnp.int32(stages - 1))
            pl.when((slot > 0) | (rounds > 0))(lambda: plgpu.barrier_arrive(empty.at[before]))

        sums = acc[...]
        pl.when(count > 0)(lambda: plgpu.barrier_arrive(empty.at[lax.rem(count - 1, jnp.int32(stages))]))
        return sums

    return pl.run_scoped(all_steps, plgpu.ACC((WARPGROUP_ROWS, config.cols), jnp.float32))


def _kernel(
    name: str,
    body: Callable,
    out_type: Any,
    operands: list[Any],
    store: Store,
    config: Config,
    num_sms: int,
    interpret: Any,
) -> Callable[..., Any]:
    """The launch that both kernels share: scratch, barriers, grid."""
    if config.cluster != 1:
        raise ValueError(f"cluster={config.cluster}: blocks of the bf16 products share no operands, cluster must be 1")
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[
            *operands,
            store.scratch(config.warpgroups),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        ],
        grid=(num_sms,),
        grid_names=("sm",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        kernel_name=name,
        **({} if interpret is None else {"interpret": interpret}),
    )
