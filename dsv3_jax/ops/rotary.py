"""Rotation of interleaved pairs by the angles of their positions (report 2.1.1)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

Rotations = tuple[Float[Array, "seq pairs"], Float[Array, "seq pairs"]]
"""cos and sin of every position and pair, float32."""


def rotate(
    x: Float[Array, "*batch rope"], cos: Float[Array, "*batch pairs"], sin: Float[Array, "*batch pairs"]
) -> Float[Array, "*batch rope"]:
    """Rotate the pairs (x0, x1), (x2, x3) ... by the given angles, computed in float32."""
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def rotate_heads(x: Float[Array, "batch seq heads rope"], rotations: Rotations) -> Float[Array, "batch seq heads rope"]:
    """Rotate all heads of a position alike."""
    cos, sin = rotations
    return rotate(x, cos[..., None, :], sin[..., None, :])
