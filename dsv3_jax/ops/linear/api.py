"""Linear layers and the embedding lookup, for plain and for mixed-precision weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.products import transposed_matmul_f32
from dsv3_jax.ops.weights import MixedWeight, Weight


def linear(x: Float[Array, "*batch k"], weight: Weight) -> Float[Array, "*batch n"]:
    """x @ weight in the type of x, accumulated in float32; weight is [k, n].

    The gradient of a `MixedWeight` is computed and returned in float32 (report 3.3.1).
    """
    if isinstance(weight, MixedWeight):
        return _mixed_linear(x, weight.value, weight.slot)
    return jnp.matmul(x, weight.astype(x.dtype))


@jax.custom_vjp
def _mixed_linear(x: Array, value: Array, slot: Array) -> Array:
    return jnp.matmul(x, value)


def _mixed_linear_fwd(x: Array, value: Array, slot: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.matmul(x, value), (x, value)


def _mixed_linear_bwd(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, None, Array]:
    x, value = residuals
    dx = jnp.einsum("...n,kn->...k", dy, value)
    rows, grads = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dx, None, transposed_matmul_f32(rows, grads)


_mixed_linear.defvjp(_mixed_linear_fwd, _mixed_linear_bwd)


def embedding_lookup(tokens: Int[Array, "*batch"], table: Weight) -> Float[Array, "*batch d_model"]:
    """Rows of a [vocab, d_model] table; a `MixedWeight`'s gradient is summed in float32."""
    if isinstance(table, MixedWeight):
        return _mixed_lookup(tokens, table.value, table.slot)
    return table[tokens]


@jax.custom_vjp
def _mixed_lookup(tokens: Array, value: Array, slot: Array) -> Array:
    return value[tokens]


def _mixed_lookup_fwd(tokens: Array, value: Array, slot: Array) -> tuple[Array, tuple[Array, Array]]:
    return value[tokens], (tokens, slot)


def _mixed_lookup_bwd(residuals: tuple[Array, Array], dy: Array) -> tuple[None, None, Array]:
    tokens, slot = residuals
    return None, None, jnp.zeros_like(slot).at[tokens].add(dy.astype(jnp.float32))


_mixed_lookup.defvjp(_mixed_lookup_fwd, _mixed_lookup_bwd)
