"""A pipelined step gives the losses, gradients and router bias of the step on one device, in memory that does not grow
with the number of microbatches, and multiplies no more."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_products import multiplications
from random_state import random_state

from dsv3_jax.config import BatchConfig, Config, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.pipeline_table import make_table
from dsv3_jax.parallel.schedule import make
from dsv3_jax.planner.memory import argument_bytes
from dsv3_jax.train.loss import LossWeights
from dsv3_jax.train.state import abstract_state
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


# A layer a stage, so that every loop's length is known.
SMALL = {"model": dataclasses.replace(MODEL, num_layers=2, num_dense_layers=0, num_mtp_modules=0), "recompute": "none"}
WHOLE_PIPELINE = {"devices": 8, "pipe": 2, "node": 2, "gpu": 2, "schedule": "dualpipe"}
SMALL_PIPELINE = {"devices": 2, "pipe": 2, "schedule": "zb1p"} | SMALL


@pytest.fixture(scope="module")
def small_pipeline():
    """`compiled` on two stages, by the number of microbatches."""
    return functools.cache(lambda count: compiled(count, **SMALL_PIPELINE))


@pytest.fixture(scope="module")
def small_step():
    """`compiled` on one device."""
    return compiled(MICROBATCHES, devices=1, **SMALL)


@pytest.mark.parametrize(
    "parallel", [{"devices": 1}, {"devices": 2, "pipe": 2, "schedule": "zb1p"}], ids=["one", "pipe"]
)
def test_logits_of_as_many_tokens_as_the_config_says_exist_at_a_time(parallel):
    config = make_config(MICROBATCHES, **parallel, **SMALL)
    config = dataclasses.replace(config, loss=LossConfig(logits_tokens=24))
    mesh = make_mesh(config)
    state, tokens = abstract_state(config, mesh), jax.ShapeDtypeStruct((MICROBATCHES, ROWS, SEQ), jnp.int32)
    traced = str(make_step(config, mesh).trace(state, tokens, KNOBS).jaxpr)
    rows = {int(n) for n in re.findall(rf"f32\[(\d+),{MODEL.vocab_size}\](?:{{[^}}]*}})? = dot_general", traced)}
    assert rows == {24, MODEL.d_model}  # the logits, and the gradient of the head


def assert_same(got, expected, names):
    """Losses of these names, new router bias and gradients of a pipelined step are the other's."""
    (new, report), (expected_state, expected_report) = got, expected
    assert report.applied
    for name in names:
        loss, expected_loss = (getattr(r.losses, name) for r in (report, expected_report))
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, new.router_bias, expected_state.router_bias)
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=str(path)),
        new.moments.mu,
        expected_state.moments.mu,
    )


def assert_as_on_one_device_and_planned(pipeline, one_device, settings):
    (step, *arguments), (expected_step, *expected_arguments) = pipeline, one_device
    sizes = {axis: settings.get(axis, 1) for axis in ("pipe", "data", "node", "gpu")}
    planned = argument_bytes(make_config(MICROBATCHES, **settings), sizes)
    assert step.memory_analysis().argument_size_in_bytes == planned
    got, expected = jax.device_get((step(*arguments, KNOBS), expected_step(*expected_arguments, KNOBS)))
    assert_same(got, expected, ("loss", "mtp_loss", "mtp_accuracy", "sequence_balance", "batch_balance"))
    jax.tree.map(np.testing.assert_array_equal, got[1].losses.load, expected[1].losses.load)


def test_step_in_both_directions_is_that_of_one_device_and_its_arguments_are_as_planned():
    pipeline, one_device = (compiled(MICROBATCHES, **parallel) for parallel in (WHOLE_PIPELINE, {"devices": 1}))
    assert_as_on_one_device_and_planned(pipeline, one_device, WHOLE_PIPELINE)


def test_step_in_one_direction_is_that_of_one_device_and_its_arguments_are_as_planned(small_pipeline, small_step):
    assert_as_on_one_device_and_planned(small_pipeline(MICROBATCHES), small_step, SMALL_PIPELINE)


def test_memory_does_not_grow_with_the_number_of_microbatches(small_pipeline):
    few, many = (small_pipeline(n)[0].memory_analysis().temp_size_in_bytes for n in (MICROBATCHES, 4 * MICROBATCHES))
    assert many - few < 4 * 2 * 4 * MICROBATCHES * ROWS * SEQ, "no more than the longer table and tokens"


def test_weight_gradients_wait_and_nothing_is_computed_twice(small_pipeline, small_step):
    def refuse(found):
        raise AssertionError(f"the step on one device has a conditional: {found}")

    expected = multiplications(small_step[0].as_text(), refuse)
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

    pipelined = small_pipeline(MICROBATCHES)[0].as_text()
    np.testing.assert_allclose(multiplications(pipelined, branches), expected, rtol=0.01)
    assert work[False, "I", False] > work[False, "", True] > work[True, "", False] > 0


def test_step_in_fp8_is_that_of_the_same_mesh_without_a_pipeline():
    """Weights in blocks, kept inputs, deferred products and rows that travel, all in FP8, on stages of two sizes."""
    # One kind of layers compiles in half the time; its shared expert is what a dense layer's FFN is.
    model, results = dataclasses.replace(MODEL, num_layers=3, num_dense_layers=0), []
    for parallel in ({"devices": 4, "pipe": 2, "schedule": "dualpipe"}, {"devices": 2}):
        step, state, tokens = compiled(MICROBATCHES, model=model, precision="fp8", gpu=2, **parallel)
        results.append(jax.device_get(step(state, tokens, KNOBS)))
    # The same tensors are quantized in the same tiles; what differs is the order of sums over microbatches and both
    # directions in float32, and where the compiler fuses.
    assert_same(*results, ("loss", "mtp_loss", "sequence_balance", "batch_balance"))
