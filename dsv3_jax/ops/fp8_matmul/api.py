"""The three products of an FP8 linear, dense and grouped: picks an implementation (report 3.3).

Grouped rows come in tiles sorted by group (`ops.permute.assign_slots`). A tile without rows, where `tile_group` says
the number of groups, may hold anything, in operands and results alike.

`implementation` None takes the kernel where it can run and the reference elsewhere. A named implementation that cannot
run raises NotImplementedError, an unknown name ValueError.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.fp8_matmul import mosaic_gpu, reference
from dsv3_jax.ops.fp8_matmul.tiles import config_for
from dsv3_jax.ops.groups import group_bounds
from dsv3_jax.ops.hopper import Implementation, multiprocessors, takes_kernel
from dsv3_jax.ops.quantize.formats import TILE, Blocked, Tiled


def fp8_matmul(
    x: Tiled, weight: Blocked, dtype: jnp.dtype = jnp.bfloat16, implementation: Implementation | None = None
) -> Float[Array, "rows n"]:
    """x @ weight: the forward product."""
    if _takes_kernel(implementation, x.values, weight.transposed):
        return _blockwise(x, weight.transposed, weight.transposed_scales, dtype)
    return reference.matmul(x, weight).astype(dtype)


def fp8_matmul_transposed(
    dy: Tiled, weight: Blocked, dtype: jnp.dtype = jnp.bfloat16, implementation: Implementation | None = None
) -> Float[Array, "rows k"]:
    """dy @ weight^T: the gradient of the input."""
    if _takes_kernel(implementation, dy.values, weight.values):
        return _blockwise(dy, weight.values, weight.scales, dtype)
    return reference.matmul_transposed(dy, weight).astype(dtype)


def fp8_wgrad(
    x_columns: Tiled,
    dy_columns: Tiled,
    total: Float[Array, "*layers k n"] | None = None,
    layer: Int[Array, ""] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*layers k n"]:
    """x^T @ dy in float32: the gradient of the weight. Added to `total` where given, or to its element `layer`: in
    place, where the total is not read again."""
    if _takes_kernel(implementation, x_columns.values, dy_columns.values):
        return _tilewise(x_columns, dy_columns, None, total, layer)
    return _added(reference.wgrad(x_columns, dy_columns), total, layer)


def fp8_grouped_matmul(
    x: Tiled,
    weight: Blocked,
    tile_group: Int[Array, " tiles"],
    dtype: jnp.dtype = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "rows n"]:
    """Each tile of rows times the weight of its group."""
    if _takes_kernel(implementation, x.values, weight.transposed, x.values.shape[0] // tile_group.shape[0]):
        return _blockwise(x, weight.transposed, weight.transposed_scales, dtype, tile_group)
    return reference.grouped_matmul(x, weight, tile_group).astype(dtype)


def fp8_grouped_matmul_transposed(
    dy: Tiled,
    weight: Blocked,
    tile_group: Int[Array, " tiles"],
    dtype: jnp.dtype = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "rows k"]:
    """Each tile of rows times the transposed weight of its group: the gradient of the rows."""
    if _takes_kernel(implementation, dy.values, weight.values, dy.values.shape[0] // tile_group.shape[0]):
        return _blockwise(dy, weight.values, weight.scales, dtype, tile_group)
    return reference.grouped_matmul_transposed(dy, weight, tile_group).astype(dtype)


def fp8_grouped_wgrad(
    x_columns: Tiled,
    dy_columns: Tiled,
    tile_group: Int[Array, " tiles"],
    groups: int,
    total: Float[Array, "*layers groups k n"] | None = None,
    layer: Int[Array, ""] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*layers groups k n"]:
    """x^T @ dy of each group's rows in float32: the gradient of the weights. Added as `fp8_wgrad` adds."""
    tile = x_columns.values.shape[1] // tile_group.shape[0]
    if _takes_kernel(implementation, x_columns.values, dy_columns.values, tile):
        return _tilewise(x_columns, dy_columns, group_bounds(tile_group, groups), total, layer)
    return _added(reference.grouped_wgrad(x_columns, dy_columns, tile_group, groups), total, layer)


