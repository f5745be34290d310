"""SwiGLU between two projections."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.checkpoint, prevent_cse=False)
def swiglu(
    gate_up: Float[Array, "*batch two_ff"], weights: Float[Array, "*batch 1"] | None = None
) -> Float[Array, "*batch ff"]:
    """silu(gate) * up, of the two halves of the last axis, times the rows' weights where there are any; computed in
    float32, in the type of gate_up. The backward pass keeps the inputs and computes all else again (report 3.2.3)."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    hidden = jax.nn.silu(gate) * up
    return (hidden if weights is None else hidden * weights).astype(gate_up.dtype)
