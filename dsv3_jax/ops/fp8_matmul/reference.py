"""FP8 products in plain jnp: what the kernels compute, with exact float32 sums (report 3.3.2)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.quantize.formats import Blocked, Tiled
from dsv3_jax.ops.quantize.reference import dequantize, dequantize_blocks


def matmul(x: Tiled, weight: Blocked) -> Float[Array, "rows n"]:
    """x @ weight in float32, as the forward pass has it."""
    return jnp.matmul(dequantize(x), dequantize_blocks(weight), precision="highest")


def matmul_transposed(dy: Tiled, weight: Blocked) -> Float[Array, "rows k"]:
    """dy @ weight^T in float32: the gradient of the input."""
    return jnp.einsum("mn,kn->mk", dequantize(dy), dequantize_blocks(weight), precision="highest")


def wgrad(x_columns: Tiled, dy_columns: Tiled) -> Float[Array, "k n"]:
    """x^T @ dy in float32, of operands in tiles along the tokens: [k, tokens] and [n, tokens]."""
    return jnp.einsum("km,nm->kn", dequantize(x_columns), dequantize(dy_columns), precision="highest")


def grouped_matmul(x: Tiled, weight: Blocked, tile_group: Int[Array, " tiles"]) -> Float[Array, "rows n"]:
    """Each tile of rows times the weight of its group, float32."""
    tiles = dequantize(x).reshape(tile_group.shape[0], -1, x.values.shape[1])
    y = jnp.einsum("tmk,tkn->tmn", tiles, dequantize_blocks(weight)[tile_group], precision="highest")
    return y.reshape(x.values.shape[0], -1)


def grouped_matmul_transposed(dy: Tiled, weight: Blocked, tile_group: Int[Array, " tiles"]) -> Float[Array, "rows k"]:
    """Each tile of rows times the transposed weight of its group, float32: the gradient of the rows."""
    tiles = dequantize(dy).reshape(tile_group.shape[0], -1, dy.values.shape[1])
    dx = jnp.einsum("tmn,tkn->tmk", tiles, dequantize_blocks(weight)[tile_group], precision="highest")
    return dx.reshape(dy.values.shape[0], -1)


def grouped_wgrad(
    x_columns: Tiled, dy_columns: Tiled, tile_group: Int[Array, " tiles"], groups: int
) -> Float[Array, "groups k n"]:
    """x^T @ dy of each group's rows in float32; a group without rows gets zero."""
    x, dy = (dequantize(q).reshape(q.values.shape[0], tile_group.shape[0], -1) for q in (x_columns, dy_columns))
    per_tile = jnp.einsum("ktm,ntm->tkn", x, dy, precision="highest")
    member = (jnp.arange(groups)[:, None] == tile_group).astype(jnp.float32)
    return jnp.einsum("gt,tkn->gkn", member, per_tile, precision="highest")
