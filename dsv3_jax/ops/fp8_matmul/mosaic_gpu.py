"""Hopper kernels of the three FP8 products, as problems for `scaled_product` (report 3.3.2)."""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, Int

from dsv3_jax.ops.fp8_matmul.scaled_product import Problem, Work, scaled_product
from dsv3_jax.ops.groups import group_bounds
from dsv3_jax.ops.hopper import MULTIPROCESSORS, WARPGROUP_ROWS, Config, lowered_once
from dsv3_jax.ops.quantize.formats import TILE


@lowered_once("config", "dtype", "num_sms", "interpret")
def matmul(
    a: Float8e4m3fn[Array, "m k"],
    a_scales: Float[Array, "k_tiles m"],
    b: Float8e4m3fn[Array, "*groups n k"],
    b_scales: Float[Array, "*groups n_blocks k_blocks"],
    *,
    config: Config,
    tile_group: Int[Array, " tiles"] | None = None,
    dtype: jnp.dtype = jnp.bfloat16,
    num_sms: int = MULTIPROCESSORS,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """a @ b^T, where b has one scale a 128x128 block.

    With `tile_group`, each tile of 128 rows meets the b of its group; tiles of no group (the number of groups) come
    last, and their rows are left undefined.
    """
    m, k = a.shape
    n = b.shape[-2]
    k_blocks = pl.cdiv(k, TILE)

    def fetch(tiles_ref: Any, _: Array, row: Array) -> tuple[Array, ...]:
        return tuple(tiles_ref[i, row] for i in range(3)) if grouped else ()

    def dense_work(_: tuple[()], group: Array, row: Array, col: Array) -> Work:
        return Work(row * config.rows, col * TILE, group, jnp.int32(0), k_blocks)

    def grouped_work(fetched: tuple[Array, ...], _: Array, row: Array, col: Array) -> Work:
        first, end, group = fetched
        return Work(first * WARPGROUP_ROWS, col * TILE, group, jnp.int32(0), k_blocks, end * WARPGROUP_ROWS)

    def block_scale(scales_ref: Any, work: Work, k_block: Array) -> Array:
        of_group = scales_ref.at[work.group] if b.ndim == 3 else scales_ref
        last = jnp.int32(b_scales.shape[-2] - 1)  # a cluster's last tile may lie beyond the weight
        return of_group[lax.min(lax.div(work.col, jnp.int32(TILE)), last), k_block]

    grouped = tile_group is not None
    index = _row_tiles(tile_group, b.shape[0], config.rows) if grouped else jnp.zeros(1, jnp.int32)
    row_tiles = index.shape[1] if grouped else pl.cdiv(m, config.rows)
    name, work = ("fp8_grouped_matmul", grouped_work) if grouped else ("fp8_matmul", dense_work)
    # Three warpgroups that fetch ahead would lack registers without a cluster: ptxas then puts wgmmas in sequence.
    ahead = grouped and config.cluster > 1
    problem = Problem(name, (1, row_tiles, pl.cdiv(n, TILE)), fetch, work, block_scale, ahead)
    out = jax.ShapeDtypeStruct((m, n), dtype)
    return scaled_product(problem, index, a, a_scales, b, b_scales, out, config, num_sms=num_sms, interpret=interpret)


@lowered_once("config", "squares", "num_sms", "interpret")
def wgrad(
    a: Float8e4m3fn[Array, "m tokens"],
    a_scales: Float[Array, "tiles m"],
    b: Float8e4m3fn[Array, "n tokens"],
    b_scales: Float[Array, "tiles n"],
    bounds: Int[Array, " groups_and_1"] | None = None,
    *,
    config: Config,
    total: Float[Array, "results m n"] | None = None,
    first: Int[Array, ""] | None = None,
    squares: bool = False,
    num_sms: int = MULTIPROCESSORS,
    interpret: Any = None,
) -> Float[Array, "results m n"] | tuple[Float[Array, "groups m n"], Float[Array, " groups"]]:
    """a @ b^T over the 128-token tiles bounds[g] to bounds[g + 1] of each group g, in float32, added to total[g], or to
    total[first + g].

    A group without tokens gets zero. Without bounds there is one group of all tokens. With `squares`, which excludes a
    total, the sum of the squares of each group's result too.
    """
    m, n = a.shape[0], b.shape[0]
    groups = 1 if bounds is None else bounds.shape[0] - 1

    def fetch(index_ref: Any, group: Array, _: Array) -> tuple[Array, ...]:
        own = () if bounds is None else (index_ref[group], index_ref[group + 1])
        return own if first is None else (*own, index_ref[index.shape[0] - 1])

    def work(fetched: tuple[Array, ...], group: Array, row: Array, col: Array) -> Work:
        result = group if first is None else group + fetched[-1]
        at = (row * config.rows, col * TILE, result)
        if bounds is None:
            return Work(*at, jnp.int32(0), pl.cdiv(a.shape[1], TILE))
        begin, end = fetched[:2]
        return Work(*at, begin, end - begin)

    name = "fp8_wgrad" if bounds is None else "fp8_grouped_wgrad"
    grid = groups, pl.cdiv(m, config.rows), pl.cdiv(n, TILE)
    problem = Problem(name, grid, fetch, work, block_scale=None, ahead=bounds is not None)
    out = jax.ShapeDtypeStruct((groups, m, n) if total is None else total.shape, jnp.float32)
    index = jnp.zeros(0 if first is not None else 1, jnp.int32) if bounds is None else bounds
    index = index if first is None else jnp.append(index, first.astype(jnp.int32))
    how = {"total": total, "first": first, "squares": squares, "num_sms": num_sms, "interpret": interpret}
    return scaled_product(problem, index, a, a_scales, b, b_scales, out, config, **how)


def _row_tiles(tile_group: Int[Array, " tiles"], groups: int, rows: int) -> Int[Array, "3 row_tiles"]:
    """First row, end of the group and group of every tile of `rows` rows, of groups that begin at multiples of 128.

    Rows are counted in warpgroups' 64, which shows the compiler that they are multiples of it. A group's last tile may
    reach into the next group. Tiles that are left over end where they begin.
    """
    rows = rows // WARPGROUP_ROWS
    bounds = group_bounds(tile_group, groups) * (TILE // WARPGROUP_ROWS)
    tiles = -(-(bounds[1:] - bounds[:-1]) // rows)
    ends = jnp.cumsum(tiles)
    tile = jnp.arange(pl.cdiv(tile_group.shape[0] * TILE // WARPGROUP_ROWS, rows) + groups, dtype=jnp.int32)
    owner = jnp.searchsorted(ends, tile, side="right", method="compare_all")
    group = jnp.minimum(owner, groups - 1).astype(jnp.int32)
    first = bounds[group] + (tile - (ends - tiles)[group]) * rows
    return jnp.stack([jnp.minimum(first, bounds[group + 1]), bounds[group + 1], group])
