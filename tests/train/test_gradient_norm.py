"""The gradient's norm, of which experts' squares come with their gradients where these are final."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpr_equations import equations
from random_state import random_state

from dsv3_jax.config import BatchConfig, Config, ModelConfig, OptimizerConfig, ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.loss import LossWeights
from dsv3_jax.train.state import abstract_state
from dsv3_jax.train.step import Knobs, make_step

MODEL = ModelConfig(
    vocab_size=128, d_model=32, num_layers=2, d_ff=64, num_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, q_lora_rank=16, kv_lora_rank=16, num_experts=16, d_ff_expert=24, max_length=32, num_mtp_modules=1,
    init_std=0.08,
)  # fmt: skip
ROWS, SEQ = 8, 32
KNOBS = Knobs(np.float32(1e-3), np.float32(1e-3), LossWeights(np.float32(0.3), np.float32(1e-2), np.float32(1e-2)))
UNSPLIT, EXPERTS, REPLICAS = {"devices": 1}, {"devices": 8, "gpu": 8}, {"devices": 8, "data": 8}


def make_config(precision, parallel, microbatches=1):
    return Config(
        model=MODEL,
        batch=BatchConfig(seq_len=SEQ, sequences=microbatches * ROWS, microbatch=ROWS),
        # Nothing is clipped, and moments are not rounded: after a step, the first is a known share of the gradient.
        optimizer=OptimizerConfig(clip_norm=1e9, moments="float32"),
        parallel=ParallelConfig(expert_buffer_factor=8.0, **parallel),
        precision=precision,
    )


@pytest.mark.parametrize("parallel", [UNSPLIT, EXPERTS, REPLICAS], ids=["one device", "experts", "replicas"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_norm_is_that_of_the_gradient_that_the_optimizer_has(precision, parallel):
    config = make_config(precision, parallel)
    mesh = make_mesh(config)
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (1, ROWS, SEQ)).astype(np.int32)
    state, report = make_step(config, mesh)(random_state(config, mesh), tokens, KNOBS)
    assert report.applied
    gradient = [np.asarray(mu, np.float64) / (1 - config.optimizer.beta1) for mu in jax.tree.leaves(state.moments.mu)]
    # Sums of float32 squares, and a moment's rounding.
    np.testing.assert_allclose(report.grad_norm, np.sqrt(sum(np.sum(g * g) for g in gradient)), rtol=1e-5)


@pytest.mark.parametrize(
    ("parallel", "microbatches", "read_again"),
    [(UNSPLIT, 1, False), (EXPERTS, 1, False), (UNSPLIT, 2, True), (REPLICAS, 1, True)],
    ids=["one device", "experts", "two microbatches", "replicas"],
)
def test_experts_gradients_are_read_again_only_where_they_were_not_final(parallel, microbatches, read_again):
    config = make_config("fp8", parallel, microbatches)
    mesh = make_mesh(config)
    tokens = jax.ShapeDtypeStruct((microbatches, ROWS, SEQ), jnp.int32)
    program = jax.make_jaxpr(make_step(config, mesh))(abstract_state(config, mesh), tokens, KNOBS)
    summed = {
        e.invars[0].aval.ndim
        for _, e in equations(program.jaxpr)
        if e.primitive.name == "reduce_sum" and not e.outvars[0].aval.ndim
    }
    assert (4 in summed) == read_again  # [layers, experts, k, n]
    assert 3 in summed  # [layers, k, n]
