"""Products of 16-bit operands, accumulated and returned in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def matmul_f32(a: Float[Array, "*batch m k"], b: Float[Array, "*batch k n"]) -> Float[Array, "*batch m n"]:
    """a @ b in float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def transposed_matmul_f32(a: Float[Array, "*batch m k"], b: Float[Array, "*batch m n"]) -> Float[Array, "*batch k n"]:
    """a^T @ b in float32, as weight gradients need it."""
    if jax.default_backend() == "cpu" and a.dtype == jnp.bfloat16:
        return matmul_f32(_transposed_by_product(a), b)
    return jnp.einsum("...mk,...mn->...kn", a, b, preferred_element_type=jnp.float32)


def _transposed_by_product(x: Float[Array, "*batch m k"]) -> Float[Array, "*batch k m"]:
    """x^T as I x^T, which is exact.

    XLA's CPU backend has matrix instructions for 16-bit products whose left side is contracted over its last axis, and
    a slow loop for all others and for the transpose: this is two to five times faster than either.
    """
    identity = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), (*x.shape[:-2], x.shape[-1], x.shape[-1]))
    return jnp.einsum("...ij,...mj->...im", identity, x)
