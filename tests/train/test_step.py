"""The step on 8 emulated devices equals the step on one, and a step that must not count changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_state import random_state

from dsv3_jax.config import BatchConfig, Config, ModelConfig, OptimizerConfig, ParallelConfig
from dsv3_jax.ops.permute import tile_rows
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.loss import LossWeights
from dsv3_jax.train.step import Knobs, make_step

MODEL = ModelConfig(
    vocab_size=128, d_model=32, num_layers=3, d_ff=64, num_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, q_lora_rank=16, kv_lora_rank=16, num_experts=16, d_ff_expert=16, max_length=64, init_std=0.08,
)  # fmt: skip
STEPS, MICROBATCHES, ROWS, SEQ = 10, 2, 8, 32


def make_config(**parallel):
    return Config(
        model=MODEL,
        batch=BatchConfig(seq_len=SEQ, sequences=MICROBATCHES * ROWS, microbatch=ROWS),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_tokens=1, clip_norm=0.5, moments="float32"),
        parallel=ParallelConfig(**parallel),
        precision="fp32",
    )


def knobs(learning_rate=1e-3):
    weights = LossWeights(jnp.float32(0.3), jnp.float32(1e-2), jnp.float32(1e-2))
    return Knobs(jnp.float32(learning_rate), jnp.float32(1e-3), weights)


def batches():
    rng = np.random.default_rng(0)
    frequent = rng.integers(0, MODEL.vocab_size, 40)
    return [frequent[rng.integers(0, 40, (MICROBATCHES, ROWS, SEQ))].astype(np.int32) for _ in range(STEPS)]


def ten_steps(config):
    mesh = make_mesh(config)
    step, state, reports = make_step(config, mesh), random_state(config, mesh), []
    for tokens in batches():
        state, report = step(state, tokens, knobs())
        reports.append(jax.device_get(report))
    return jax.device_get(state), reports


@pytest.fixture(scope="module")
def one_device():
    return ten_steps(make_config(devices=1))


def test_one_device_learns_with_every_loss_on(one_device):
    _, reports = one_device
    assert reports[-1].losses.loss < reports[0].losses.loss - 0.3
    assert reports[0].losses.mtp_loss > 0
    assert reports[0].losses.sequence_balance > 0
    assert reports[0].losses.batch_balance > 0
    assert reports[0].grad_norm > 0.5, "clipping must be at work"
    choices = MICROBATCHES * ROWS * SEQ * MODEL.top_k
    assert reports[0].losses.load["moe_layers"].sum(axis=1).tolist() == [choices] * MODEL.num_moe_layers


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 1, 8)], ids=str)
def test_any_mesh_gives_the_losses_of_one_device_and_the_same_bias(one_device, shape):
    data, node, gpu = shape
    state, reports = ten_steps(make_config(devices=8, data=data, node=node, gpu=gpu, expert_buffer_factor=4.0))
    expected_state, expected = one_device
    assert all(report.applied for report in reports)
    for name in ("loss", "mtp_loss", "sequence_balance", "batch_balance"):
        got, want = ([getattr(r.losses, name) for r in run] for run in (reports, expected))
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose([r.grad_norm for r in reports], [r.grad_norm for r in expected], rtol=1e-4)
    np.testing.assert_allclose(reports[0].grad_norm, expected[0].grad_norm, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state.router_bias, expected_state.router_bias)
    for report, want in zip(reports, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, report.losses.load, want.losses.load)


@pytest.fixture(scope="module")
def two_devices():
    """A step whose expert buffer has room for a balanced load only."""
    config = make_config(devices=2, gpu=2, expert_buffer_factor=1.0)
    config = dataclasses.replace(
        config, model=dataclasses.replace(MODEL, num_layers=1, num_dense_layers=0, num_mtp_modules=0)
    )
    mesh = make_mesh(config)
    return config, mesh, make_step(config, mesh)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_step_that_overflows_the_expert_buffer_changes_nothing(two_devices):
    config, mesh, step = two_devices
    state = random_state(config, mesh)
    bias = {kind: b.at[:, : MODEL.top_k].set(10.0) for kind, b in state.router_bias.items()}
    state = dataclasses.replace(state, router_bias=bias)
    before = jax.device_get(state)
    state, report = step(state, batches()[0], knobs())
    # Both devices want all their rows on the first one, which has room for half of a microbatch's, and for a tile more
    # of each of its experts.
    choices, experts = ROWS * SEQ * MODEL.top_k, MODEL.num_experts // 2
    room = choices // 2 + experts * tile_rows(choices // 2, experts)
    assert int(report.losses.overflow) == MICROBATCHES * (choices - room)
    assert not report.applied
    assert_same(jax.device_get(state), before)


def test_step_after_one_that_overflowed_changes_nothing(two_devices):
    config, mesh, step = two_devices
    state = random_state(config, mesh)
    before = jax.device_get(state)
    state, report = step(state, batches()[0], dataclasses.replace(knobs(), overflow_before=np.int32(3)))
    assert int(report.losses.overflow) == 0, "nothing else keeps the step from being applied"
    assert np.isfinite(report.losses.loss)
    assert np.isfinite(report.grad_norm)
    assert not report.applied
    assert_same(jax.device_get(state), before)


def test_non_finite_step_changes_nothing(two_devices):
    config, mesh, step = two_devices
    state = random_state(config, mesh)
    # Balanced, so that only the loss is at fault.
    params = {**state.params, "head": jax.tree.map(lambda x: x.at[0, 0].set(jnp.inf), state.params["head"])}
    state = dataclasses.replace(state, params=params)
    before = jax.device_get(state)
    state, report = step(state, batches()[0], knobs())
    assert not np.isfinite(report.losses.loss)
    assert not report.applied
    assert_same(jax.device_get(state), before)
