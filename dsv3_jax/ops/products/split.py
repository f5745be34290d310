"""Float32's precision from 16-bit products: a float32 operand is a sum of three bfloat16 ones.

Matrix instructions multiply 16-bit numbers exactly and sum in float32; GPUs do float32 products themselves at a
fifteenth of the speed.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float


@jax.custom_vjp
def matmul_split(x: BFloat16[Array, "*batch m k"], w: Float[Array, "k n"]) -> Float[Array, "*batch m n"]:
    """x @ w in float32, w being float32 itself and not rounded. So is w's gradient; that of x is rounded to its type,
    from products that keep 16 bits of both operands."""
    return _sum_of_parts(jnp.matmul(x, _side_by_side(w, 3), preferred_element_type=jnp.float32), 3)


def _fwd(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul_split(x, w), (x, w)


def _bwd(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = residuals
    high, low = _parts(dy, 2)
    w_high, w_low = _parts(w, 2)
    left = jnp.concatenate([low, high, high], axis=-1)
    right = jnp.concatenate([w_high, w_low, w_high], axis=-1)
    dx = jnp.einsum("...n,kn->...k", left, right, preferred_element_type=jnp.float32)
    dw = jnp.einsum("...k,...n->kn", x, _side_by_side(dy, 3), preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), _sum_of_parts(dw, 3)


matmul_split.defvjp(_fwd, _bwd)


def _parts(x: Float[Array, "*shape"], count: int) -> list[BFloat16[Array, "*shape"]]:
    """Bfloat16 numbers whose sum is x, to 8 bits of it for each, the largest first."""
    parts = []
    for _ in range(count):
        # Said so, since a compiler may take a rounding by conversion and back for excess precision.
        rounded = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(rounded.astype(jnp.bfloat16))
        x = x - rounded
    return parts


def _side_by_side(x: Float[Array, "*batch n"], count: int) -> BFloat16[Array, "*batch parts_n"]:
    return jnp.concatenate(_parts(x, count), axis=-1)


def _sum_of_parts(y: Float[Array, "*batch parts_n"], count: int) -> Float[Array, "*batch n"]:
    """Smallest first."""
    return sum(reversed(jnp.split(y, count, axis=-1)))
