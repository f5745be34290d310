"""A pipelined step gives the losses, gradients and router bias of the step on one device, in memory that does not grow
with the number of microbatches, and multiplies no more."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_products import multiplications
from random_state import random_state

from dsv3_jax.config import BatchConfig, Config, ModelConfig, OptimizerConfig, ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.pipeline_table import make_table
from dsv3_jax.parallel.schedule import make
from dsv3_jax.planner.memory import argument_bytes
from dsv3_jax.train.loss import LossWeights
from dsv3_jax.train.step import Knobs, make_step

# Stages of different sizes: a dense layer and two MoE ones on the first, two before the head and the MTP module.
MODEL = ModelConfig(
    vocab_size=64, d_model=16, num_layers=5, num_dense_layers=1, d_ff=32, num_heads=2, qk_nope_head_dim=4,
    qk_rope_head_dim=4, v_head_dim=4, q_lora_rank=8, kv_lora_rank=8, num_experts=8, num_groups=2, top_k_groups=1,
    top_k=2, d_ff_expert=8, max_length=64, init_std=0.2,
)  # fmt: skip
MICROBATCHES, ROWS, SEQ = 4, 4, 16
KNOBS = Knobs(jnp.float32(1e-3), jnp.float32(1e-3), LossWeights(jnp.float32(0.3), jnp.float32(1e-2), jnp.float32(1e-2)))


def make_config(microbatches, model=MODEL, recompute="report", precision="fp32", **parallel):
    return Config(
        model=model,
        recompute=recompute,
        batch=BatchConfig(seq_len=SEQ, sequences=microbatches * ROWS, microbatch=ROWS),
        # Without clipping the first moments are a tenth of the gradients.
        optimizer=OptimizerConfig(warmup_tokens=1, clip_norm=1e9, moments="float32"),
        parallel=ParallelConfig(expert_buffer_factor=4.0, **parallel),
        precision=precision,
    )


def compiled(microbatches, **settings):
    """The step, and the state and tokens to call it with."""
    config = make_config(microbatches, **settings)
    mesh = make_mesh(config)
    state = random_state(config, mesh)
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (microbatches, ROWS, SEQ)).astype(np.int32)
    return make_step(config, mesh).lower(state, tokens, KNOBS).compile(), state, tokens


@pytest.fixture(scope="module")
def one_device():
    step, state, tokens = compiled(MICROBATCHES, devices=1)
    return jax.device_get(step(state, tokens, KNOBS))


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("dualpipe", {"devices": 8, "pipe": 2, "node": 2, "gpu": 2}), ("zb1p", {"devices": 2, "pipe": 2})],
)
def test_step_is_that_of_one_device_and_its_arguments_are_as_planned(one_device, kind, mesh):
    step, state, tokens = compiled(MICROBATCHES, schedule=kind, **mesh)
    sizes = {"data": 1, "node": 1, "gpu": 1} | mesh
    planned = argument_bytes(make_config(MICROBATCHES, schedule=kind, **mesh), sizes)
    assert step.memory_analysis().argument_size_in_bytes == planned
    new, report = jax.device_get(step(state, tokens, KNOBS))
    expected_state, expected = one_device
    assert report.applied
    for name in ("loss", "mtp_loss", "mtp_accuracy", "sequence_balance", "batch_balance"):
        got, want = (getattr(r.losses, name) for r in (report, expected))
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)
    same = np.testing.assert_array_equal
    jax.tree.map(same, (report.losses.load, new.router_bias), (expected.losses.load, expected_state.router_bias))
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=str(path)),
        new.moments.mu,
        expected_state.moments.mu,
    )


# A layer a stage, so that every loop's length is known.
SMALL = {"model": dataclasses.replace(MODEL, num_layers=2, num_dense_layers=0), "recompute": "none"}


@pytest.fixture(scope="module")
def small_pipeline():
    """Steps on two stages, by their number of microbatches."""
    return functools.cache(lambda count: compiled(count, devices=2, pipe=2, schedule="zb1p", **SMALL)[0])


def test_memory_does_not_grow_with_the_number_of_microbatches(small_pipeline):
    few, many = (small_pipeline(n).memory_analysis().temp_size_in_bytes for n in (MICROBATCHES, 4 * MICROBATCHES))
    assert many - few < 4 * 2 * 4 * MICROBATCHES * ROWS * SEQ, "no more than the longer table and tokens"


def test_weight_gradients_wait_and_nothing_is_computed_twice(small_pipeline):
    def refuse(found):
        raise AssertionError(f"the step on one device has a conditional: {found}")

    expected = multiplications(compiled(MICROBATCHES, devices=1, **SMALL)[0].as_text(), refuse)
    schedule = make("zb1p", 2, MICROBATCHES)
    table = make_table(schedule)
    ticks = len(table.columns["work"])
    times = [int((table.columns["work"] == i).sum()) for i in range(len(table.works))]
    work = {}

    def branches(found):
        if len(found) < len(times):
            # Of embedding or tail, on one of the stages, or neither.
            return max(found) / schedule.stages
        work.update(zip(table.works, found, strict=True))
        return sum(n * each for n, each in zip(times, found, strict=True)) / ticks

    pipelined = small_pipeline(MICROBATCHES).as_text()
    np.testing.assert_allclose(multiplications(pipelined, branches), expected, rtol=0.01)
    assert work[False, "I", False] > work[False, "", True] > work[True, "", False] > 0


def test_step_in_fp8_is_that_of_the_same_mesh_without_a_pipeline():
    """Weights in blocks, kept inputs, deferred products and rows that travel, all in FP8, on stages of two sizes."""
    # One kind of layers compiles in half the time; its shared expert is what a dense layer's FFN is.
    model, reports = dataclasses.replace(MODEL, num_layers=3, num_dense_layers=0), []
    for parallel in ({"devices": 2}, {"devices": 4, "pipe": 2, "schedule": "dualpipe"}):
        step, state, tokens = compiled(MICROBATCHES, model=model, precision="fp8", gpu=2, **parallel)
        reports.append(jax.device_get(step(state, tokens, KNOBS)))
    (expected_state, expected), (new, report) = reports
    assert report.applied
    # The same tensors are quantized in the same tiles; what differs is the order of sums over microbatches and both
    # directions in float32, and where the compiler fuses.
    for name in ("loss", "mtp_loss", "sequence_balance", "batch_balance"):
        got, want = (getattr(r.losses, name) for r in (report, expected))
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, new.router_bias, expected_state.router_bias)
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=str(path)),
        new.moments.mu,
        expected_state.moments.mu,
    )
