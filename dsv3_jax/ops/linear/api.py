"""Linear layers and the embedding lookup, for plain, mixed-precision and FP8 weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.linear.fp8 import FP8Rows, fp8_linear, fp8_linear_after_attention
from dsv3_jax.ops.products import transposed_matmul_f32
from dsv3_jax.ops.weights import FP8Weight, Logs, MixedWeight, Weight, WeightProduct, conclude


def linear(x: Float[Array, "*batch k"] | FP8Rows, weight: Weight) -> Float[Array, "*batch n"]:
    """x @ weight in the type of x, accumulated in float32; weight is [k, n].

    The gradient of a `MixedWeight` or `FP8Weight` is computed and returned in float32 (report 3.3.1). `FP8Rows` are
    for an `FP8Weight` only.
    """
    if isinstance(weight, FP8Weight):
        return fp8_linear(x, weight)
    if isinstance(weight, MixedWeight):
        return _mixed_linear(x, weight)
    return jnp.matmul(x, weight.astype(x.dtype))


def linear_after_attention(x: Float[Array, "*batch k"], weight: Weight) -> Float[Array, "*batch n"]:
    """`linear` of attention's output, which under FP8 keeps its input more precisely (report 3.3.3)."""
    return fp8_linear_after_attention(x, weight) if isinstance(weight, FP8Weight) else linear(x, weight)


@jax.custom_vjp
def _mixed_linear(x: Array, weight: MixedWeight) -> Array:
    return jnp.matmul(x, weight.value)


def _mixed_linear_fwd(x: Array, weight: MixedWeight) -> tuple[Array, tuple[Array, MixedWeight]]:
    return jnp.matmul(x, weight.value), (x, replace(weight, slot=None))


def _mixed_linear_bwd(residuals: tuple[Array, MixedWeight], dy: Array) -> tuple[tuple[Array, MixedWeight], Logs]:
    x, weight = residuals
    dx = jnp.einsum("...n,kn->...k", dy, weight.value)
    rows, grads = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dw, logs = conclude(weight, WeightProduct((rows, grads), transposed_matmul_f32))
    return (dx, dw), logs


_mixed_linear.defvjp_with_logs(_mixed_linear_fwd, _mixed_linear_bwd)


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
