"""Products of 16-bit operands whose result is float32."""

from dsv3_jax.ops.products.api import einsum_f32, matmul_f32

__all__ = ["einsum_f32", "matmul_f32"]
