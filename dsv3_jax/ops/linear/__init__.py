"""The matrix product of every linear, with a float32 weight gradient."""

from dsv3_jax.ops.linear.api import embedding_lookup, linear, linear_after_attention
from dsv3_jax.ops.linear.fp8 import FP8Rows, quantize_input

__all__ = ["FP8Rows", "embedding_lookup", "linear", "linear_after_attention", "quantize_input"]
