"""Products of FP8 operands with fine-grained scales."""

from dsv3_jax.ops.fp8_matmul.api import (
    fp8_grouped_matmul,
    fp8_grouped_matmul_transposed,
    fp8_grouped_wgrad,
    fp8_grouped_wgrad_with_squares,
    fp8_matmul,
    fp8_matmul_transposed,
    fp8_wgrad,
)

__all__ = [
    "fp8_grouped_matmul",
    "fp8_grouped_matmul_transposed",
    "fp8_grouped_wgrad",
    "fp8_grouped_wgrad_with_squares",
    "fp8_matmul",
    "fp8_matmul_transposed",
    "fp8_wgrad",
]
