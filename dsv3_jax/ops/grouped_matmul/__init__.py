"""One matrix product per group of rows."""

from dsv3_jax.ops.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
