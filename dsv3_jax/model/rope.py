"""Rotary position embedding on interleaved pairs, with YaRN (report 4.3)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig, YarnConfig


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(width of a query), times the square of YaRN's temperature."""
    scale = config.qk_head_dim**-0.5
    yarn = config.yarn
    if yarn is not None and yarn.mscale_all_dim:
        scale *= _mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def rotation_factor(yarn: YarnConfig | None) -> float:
    """What cos and sin are multiplied by: 1 where the two temperatures of YaRN agree."""
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def interpolation_range(config: ModelConfig, yarn: YarnConfig) -> tuple[float, float]:
    """First and last index of the frequencies between which YaRN goes from keeping to interpolating."""
    dim = config.qk_rope_head_dim

    def index_of(turns: float) -> float:
        return dim * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = index_of(yarn.beta_fast), index_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def frequencies(config: ModelConfig) -> Float[np.ndarray, " pairs"]:
    """Radians per position of each rotated pair."""
    dim = config.qk_rope_head_dim
    kept = config.rope_theta ** -(np.arange(0, dim, 2) / dim)
    if config.yarn is None:
        return kept
    low, high = interpolation_range(config, config.yarn)
    width = high - low if high != low else 1e-3
    interpolated = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    return kept * (1 - interpolated) + kept / config.yarn.factor * interpolated


def rotations(
    config: ModelConfig, positions: Int[Array, "*batch seq"]
) -> tuple[Float[Array, "*batch seq pairs"], Float[Array, "*batch seq pairs"]]:
    """cos and sin of every position and pair, float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies(config), jnp.float32)
    factor = rotation_factor(config.yarn)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor
