"""Tensors in FP8 with fine-grained scales."""

from dsv3_jax.ops.quantize.api import (
    quantize_blocks,
    quantize_both,
    quantize_columns,
    quantize_columns_through_e5m6,
    quantize_rows,
    retile,
    rms_norm_quantize,
    swiglu_quantize,
    swiglu_quantize_backward,
)
from dsv3_jax.ops.quantize.formats import E4M3, TILE, Blocked, SwiGLUBackward, Tiled, blocked
from dsv3_jax.ops.quantize.reference import dequantize, dequantize_blocks, dequantize_e5m6, quantize_e5m6

__all__ = [
    "E4M3",
    "TILE",
    "Blocked",
    "SwiGLUBackward",
    "Tiled",
    "blocked",
    "dequantize",
    "dequantize_blocks",
    "dequantize_e5m6",
    "quantize_blocks",
    "quantize_both",
    "quantize_columns",
    "quantize_columns_through_e5m6",
    "quantize_e5m6",
    "quantize_rows",
    "retile",
    "rms_norm_quantize",
    "swiglu_quantize",
    "swiglu_quantize_backward",
]
