"""Products of 16-bit operands, accumulated and returned in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def einsum_f32(equation: str, a: Array, b: Array) -> Float[Array, "..."]:
    """einsum of two operands of one type, in float32.

    On CPU, where XLA has no such product of 16-bit operands, they are widened first: the numbers are the same.
    """
    if jax.default_backend() == "cpu":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def matmul_f32(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """a @ b in float32; see `einsum_f32`."""
    return einsum_f32("mk,kn->mn", a, b)
