"""The three products of an FP8 linear, dense and grouped: picks an implementation (report 3.3).

Grouped rows come in tiles sorted by group (`ops.permute.assign_slots`); tiles of `tile_group` beyond the last used one
hold nothing, and neither do the same rows of the result.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.fp8_matmul import reference
from dsv3_jax.ops.quantize.formats import Blocked, Tiled


def fp8_matmul(x: Tiled, weight: Blocked, dtype: jnp.dtype = jnp.bfloat16) -> Float[Array, "rows n"]:
    """x @ weight: the forward product."""
    return reference.matmul(x, weight).astype(dtype)


def fp8_matmul_transposed(dy: Tiled, weight: Blocked, dtype: jnp.dtype = jnp.bfloat16) -> Float[Array, "rows k"]:
    """dy @ weight^T: the gradient of the input."""
    return reference.matmul_transposed(dy, weight).astype(dtype)


def fp8_wgrad(x_columns: Tiled, dy_columns: Tiled, total: Float[Array, "k n"] | None = None) -> Float[Array, "k n"]:
    """x^T @ dy in float32, added to `total` where given: the gradient of the weight."""
    dw = reference.wgrad(x_columns, dy_columns)
    return dw if total is None else total + dw


def fp8_grouped_matmul(
    x: Tiled, weight: Blocked, tile_group: Int[Array, " tiles"], dtype: jnp.dtype = jnp.bfloat16
) -> Float[Array, "rows n"]:
    """Each tile of rows times the weight of its group."""
    return reference.grouped_matmul(x, weight, tile_group).astype(dtype)


def fp8_grouped_matmul_transposed(
    dy: Tiled, weight: Blocked, tile_group: Int[Array, " tiles"], dtype: jnp.dtype = jnp.bfloat16
) -> Float[Array, "rows k"]:
    """Each tile of rows times the transposed weight of its group: the gradient of the rows."""
    return reference.grouped_matmul_transposed(dy, weight, tile_group).astype(dtype)


def fp8_grouped_wgrad(
    x_columns: Tiled,
    dy_columns: Tiled,
    tile_group: Int[Array, " tiles"],
    groups: int,
    total: Float[Array, "groups k n"] | None = None,
) -> Float[Array, "groups k n"]:
    """x^T @ dy of each group's rows in float32, added to `total` where given: the gradient of the weights."""
    dw = reference.grouped_wgrad(x_columns, dy_columns, tile_group, groups)
    return dw if total is None else total + dw
