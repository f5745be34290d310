"""Grouped matrix products as one batched product over row tiles.

`lax.ragged_dot` computes every group for every row where it has no kernel; here each tile meets one group's weight.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.products import transposed_matmul_f32


def grouped_forward(
    x: Float[Array, "rows k"], weight: Float[Array, "groups k n"], tile_group: Int[Array, " tiles"]
) -> Float[Array, "rows n"]:
    """Each tile of rows times the weight of its group."""
    tiles = x.reshape(tile_group.shape[0], -1, x.shape[-1])
    return jnp.einsum("tmk,tkn->tmn", tiles, weight[tile_group]).reshape(x.shape[0], -1)


def grouped_dgrad(
    dy: Float[Array, "rows n"], weight: Float[Array, "groups k n"], tile_group: Int[Array, " tiles"]
) -> Float[Array, "rows k"]:
    """Gradient of the rows."""
    tiles = dy.reshape(tile_group.shape[0], -1, dy.shape[-1])
    return jnp.einsum("tmn,tkn->tmk", tiles, weight[tile_group]).reshape(dy.shape[0], -1)


def grouped_wgrad(
    x: Float[Array, "rows k"], dy: Float[Array, "rows n"], tile_group: Int[Array, " tiles"], groups: int
) -> Float[Array, "groups k n"]:
    """Gradient of the weights in float32: each group's tiles summed. A group without rows gets zero.

    The sum is a product with a 0/1 matrix: a scatter of this size takes XLA minutes to compile for a GPU.
    """
    tiles = tile_group.shape[0]
    rows, grads = (y.reshape(tiles, -1, y.shape[-1]) for y in (x, dy))
    per_tile = transposed_matmul_f32(rows, grads)
    member = (jnp.arange(groups)[:, None] == tile_group).astype(jnp.float32)
    return jnp.einsum("gt,tkn->gkn", member, per_tile, precision="highest")
