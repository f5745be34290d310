"""The report's schedules at every boundary of the 671B run (report 4.2)."""

import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.config import Config, OptimizerConfig
from dsv3_jax.train.schedules import bias_update_speed, learning_rate, mtp_weight

V3: Config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "v3_671b.py"))["config"]()
T, B = 10**12, 10**9


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 0.0),
        (13_490_000_000, 1.1e-4),  # half of the warmup
        (26_980_000_000, 2.2e-4),
        (10 * T - 1, 2.2e-4),
        (10 * T, 2.2e-4),
        (12_150 * B, (2.2e-4 + 2.2e-5) / 2),  # half of the cosine
        (14_300 * B - 1, 2.2e-5),
        (14_300 * B, 2.2e-5),
        (14_633 * B - 1, 2.2e-5),
        (14_633 * B, 7.3e-6),
        (14_800 * B, 7.3e-6),
    ],
)
def test_learning_rate_of_the_671b_run(tokens, expected):
    assert learning_rate(V3.optimizer, tokens) == pytest.approx(expected, rel=1e-9)


def test_warmup_of_the_671b_run_takes_2000_steps():
    assert learning_rate(V3.optimizer, V3.batch.tokens_after(2000)) == pytest.approx(2.2e-4, rel=1e-2)
    assert learning_rate(V3.optimizer, V3.batch.tokens_after(1900)) < 0.96 * 2.2e-4


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0.3), (10 * T - 1, 0.3), (10 * T, 0.1), (14_800 * B, 0.1)])
def test_mtp_weight_of_the_671b_run(tokens, expected):
    assert mtp_weight(V3.loss, tokens) == expected


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0.001), (14_300 * B - 1, 0.001), (14_300 * B, 0.0)])
def test_bias_update_speed_of_the_671b_run(tokens, expected):
    assert bias_update_speed(V3.loss, tokens) == expected


@given(st.integers(26_980_000_000, 15 * T), st.integers(0, T))
def test_learning_rate_never_rises_after_warmup(tokens, more):
    assert learning_rate(V3.optimizer, tokens + more) <= learning_rate(V3.optimizer, tokens) * (1 + 1e-12)


def test_phases_of_no_length_are_skipped():
    config = OptimizerConfig(
        peak_lr=1.0, warmup_tokens=0, decay_start_tokens=5, decay_end_tokens=5, decayed_lr=0.5, final_start_tokens=5,
        final_lr=0.25,
    )  # fmt: skip
    assert [learning_rate(config, tokens) for tokens in (0, 4, 5)] == [1.0, 1.0, 0.25]
