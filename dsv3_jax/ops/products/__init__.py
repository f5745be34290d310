"""Products of 16-bit operands whose result is float32."""

from dsv3_jax.ops.products.api import matmul_f32, transposed_matmul_f32

__all__ = ["matmul_f32", "transposed_matmul_f32"]
