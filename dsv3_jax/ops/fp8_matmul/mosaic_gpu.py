"""Hopper kernels of the three FP8 products, as problems for `scaled_product` (report 3.3.2)."""

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, Int

from dsv3_jax.ops.fp8_matmul.scaled_product import Problem, Work, scaled_product
from dsv3_jax.ops.hopper import Config
from dsv3_jax.ops.quantize.formats import TILE


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
    k_blocks, n_blocks = pl.cdiv(k, TILE), pl.cdiv(n, TILE)
    width = math.gcd(config.cols, TILE)

    def work(index_ref: Any, _: Array, row: Array, col: Array) -> Work:
        at = (row * config.rows, col * config.cols)
        if tile_group is None:
            return Work(*at, jnp.int32(0), jnp.int32(0), k_blocks)
        group = index_ref[row]
        count = lax.select(group < b.shape[0], jnp.int32(k_blocks), jnp.int32(0))
        return Work(*at, lax.min(group, jnp.int32(b.shape[0] - 1)), jnp.int32(0), count)

    def scales(scales_ref: Any, work: Work, k_block: Array) -> list[Array]:
        of_group = scales_ref.at[work.group] if b.ndim == 3 else scales_ref
        block = lax.div(work.col, jnp.int32(TILE))
        spanned = 1 + pl.cdiv(config.cols - width, TILE)
        blocks = [lax.min(block + i, jnp.int32(n_blocks - 1)) for i in range(spanned)]
        loaded = [of_group[k_block, i] if scales_by_k else of_group[i, k_block] for i in blocks]
        return loaded if config.cols % TILE == 0 else [*loaded, lax.rem(work.col, jnp.int32(TILE))]

    problem = Problem(
        grid=(1, pl.cdiv(m, config.rows), pl.cdiv(n, config.cols)),
        work=work,
        chunks=config.cols // width,
        scales=scales,
        promote=_promote_blocks,
        column_tiles=False,
        skip_empty=tile_group is not None,
    )
    index = jnp.zeros(1, jnp.int32) if tile_group is None else tile_group
    out = jax.ShapeDtypeStruct((m, n), dtype)
    return scaled_product(problem, index, a, a_scales, b, b_scales, out, config, num_sms=num_sms, interpret=interpret)


def wgrad(
    a: Float8e4m3fn[Array, "m tokens"],
    a_scales: Float[Array, "tiles m"],
    b: Float8e4m3fn[Array, "n tokens"],
    b_scales: Float[Array, "tiles n"],
    bounds: Int[Array, " groups_and_1"] | None = None,
    *,
    config: Config,
    total: Float[Array, "groups m n"] | None = None,
    num_sms: int = 132,
    interpret: Any = None,
) -> Float[Array, "groups m n"]:
    """a @ b^T over the 128-token tiles bounds[g] to bounds[g + 1] of each group g, in float32, added to `total`.

    A group without tokens gets zero. Without bounds there is one group of all tokens.
    """
    m, n = a.shape[0], b.shape[0]
    groups = 1 if bounds is None else bounds.shape[0] - 1

    def work(bounds_ref: Any, group: Array, row: Array, col: Array) -> Work:
        at = (row * config.rows, col * config.cols, group)
        if bounds is None:
            return Work(*at, jnp.int32(0), pl.cdiv(a.shape[1], TILE))
        first = bounds_ref[group]
        return Work(*at, first, bounds_ref[group + 1] - first)

    problem = Problem(
        grid=(groups, pl.cdiv(m, config.rows), pl.cdiv(n, config.cols)),
        work=work,
        chunks=config.cols // math.gcd(config.cols, 32),
        scales=lambda *_: (),
        promote=_promote_tiles,
        column_tiles=True,
        skip_empty=False,
    )
    out = jax.ShapeDtypeStruct((groups, m, n), jnp.float32)
    index = jnp.zeros(1, jnp.int32) if bounds is None else bounds
    return scaled_product(problem, index, a, a_scales, b, b_scales, out, config, total, num_sms, interpret)


def _promote_blocks(sums: list[Array], partial: Array, row_scale: Array, scales: list[Array]) -> list[Array]:
    """Sums plus a partial sum scaled by row and weight block.

    A tile of whole blocks has a scale for each chunk; another spans two blocks, and `scales` end with the first one's
    columns that come before the tile.
    """
    width = partial.shape[1] // len(sums)
    if partial.shape[1] % TILE == 0:
        chunk_scales = [row_scale * block for block in scales]
    else:
        first, second = (row_scale * block for block in scales[:2])
        crossed = [scales[2] + i * width >= TILE for i in range(len(sums))]
        chunk_scales = [lax.select(lax.broadcast_in_dim(c, first.shape, []), second, first) for c in crossed]
    return [
        total + chunk * lax.broadcast_in_dim(scale, chunk.shape, [0])
        for total, chunk, scale in zip(sums, _chunks(partial, len(sums)), chunk_scales, strict=True)
    ]


def _promote_tiles(sums: list[Array], partial: Array, row_scale: Array, col_scales_ref: Any) -> list[Array]:
    """Sums plus a partial sum scaled by row and column; column scales are read chunk by chunk to save registers."""
    width = partial.shape[1] // len(sums)
    promoted = []
    for i, (total, chunk) in enumerate(zip(sums, _chunks(partial, len(sums)), strict=True)):
        col_scale = plgpu.load(col_scales_ref.at[pl.ds(i * width, width)], layout=plgpu.Layout.WGMMA.reduce(0))
        scaled = chunk * lax.broadcast_in_dim(row_scale, chunk.shape, [0])
        promoted.append(total + scaled * lax.broadcast_in_dim(col_scale, chunk.shape, [1]))
    return promoted


def _chunks(x: Array, count: int) -> list[Array]:
    width = x.shape[1] // count
    return [x] if count == 1 else [x[:, i * width : (i + 1) * width] for i in range(count)]
