"""SwiGLU between two projections. Its backward pass keeps the inputs and computes all else again (report 3.2.3)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def swiglu(
    gate_up: Float[Array, "*batch two_ff"], weights: Float[Array, "*batch 1"] | None = None
) -> Float[Array, "*batch ff"]:
    """silu(gate) * up, of the two halves of the last axis, times the rows' weights where there are any; computed in
    float32, in the type of gate_up."""
    gate, up = _halves(gate_up)
    hidden = jax.nn.silu(gate) * up
    return (hidden if weights is None else hidden * weights).astype(gate_up.dtype)


def _halves(gate_up: Array) -> tuple[Array, Array]:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return gate.astype(jnp.float32), up.astype(jnp.float32)


def _forward(gate_up: Array, weights: Array | None) -> tuple[Array, tuple[Array, Array | None]]:
    return swiglu(gate_up, weights), (gate_up, weights)


def _backward(residuals: tuple[Array, Array | None], d_out: Array) -> tuple[Array, Array | None]:
    gate_up, weights = residuals
    gate, up = _halves(gate_up)
    sigmoid = jax.nn.sigmoid(gate)
    d_hidden = d_out.astype(jnp.float32)
    d_weights = None
    if weights is not None:
        d_weights = (d_hidden * (gate * sigmoid * up)).sum(axis=-1, keepdims=True)
        d_hidden = d_hidden * weights
    d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = d_hidden * gate * sigmoid
    # Rounded before they are joined, not after: XLA's CPU backend writes what it joins.
    return jnp.concatenate([d_gate.astype(gate_up.dtype), d_up.astype(gate_up.dtype)], axis=-1), d_weights


swiglu.defvjp(_forward, _backward)