def fp8_grouped_wgrad_with_squares(
    x_columns: Tiled,
    dy_columns: Tiled,
    tile_group: Int[Array, " tiles"],
    groups: int,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "groups k n"], Float[Array, " groups"]]:
    """`fp8_grouped_wgrad`, and the sum of the squares of each group's gradient, which the kernel has in registers."""
    tile = x_columns.values.shape[1] // tile_group.shape[0]
    if _takes_kernel(implementation, x_columns.values, dy_columns.values, tile):
        return _sum_over_tokens(x_columns, dy_columns, group_bounds(tile_group, groups), squares=True)
    dw = reference.grouped_wgrad(x_columns, dy_columns, tile_group, groups)
    return dw, jnp.sum(dw * dw, axis=(1, 2))


def _takes_kernel(implementation: Implementation | None, a: Array, b: Array, tile: int = TILE) -> bool:
    """Whether the kernel runs, for operands of [rows, k] and [..., rows, k], grouped in tiles of `tile` rows."""
    odd = next((rows for rows in (a.shape[0], b.shape[-2]) if rows % 8), None)
    return takes_kernel(
        implementation,
        "FP8 products",
        f"takes operands whose rows are a multiple of 8, not {odd}" if odd else None,
        f"takes groups in tiles of {TILE} rows, not {tile}" if tile != TILE else None,
    )


def _blockwise(
    x: Tiled,
    b: Array,
    scales: Array,
    dtype: jnp.dtype,
    tile_group: Int[Array, " tiles"] | None = None,
) -> Array:
    shape = (x.values.shape[0], b.shape[-2], x.values.shape[1])
    return mosaic_gpu.matmul(
        _whole_tiles(x.values),
        x.scales,
        _whole_tiles(b),
        scales,
        config=config_for("matmul" if tile_group is None else "grouped_matmul", *shape),
        tile_group=tile_group,
        dtype=dtype,
        num_sms=multiprocessors(),
    )


def _added(dw: Array, total: Array | None, layer: Array | None) -> Array:
    _refuse_layer_of_nothing(total, layer)
    if total is None:
        return dw
    return total + dw if layer is None else total.at[layer].add(dw)


def _refuse_layer_of_nothing(total: Array | None, layer: Array | None) -> None:
    if total is None and layer is not None:
        raise ValueError("layer is an element of total, which is None: give the total that is added to")


def _tilewise(
    x: Tiled, dy: Tiled, bounds: Int[Array, " groups_and_1"] | None, total: Array | None, layer: Array | None
) -> Array:
    _refuse_layer_of_nothing(total, layer)
    groups = 1 if bounds is None else bounds.shape[0] - 1
    total_of_results = None if total is None else total.reshape(-1, *total.shape[-2:])
    first = None if layer is None else layer * groups
    results = _sum_over_tokens(x, dy, bounds, total=total_of_results, first=first)
    if total is not None:
        return results.reshape(total.shape)
    return results[0] if bounds is None else results


def _sum_over_tokens(x: Tiled, dy: Tiled, bounds: Int[Array, " groups_and_1"] | None, **options: Any) -> Any:
    """`mosaic_gpu.wgrad` in the cut for these shapes."""
    groups = 1 if bounds is None else bounds.shape[0] - 1
    shape = (x.values.shape[0], dy.values.shape[0], x.values.shape[1] // groups)
    config = config_for("wgrad" if bounds is None else "grouped_wgrad", *shape, groups)
    operands = _whole_tiles(x.values), x.scales, _whole_tiles(dy.values), dy.scales, bounds
    return mosaic_gpu.wgrad(*operands, config=config, num_sms=multiprocessors(), **options)


def _whole_tiles(values: Array) -> Array:
    """Zeros up to a multiple of 128 columns, which the copy engine asks for; most widths are one."""
    pad = -values.shape[-1] % TILE
    if not pad:
        return values
    return jax.lax.pad(values, jnp.zeros((), values.dtype), [(0, 0, 0)] * (values.ndim - 1) + [(0, pad, 0)])
