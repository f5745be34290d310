"""Rotary positions: interleaved pairs, relative, and the report's YaRN numbers."""

import dataclasses
import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.model.rope import frequencies, interpolation_range, rotation_factor, rotations, softmax_scale
from dsv3_jax.ops.rotary import rotate

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def v3() -> ModelConfig:
    """The 671B model after context extension (report 4.3)."""
    config = runpy.run_path(str(CONFIGS / "v3_671b.py"))["config"]().model
    return dataclasses.replace(config, yarn=YarnConfig(), max_length=163840)


@pytest.mark.parametrize("yarn", [None, YarnConfig(factor=4.0, original_length=64)])
def test_scores_depend_on_the_distance_alone(yarn):
    config = ModelConfig(qk_rope_head_dim=16, yarn=yarn)
    q, k = jax.random.normal(jax.random.key(0), (2, 16))

    def score(q_position: int, k_position: int) -> float:
        cos, sin = rotations(config, jnp.array([q_position, k_position]))
        return float(rotate(q, cos[0], sin[0]) @ rotate(k, cos[1], sin[1]))

    for distance in (0, 1, 13):
        scores = [score(k_position + distance, k_position) for k_position in (0, 7, 300)]
        np.testing.assert_allclose(scores, scores[0], atol=1e-3)
    assert abs(score(1, 0) - score(0, 1)) > 1e-2


def test_positions_turn_pairs_by_angles_of_falling_frequency():
    cos, sin = rotations(ModelConfig(qk_rope_head_dim=8, rope_theta=100.0), jnp.arange(3, 8))
    angles = np.outer(np.arange(3, 8), [100.0 ** (-2 * i / 8) for i in range(4)])
    np.testing.assert_allclose(cos + 1j * sin, np.exp(1j * angles), atol=1e-5)


def test_671b_yarn_interpolates_from_frequency_10_to_23(v3):
    assert interpolation_range(v3, v3.yarn) == (10, 23)
    plain = np.array([10000.0 ** (-i / 32) for i in range(32)])
    ours = frequencies(v3)
    np.testing.assert_allclose(ours[:11], plain[:11], rtol=1e-12)
    np.testing.assert_allclose(ours[23:], plain[23:] / 40, rtol=1e-12)
    between = np.array([plain[i] * (1 - (i - 10) / 13) + plain[i] / 40 * (i - 10) / 13 for i in range(11, 23)])
    np.testing.assert_allclose(ours[11:23], between, rtol=1e-12)
    np.testing.assert_allclose(frequencies(dataclasses.replace(v3, yarn=None)), plain, rtol=1e-12)


def test_671b_yarn_scales_the_softmax_and_not_cos_and_sin(v3):
    mscale = 0.1 * math.log(40) + 1
    assert mscale == pytest.approx(1.36889, abs=1e-5)
    assert softmax_scale(v3) == pytest.approx(mscale**2 / math.sqrt(192), rel=1e-12)
    assert softmax_scale(dataclasses.replace(v3, yarn=None)) == pytest.approx(1 / math.sqrt(192), rel=1e-12)
    assert rotation_factor(v3.yarn) == 1


@pytest.mark.parametrize(
    ("yarn", "factor"),
    [
        (YarnConfig(attention_factor=0.7), 0.7),
        (YarnConfig(mscale=None, mscale_all_dim=None), 0.1 * math.log(40) + 1),
        (YarnConfig(mscale=0.5, mscale_all_dim=1.0), (0.05 * math.log(40) + 1) / (0.1 * math.log(40) + 1)),
        (YarnConfig(factor=1.0), 1.0),
    ],
    ids=["given", "absent", "unequal", "no-extension"],
)
def test_cos_and_sin_carry_the_factor_of_unequal_temperatures(yarn, factor):
    assert rotation_factor(yarn) == pytest.approx(factor, rel=1e-12)
    cos, sin = rotations(ModelConfig(yarn=yarn), jnp.arange(3))
    np.testing.assert_allclose(cos**2 + sin**2, factor**2, rtol=1e-5)
