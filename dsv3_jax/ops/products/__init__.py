"""Products of 16-bit operands whose result is float32."""

from dsv3_jax.ops.products.api import matmul_f32, transposed_matmul_f32
from dsv3_jax.ops.products.split import matmul_split

__all__ = ["matmul_f32", "matmul_split", "transposed_matmul_f32"]
