"""How the products of an FP8 linear take their operands: the report's recipe (3.3), and the variants to study it by.

Everything that computes with FP8 weights goes through the `Recipe` that the weights carry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.fp8_matmul import (
    fp8_grouped_matmul,
    fp8_grouped_matmul_transposed,
    fp8_grouped_wgrad,
    fp8_matmul,
    fp8_matmul_transposed,
    fp8_wgrad,
)
from dsv3_jax.ops.quantize import (
    TILE,
    Blocked,
    SwiGLUBackward,
    Tiled,
    dequantize,
    quantize_blocks,
    quantize_both,
    quantize_columns,
    retile,
    swiglu_quantize_backward,
)

Accumulator = Callable[[Tiled, Tiled], Float[Array, "m n"]]
"""From operands [m, k] and [n, k], both reduced over their last axis, to the product in float32."""


@dataclass(frozen=True)
class Recipe:
    """The report's recipe by default. The variants run in plain jnp and are for experiments.

    Dense and grouped products share a method: `tile_group` None is one group of all rows.
    """

    gradient_tiles: Literal["tiles", "blocks"] = "tiles"
    """Output gradients in 1x128 tiles, or in 128x128 blocks, with which the report saw training diverge (B.2)."""
    accumulator: Accumulator | None = None
    """How the products sum; None is the kernels' way: in float32, promoted every 128 (3.3.2)."""

    def gradient(self, dy: Float[Array, "rows n"]) -> tuple[Tiled, Tiled]:
        """An output gradient in tiles along the features and, transposed, along the rows."""
        if self.gradient_tiles == "blocks":
            blocks = quantize_blocks(dy)
            return _transposed_operand(blocks), _forward_operand(blocks)
        return quantize_both(dy)

    def received_gradient(self, dy: Tiled) -> tuple[Tiled, Tiled]:
        """`gradient` of what came over the network in tiles."""
        if self.gradient_tiles == "blocks":
            return self.gradient(dequantize(dy))
        return dy, retile(dy)

    def matmul(
        self, x: Tiled, weight: Blocked, tile_group: Int[Array, " tiles"] | None, dtype: jnp.dtype
    ) -> Float[Array, "rows n"]:
        """x @ weight: the forward product."""
        if self.accumulator is not None:
            return self._accumulated(x, _forward_operand(weight), tile_group).astype(dtype)
        if tile_group is None:
            return fp8_matmul(x, weight, dtype)
        return fp8_grouped_matmul(x, weight, tile_group, dtype)

    def matmul_transposed(
        self, dy: Tiled, weight: Blocked, tile_group: Int[Array, " tiles"] | None, dtype: jnp.dtype
    ) -> Float[Array, "rows k"]:
        """dy @ weight^T: the gradient of the input."""
        if self.accumulator is not None:
            return self._accumulated(dy, _transposed_operand(weight), tile_group).astype(dtype)
        if tile_group is None:
            return fp8_matmul_transposed(dy, weight, dtype)
        return fp8_grouped_matmul_transposed(dy, weight, tile_group, dtype)

    def wgrad(
        self, x_columns: Tiled, dy_columns: Tiled, weight: Blocked, tile_group: Int[Array, " tiles"] | None
    ) -> Float[Array, "*groups k n"]:
        """x^T @ dy in float32: the gradient of the weight."""
        if tile_group is None:
            product = self.accumulator or fp8_wgrad
            return product(x_columns, dy_columns)
        groups = weight.values.shape[0]
        if self.accumulator is None:
            return fp8_grouped_wgrad(x_columns, dy_columns, tile_group, groups)
        per_tile = jax.vmap(self.accumulator)(*(_column_tiles(x, len(tile_group)) for x in (x_columns, dy_columns)))
        member = (jnp.arange(groups)[:, None] == tile_group).astype(jnp.float32)
        return jnp.einsum("gt,tkn->gkn", member, per_tile, precision="highest")

    def swiglu_backward(
        self, hidden: Tiled, d_out: Float[Array, "rows ff"], weights: Float[Array, " rows"] | None
    ) -> SwiGLUBackward:
        """See `swiglu_quantize_backward`."""
        if self.gradient_tiles == "tiles":
            return swiglu_quantize_backward(hidden, d_out, weights)
        out, pullback = jax.vjp(_weighted_swiglu, dequantize(hidden), weights)
        d_hidden, d_weights = pullback(d_out.astype(jnp.float32))
        return SwiGLUBackward(*self.gradient(d_hidden), quantize_columns(out), d_weights)

    def _accumulated(self, x: Tiled, operand: Tiled, tile_group: Int[Array, " tiles"] | None) -> Float[Array, "rows n"]:
        if tile_group is None:
            return self.accumulator(x, operand)
        per_tile = jax.tree.map(lambda part: part[tile_group], operand)
        return jax.vmap(self.accumulator)(_row_tiles(x, len(tile_group)), per_tile).reshape(len(x.values), -1)


def _forward_operand(weight: Blocked) -> Tiled:
    """A weight as the second operand of the forward product: [n, k] in tiles along k."""
    scales = jnp.repeat(weight.scales, TILE, axis=-1)[..., : weight.values.shape[-1]]
    return Tiled(weight.transposed, scales)


def _transposed_operand(weight: Blocked) -> Tiled:
    """A weight as the second operand of the input gradient: [k, n] in tiles along n."""
    scales = jnp.repeat(jnp.swapaxes(weight.scales, -1, -2), TILE, axis=-1)[..., : weight.values.shape[-2]]
    return Tiled(weight.values, scales)


def _row_tiles(x: Tiled, tiles: int) -> Tiled:
    """Stacked operands, one for each tile of rows."""
    values = x.values.reshape(tiles, -1, x.values.shape[1])
    return Tiled(values, jnp.swapaxes(x.scales.reshape(len(x.scales), tiles, -1), 0, 1))


def _column_tiles(x: Tiled, tiles: int) -> Tiled:
    """Stacked operands [features, 128], one for each tile of rows, of tiles along the rows."""
    values = jnp.swapaxes(x.values.reshape(len(x.values), tiles, -1), 0, 1)
    return Tiled(values, x.scales[:, None])


def _weighted_swiglu(hidden: Float[Array, "rows two_ff"], weights: Float[Array, " rows"] | None) -> Array:
    gate, up = jnp.split(hidden, 2, axis=-1)
    out = jax.nn.silu(gate) * up
    return out if weights is None else out * weights[:, None]
