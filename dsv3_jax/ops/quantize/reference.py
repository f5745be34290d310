"""Fine-grained quantization in plain jnp: what the kernels must reproduce bit for bit (report 3.3.1, 3.3.2).

For every tile or block, with amax its largest magnitude or 2^-100: scale = amax * (1 / 448) in float32 (XLA makes that
of a division by 448 anyway), or the power of two at or above that; the inverse is 448 / amax, or exactly 1 / scale;
values are x * inverse, rounded to nearest even.
A tile of zeros has values of zero. A tile that holds inf or NaN dequantizes to NaN as a whole.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16

from dsv3_jax.ops.quantize.formats import E4M3, TILE, Blocked, SwiGLUBackward, Tiled, blocked

E4M3_MAX = 448.0
E5M6_MAX = 65024.0
SMALLEST_AMAX = 2.0**-100


def largest_magnitude(x: Float[Array, "*shape"], axis: int | tuple[int, ...]) -> Float[Array, "*tiles"]:
    """Of float32. Compared as integers, because XLA's maximum of floats may lose a NaN on a CPU."""
    magnitudes = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    return jax.lax.bitcast_convert_type(magnitudes.max(axis=axis), jnp.float32)


def scale_and_inverse(
    amax: Float[Array, "*tiles"], largest: float, power_of_2: bool
) -> tuple[Float[Array, "*tiles"], Float[Array, "*tiles"]]:
    """What values are multiplied by on their way back, and on their way in, so that amax becomes `largest`."""
    amax = jnp.where(amax < SMALLEST_AMAX, SMALLEST_AMAX, amax)
    scale, inverse = amax * jnp.float32(1 / largest), nearest_quotient(largest / amax, amax)
    if not power_of_2:
        return scale, inverse
    mantissa, exponent = jnp.frexp(scale)
    exponent = exponent - (mantissa == 0.5)  # an exact power of two is its own scale
    power = lambda exponent: jnp.ldexp(jnp.float32(1), exponent)  # noqa: E731
    finite = amax < jnp.inf
    return jnp.where(finite, power(exponent), scale), jnp.where(finite, power(-exponent), inverse)


def nearest_quotient(quotient: Float[Array, "*tiles"], divisor: Float[Array, "*tiles"]) -> Float[Array, "*tiles"]:
    """The float32 nearest to numerator / divisor, from one at most two units away, as a GPU's division may be.

    The numerator is a number of few bits, as 448. With both significands as integers it is a multiple of 2^32, so
    that modulo 2^32 what the product leaves of it is minus the product.
    """
    significand = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFF | 0x800000  # noqa: E731
    unit = significand(divisor)
    twice_left = -2 * (significand(quotient) * unit)
    count = lambda *conditions: sum(jnp.where(c, jnp.int32(1), jnp.int32(0)) for c in conditions)  # noqa: E731
    steps = count(twice_left > unit, twice_left > 3 * unit) - count(twice_left < -unit, twice_left < -3 * unit)
    nearest = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(quotient, jnp.int32) + steps, jnp.float32)
    return jnp.where(divisor < jnp.inf, nearest, quotient)


def quantize_rows(x: Float[Array, "rows k"], power_of_2: bool = False) -> Tiled:
    """1x128 tiles along the last axis; a last tile of fewer elements has a scale of its own."""
    tiles = _tiles_of_last_axis(x.astype(jnp.float32))
    scale, inverse = scale_and_inverse(largest_magnitude(tiles, -1), E4M3_MAX, power_of_2)
    values = _to_e4m3(tiles * inverse[..., None]).reshape(x.shape[0], -1)[:, : x.shape[1]]
    return Tiled(values, scale.T)


def quantize_columns(x: Float[Array, "rows k"], power_of_2: bool = False) -> Tiled:
    """128x1 tiles, as 1x128 tiles of the transpose: values are [k, rows]."""
    return quantize_rows(x.T, power_of_2)


