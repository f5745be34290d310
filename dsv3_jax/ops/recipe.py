"""How the products of an FP8 linear take their operands: the report's recipe (3.3), and the variants to study it by.

Everything that computes with FP8 weights goes through the `Recipe` that the weights carry.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.fp8_matmul import api, study
from dsv3_jax.ops.quantize import (
    Blocked,
    SwiGLUBackward,
    Tiled,
    dequantize,
    quantize_both,
    quantize_columns,
    retile,
    swiglu_quantize_backward,
)


@dataclass(frozen=True)
class Recipe:
    """The report's recipe by default. The variants run in plain jnp and are for experiments.

    Dense and grouped products share a method: `tile_group` None is one group of all rows.
    """

    gradient_tiles: Literal["tiles", "blocks"] = "tiles"
    """Output gradients in 1x128 tiles, or in 128x128 blocks, with which the report saw training diverge (B.2)."""
    accumulator: study.Accumulator | None = None
    """How the products sum; None is the kernels' way: in float32, promoted every 128 (3.3.2)."""

    def gradient(self, dy: Float[Array, "rows n"]) -> tuple[Tiled, Tiled]:
        """An output gradient in tiles along the features and, transposed, along the rows."""
        if self.gradient_tiles == "blocks":
            return study.quantize_both_by_block(dy)
        return quantize_both(dy)

    def received_gradient(self, arrived: Tiled, dy: Tiled, arrived_of: Int[Array, " rows"]) -> tuple[Tiled, Tiled]:
        """`gradient` of what came over the network in tiles, `arrived`, and was sorted: each row of `dy` is that of its
        `arrived_of`."""
        if self.gradient_tiles == "blocks":
            return self.gradient(dequantize(dy))
        return dy, retile(arrived, arrived_of)

    def matmul(
        self, x: Tiled, weight: Blocked, tile_group: Int[Array, " tiles"] | None, dtype: jnp.dtype
    ) -> Float[Array, "rows n"]:
        """x @ weight: the forward product."""
        op, how = self._implementation()
        if tile_group is None:
            return op.fp8_matmul(x, weight, dtype, **how)
        return op.fp8_grouped_matmul(x, weight, tile_group, dtype, **how)

    def matmul_transposed(
        self, dy: Tiled, weight: Blocked, tile_group: Int[Array, " tiles"] | None, dtype: jnp.dtype
    ) -> Float[Array, "rows k"]:
        """dy @ weight^T: the gradient of the input."""
        op, how = self._implementation()
        if tile_group is None:
            return op.fp8_matmul_transposed(dy, weight, dtype, **how)
        return op.fp8_grouped_matmul_transposed(dy, weight, tile_group, dtype, **how)

    def wgrad(
        self, groups: int | None, x_columns: Tiled, dy_columns: Tiled, tile_group: Int[Array, " tiles"] | None
    ) -> Float[Array, "*groups k n"]:
        """x^T @ dy in float32: the gradient of the weight, or of those of `groups` groups."""
        op, how = self._implementation()
        if tile_group is None:
            return op.fp8_wgrad(x_columns, dy_columns, **how)
        return op.fp8_grouped_wgrad(x_columns, dy_columns, tile_group, groups, **how)

    def wgrad_with_squares(
        self, groups: int, x_columns: Tiled, dy_columns: Tiled, tile_group: Int[Array, " tiles"]
    ) -> tuple[Float[Array, "groups k n"], Float[Array, " groups"]]:
        """`wgrad` of groups, and the sum of the squares of each group's: by the kernel, where it runs. Not of a variant
        that sums in another way."""
        return api.fp8_grouped_wgrad_with_squares(x_columns, dy_columns, tile_group, groups)

    def add_wgrad(
        self,
        groups: int | None,
        total: Float[Array, "layers *groups k n"],
        layer: Int[Array, ""],
        x_columns: Tiled,
        dy_columns: Tiled,
        tile_group: Int[Array, " tiles"] | None,
    ) -> Float[Array, "layers *groups k n"]:
        """`total`, to whose element `layer` `wgrad` is added: by the kernels, where they run. Not of a variant that
        sums in another way."""
        if tile_group is None:
            return api.fp8_wgrad(x_columns, dy_columns, total, layer)
        return api.fp8_grouped_wgrad(x_columns, dy_columns, tile_group, groups, total, layer)

    def swiglu_backward(
        self, hidden: Tiled, d_out: Float[Array, "rows ff"], weights: Float[Array, " rows"] | None
    ) -> SwiGLUBackward:
        """See `swiglu_quantize_backward`."""
        if self.gradient_tiles == "tiles":
            return swiglu_quantize_backward(hidden, d_out, weights)
        out, pullback = jax.vjp(_weighted_swiglu, dequantize(hidden), weights)
        d_hidden, d_weights = pullback(d_out.astype(jnp.float32))
        return SwiGLUBackward(*self.gradient(d_hidden), quantize_columns(out), d_weights)

    def _implementation(self) -> tuple[ModuleType, dict[str, study.Accumulator]]:
        """Where the products are, and what they take besides operands."""
        return (api, {}) if self.accumulator is None else (study, {"accumulator": self.accumulator})


def _weighted_swiglu(hidden: Float[Array, "rows two_ff"], weights: Float[Array, " rows"] | None) -> Array:
    gate, up = jnp.split(hidden, 2, axis=-1)
    out = jax.nn.silu(gate) * up
    return out if weights is None else out * weights[:, None]
