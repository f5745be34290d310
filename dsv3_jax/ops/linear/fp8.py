"""Linear layers whose three products are in FP8 (report 3.3)."""

from dataclasses import dataclass, replace

import jax
from jaxtyping import Array, Float

from dsv3_jax.ops.quantize import (
    Tiled,
    quantize_columns_through_e5m6,
    quantize_rows,
    retile,
)
from dsv3_jax.ops.weights import FP8Weight, Logs, conclude_fp8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FP8Rows:
    """The input of FP8 linears: quantized once for all that read it, and none of them keeps the 16-bit value."""

    tiles: Tiled
    """[rows, k], the batch dimensions flattened."""
    source: Float[Array, "*batch k"]
    """What the tiles were made of, or what stands in for it. A linear never reads it; its gradient is the input's."""


def quantize_input(x: Float[Array, "*batch k"], power_of_2: bool = False) -> FP8Rows:
    """x in 1x128 tiles; with power-of-two scales where it will travel (report 3.3.3)."""
    # Stopped before, not after: kernels have no derivative.
    return FP8Rows(quantize_rows(_flat(jax.lax.stop_gradient(x)), power_of_2), x)


def fp8_linear(x: Float[Array, "*batch k"] | FP8Rows, weight: FP8Weight) -> Float[Array, "*batch n"]:
    """x @ weight in the type of x. Keeps the tiles of x, and turns them to run along the rows in the backward pass."""
    return _linear(x if isinstance(x, FP8Rows) else quantize_input(x), weight)


@jax.custom_vjp
def fp8_linear_after_attention(x: Float[Array, "*batch k"], weight: FP8Weight) -> Float[Array, "*batch n"]:
    """`fp8_linear` whose weight gradient reads the input in E5M6, since attention's backward pass is sensitive to it
    (report 3.3.3). What it keeps is attention's output, which attention's backward pass reads too; E5M6 beside it, also
    in 16 bits, would be a second copy."""
    return _product(quantize_rows(_flat(x)), x, weight)


@jax.custom_vjp
def _linear(x: FP8Rows, weight: FP8Weight) -> Array:
    return _product(x.tiles, x.source, weight)


def _linear_fwd(x: FP8Rows, weight: FP8Weight) -> tuple[Array, tuple[Tiled, FP8Weight]]:
    return _product(x.tiles, x.source, weight), (x.tiles, replace(weight, slot=None))


def _linear_bwd(residuals: tuple[Tiled, FP8Weight], dy: Array) -> tuple[tuple[FP8Rows, FP8Weight], Logs]:
    tiles, weight = residuals
    dx, dw, logs = _gradients(retile(tiles), dy, weight)
    return (FP8Rows(None, dx), dw), logs


_linear.defvjp_with_logs(_linear_fwd, _linear_bwd)


def _after_attention_fwd(x: Array, weight: FP8Weight) -> tuple[Array, tuple[Array, FP8Weight]]:
    return _product(quantize_rows(_flat(x)), x, weight), (x, replace(weight, slot=None))


def _after_attention_bwd(residuals: tuple[Array, FP8Weight], dy: Array) -> tuple[tuple[Array, FP8Weight], Logs]:
    x, weight = residuals
    dx, dw, logs = _gradients(quantize_columns_through_e5m6(_flat(x)), dy, weight)
    return (dx, dw), logs


fp8_linear_after_attention.defvjp_with_logs(_after_attention_fwd, _after_attention_bwd)


def _product(tiles: Tiled, like: Array, weight: FP8Weight) -> Array:
    y = weight.recipe.matmul(tiles, weight.value, None, like.dtype)
    return y.reshape(*like.shape[:-1], -1)


def _gradients(x_columns: Tiled, dy: Array, weight: FP8Weight) -> tuple[Array, FP8Weight, Logs]:
    """Of the input, in the type of dy, and of the weight, in float32 or as what is logged."""
    dy_rows, dy_columns = weight.recipe.gradient(_flat(dy))
    dx = weight.recipe.matmul_transposed(dy_rows, weight.value, None, dy.dtype)
    dw, logs = conclude_fp8(weight, x_columns, dy_columns)
    return dx.reshape(*dy.shape[:-1], -1), dw, logs


def _flat(x: Array) -> Float[Array, "rows k"]:
    return x.reshape(-1, x.shape[-1])