def quantize_blocks(weight: Float[Array, "*groups k n"]) -> Blocked:
    """128x128 blocks of the last two axes, in both layouts."""
    *groups, k, n = weight.shape
    pad = [(0, 0)] * len(groups) + [(0, -k % TILE), (0, -n % TILE)]
    blocks = jnp.pad(weight.astype(jnp.float32), pad)
    blocks = blocks.reshape(*groups, -(-k // TILE), TILE, -(-n // TILE), TILE)
    scale, inverse = scale_and_inverse(largest_magnitude(blocks, (-3, -1)), E4M3_MAX, power_of_2=False)
    values = _to_e4m3(blocks * inverse[..., :, None, :, None])
    values = values.reshape(*groups, blocks.shape[-4] * TILE, -1)[..., :k, :n]
    return blocked(values, jnp.swapaxes(values, -1, -2), scale)


def dequantize(x: Tiled) -> Float[Array, "rows k"]:
    """Values times their tile's scale, float32."""
    return x.values.astype(jnp.float32) * jnp.repeat(x.scales.T, TILE, axis=1)[:, : x.values.shape[1]]


def dequantize_blocks(weight: Blocked) -> Float[Array, "*groups k n"]:
    """Values times their block's scale, float32."""
    k, n = weight.values.shape[-2:]
    scales = jnp.repeat(jnp.repeat(weight.scales, TILE, axis=-2)[..., :k, :], TILE, axis=-1)[..., :n]
    return weight.values.astype(jnp.float32) * scales


def retile(x: Tiled, power_of_2: bool = False) -> Tiled:
    """From tiles along the last axis to tiles along the first, as the transpose: values are [k, rows].

    The weight gradient reduces over tokens, the forward product over features (report 3.3.1).
    """
    return quantize_columns(dequantize(x), power_of_2)


def quantize_e5m6(x: Float[Array, "rows k"]) -> tuple[Float16[Array, "rows k"], Float[Array, "tiles rows"]]:
    """5 bits of exponent and 6 of mantissa, in 1x128 tiles with power-of-two scales; held in float16, whose lowest
    four bits stay zero. For the input of the linear after attention (report 3.3.3)."""
    tiles = _tiles_of_last_axis(x.astype(jnp.float32))
    scale, inverse = scale_and_inverse(largest_magnitude(tiles, -1), E5M6_MAX, power_of_2=True)
    values = round_to_e5m6(tiles * inverse[..., None]).astype(jnp.float16)
    return values.reshape(x.shape[0], -1)[:, : x.shape[1]], scale.T


def round_to_e5m6(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The nearest number with 6 bits of mantissa and the exponents of float16, ties to even, at most 65024 in
    magnitude; float32."""
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=6)
    subnormal = jnp.round(x * 2.0**20) * 2.0**-20
    return jnp.clip(jnp.where(jnp.abs(x) < 2.0**-14, subnormal, normal), -E5M6_MAX, E5M6_MAX)


def dequantize_e5m6(values: Float16[Array, "rows k"], scales: Float[Array, "tiles rows"]) -> Float[Array, "rows k"]:
    """Values times their tile's scale, float32."""
    return values.astype(jnp.float32) * jnp.repeat(scales.T, TILE, axis=1)[:, : values.shape[1]]


def quantize_columns_through_e5m6(x: Float[Array, "rows k"]) -> Tiled:
    """`quantize_columns` of what E5M6 keeps of x, in the type of x. Both scales are powers of two, so that the second
    rounding falls on the grid of the first; and 16 bits hold it."""
    return quantize_columns(dequantize_e5m6(*quantize_e5m6(x)).astype(x.dtype), power_of_2=True)


def rms_norm_quantize(
    x: Float[Array, "rows d"], gain: Float[Array, " d"], eps: float, power_of_2: bool = False, keep: bool = True
) -> tuple[Float[Array, "rows d"] | None, Tiled]:
    """x over its root mean square, times the gain, in the type of x, where it is to `keep`; and that in 1x128 tiles."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps) * gain
    normed = normed.astype(x.dtype)
    return normed if keep else None, quantize_rows(normed, power_of_2)


def swiglu_quantize(hidden: Float[Array, "rows two_ff"], weights: Float[Array, " rows"] | None) -> tuple[Tiled, Tiled]:
    """silu(gate) * up of the two halves of `hidden`, times the rows' weights, in 1x128 tiles: what the down projection
    reads. Before it, `hidden` itself in 1x128 tiles: what the backward pass keeps (report 3.3.3)."""
    return quantize_rows(hidden), quantize_rows(_swiglu(hidden, weights))


def swiglu_quantize_backward(
    hidden: Tiled, d_out: Float[Array, "rows ff"], weights: Float[Array, " rows"] | None
) -> SwiGLUBackward:
    """Everything the backward pass of a SwiGLU between two FP8 products needs, from the kept FP8 input.

    Gradient and output are rounded to the type of `d_out` before they are quantized, along rows and columns alike.
    """
    gate_up = dequantize(hidden)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    scaled = d_out.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_weights = None
    if weights is not None:
        d_weights = (scaled * silu * up).sum(axis=-1)
        scaled = scaled * weights[:, None]
    d_gate = scaled * up * (sigmoid + silu * (1 - sigmoid))
    d_hidden = jnp.concatenate([d_gate, scaled * silu], axis=-1).astype(d_out.dtype)
    output = quantize_columns(_swiglu(gate_up, weights).astype(d_out.dtype))
    return SwiGLUBackward(quantize_rows(d_hidden), quantize_columns(d_hidden), output, d_weights)


def _swiglu(hidden: Float[Array, "rows two_ff"], weights: Float[Array, " rows"] | None) -> Float[Array, "rows ff"]:
    gate, up = jnp.split(hidden.astype(jnp.float32), 2, axis=-1)
    out = jax.nn.silu(gate) * up
    return out if weights is None else out * weights[:, None]


def _tiles_of_last_axis(x: Float[Array, "rows k"]) -> Float[Array, "rows tiles 128"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE))).reshape(x.shape[0], -1, TILE)


def _to_e4m3(x: Float[Array, "*shape"]) -> Array:
    """Nearest even, saturating: a cast alone turns what lies beyond 464 into NaN."""
    return jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(E4M3)
