"""How 8-bit tensors are stored: values beside the scales that give them their range back (report 3.3.2)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn

from dsv3_jax.ops.tile import TILE

__all__ = ["E4M3", "TILE", "Blocked", "SwiGLUBackward", "Tiled", "blocked"]

E4M3 = jnp.float8_e4m3fn


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiled:
    """A matrix in 1x128 tiles along its last axis, the one a product reduces.

    x[i, j] ~ values[i, j] * scales[j // 128, i]. Scales lie tile by tile, so that a kernel reads those of consecutive
    rows at once.
    """

    values: Float8e4m3fn[Array, "rows k"]
    scales: Float[Array, "tiles rows"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocked:
    """A weight in 128x128 blocks, in both layouts: w[i, j] ~ values[i, j] * scales[i // 128, j // 128].

    `transposed` is the same matrix with its last two axes exchanged, since FP8 products reduce the last axis of both
    operands: the forward pass reads `transposed`, the gradient of the input `values`. The scales come in both layouts
    for the same reason: a kernel reads them along the reduction.
    """

    values: Float8e4m3fn[Array, "*groups k n"]
    transposed: Float8e4m3fn[Array, "*groups n k"]
    scales: Float[Array, "*groups k_blocks n_blocks"]
    transposed_scales: Float[Array, "*groups n_blocks k_blocks"]


def blocked(
    values: Float8e4m3fn[Array, "*groups k n"],
    transposed: Float8e4m3fn[Array, "*groups n k"],
    scales: Float[Array, "*groups k_blocks n_blocks"],
) -> Blocked:
    """A `Blocked` of values in both layouts and scales in one."""
    return Blocked(values, transposed, scales, jnp.swapaxes(scales, -1, -2))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SwiGLUBackward:
    """The operands of the two weight gradients and of the input gradient around a SwiGLU, and the weights' gradient."""

    d_hidden_rows: Tiled
    """Gradient of the gate and up halves, [rows, 2 ff], in tiles along the features."""
    d_hidden_columns: Tiled
    """The same transposed, [2 ff, rows], in tiles along the rows."""
    output_columns: Tiled
    """The SwiGLU's weighted output, transposed, [ff, rows], in tiles along the rows."""
    d_weights: Float[Array, " rows"] | None
    """Gradient of the rows' weights; None where there are none."""
