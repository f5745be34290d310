"""Fine-grained FP8 quantization: picks an implementation (report 3.3)."""

from jaxtyping import Array, Float

from dsv3_jax.ops.quantize import reference
from dsv3_jax.ops.quantize.formats import Blocked, SwiGLUBackward, Tiled


def quantize_rows(x: Float[Array, "rows k"], power_of_2: bool = False) -> Tiled:
    """1x128 tiles along the last axis: an operand of the forward product, or of the input gradient."""
    return reference.quantize_rows(x, power_of_2)


def quantize_columns(x: Float[Array, "rows k"], power_of_2: bool = False) -> Tiled:
    """128x1 tiles, as tiles of the transpose [k, rows]: an operand of the weight gradient."""
    return reference.quantize_columns(x, power_of_2)


def quantize_both(x: Float[Array, "rows k"]) -> tuple[Tiled, Tiled]:
    """`quantize_rows` and `quantize_columns` of one reading of x, as an output gradient needs."""
    return reference.quantize_rows(x), reference.quantize_columns(x)


def quantize_blocks(weight: Float[Array, "*groups k n"]) -> Blocked:
    """A weight in 128x128 blocks, in both layouts."""
    return reference.quantize_blocks(weight)


def retile(x: Tiled) -> Tiled:
    """From tiles along the features to tiles along the rows, [k, rows], as the weight gradient needs a kept input."""
    return reference.retile(x)


def rms_norm_quantize(
    x: Float[Array, "rows d"], gain: Float[Array, " d"], eps: float
) -> tuple[Float[Array, "rows d"], Tiled]:
    """RMSNorm of the rows in the type of x, and that in 1x128 tiles."""
    return reference.rms_norm_quantize(x, gain, eps)


def swiglu_quantize(hidden: Float[Array, "rows two_ff"], weights: Float[Array, " rows"] | None) -> tuple[Tiled, Tiled]:
    """`hidden` in 1x128 tiles, to keep, and its weighted SwiGLU in 1x128 tiles, for the down projection."""
    return reference.swiglu_quantize(hidden, weights)


def swiglu_quantize_backward(
    hidden: Tiled, d_out: Float[Array, "rows ff"], weights: Float[Array, " rows"] | None
) -> SwiGLUBackward:
    """What the backward pass of a SwiGLU between two FP8 products needs, from the kept `hidden`."""
    return reference.swiglu_quantize_backward(hidden, d_out, weights)
