"""Root-mean-square normalization, into 16 bits or straight into what FP8 linears read."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.ops.linear.fp8 import FP8Rows
from dsv3_jax.ops.quantize import Tiled, rms_norm_quantize


@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(x: Float[Array, "*batch d"], gain: Float[Array, " d"], eps: float) -> Float[Array, "*batch d"]:
    """x over its root mean square, times the gain, computed in float32, in the type of x. The backward pass keeps x and
    computes all else again (report 3.2.3)."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * gain).astype(x.dtype)


def rms_norm_fp8(
    x: Float[Array, "*batch d"], gain: Float[Array, " d"], eps: float, power_of_2: bool = False, keep: bool = False
) -> FP8Rows:
    """`rms_norm` in the 1x128 tiles that FP8 linears read, of one pass over x (report 3.3.1).

    Their source is the 16-bit result where somebody reads it, who says `keep`; else x stands in for it, so that it is
    never written, and takes its gradient.
    """
    source, tiles = _norm_and_tiles(x, gain, eps, power_of_2, keep)
    return FP8Rows(tiles, source)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _norm_and_tiles(x: Array, gain: Array, eps: float, power_of_2: bool, keep: bool) -> tuple[Array, Tiled]:
    normed, tiles = rms_norm_quantize(x.reshape(-1, x.shape[-1]), gain, eps, power_of_2, keep)
    return x if normed is None else normed.reshape(x.shape), tiles


def _forward(
    x: Array, gain: Array, eps: float, power_of_2: bool, keep: bool
) -> tuple[tuple[Array, Tiled], tuple[Array, Array]]:
    return _norm_and_tiles(x, gain, eps, power_of_2, keep), (x, gain)


def _backward(
    eps: float, power_of_2: bool, keep: bool, residuals: tuple[Array, Array], cotangents: tuple[Array, Tiled]
) -> tuple[Array, Array]:
    """The tiles take no gradient: it all arrives at the source."""
    return jax.vjp(lambda x, gain: rms_norm(x, gain, eps), *residuals)[1](cotangents[0])


_norm_and_tiles.defvjp(_forward, _backward)
