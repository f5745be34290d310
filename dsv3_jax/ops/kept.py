"""Naming what a recomputing backward pass keeps."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from dsv3_jax.ops.quantize import E4M3


def keep_bits(x: Array, name: str) -> Array:
    """`checkpoint_name` that keeps 8-bit floats as bytes.

    jax.checkpoint passes the floats that it keeps through `reduce_precision`, which knows a type by its numbers of
    bits alone: with 4 of exponent and 3 of mantissa it has no values above 240, and makes e4m3fn's, which go to 448,
    NaN.
    """
    if x.dtype != E4M3:
        return checkpoint_name(x, name)
    return jax.lax.bitcast_convert_type(checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint8), name), E4M3)
