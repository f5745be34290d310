"""Held-out evaluation through a pipeline gives the loss of one device, and no device holds more than its stage."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jaxpr_equations import equations
from random_state import random_state

from dsv3_jax.config import BatchConfig, Config, ModelConfig, ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.step import make_evaluation

# Experts so wide that no other array is as large as a layer's.
MODEL = ModelConfig(
    vocab_size=64, d_model=16, num_layers=16, num_dense_layers=0, d_ff=32, num_heads=2, qk_nope_head_dim=4,
    qk_rope_head_dim=4, v_head_dim=4, q_lora_rank=8, kv_lora_rank=8, num_experts=8, num_groups=2, top_k_groups=1,
    top_k=2, d_ff_expert=256, max_length=64, init_std=0.2,
)  # fmt: skip
# A dense layer and two MoE ones on the first of two stages, two on the second.
UNEVEN = dataclasses.replace(MODEL, num_layers=5, num_dense_layers=1)
MICROBATCHES, ROWS, SEQ = 3, 4, 16


def evaluation(model, microbatches, **parallel):
    """The compiled evaluation, what to call it with, and its mesh."""
    batch = BatchConfig(seq_len=SEQ, sequences=4 * ROWS, microbatch=ROWS)
    config = Config(model=model, batch=batch, parallel=ParallelConfig(**parallel), precision="fp32")
    mesh = make_mesh(config)
    state = random_state(config, mesh)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, (microbatches * ROWS, SEQ)).astype(np.int32)
    row_weights = rng.random(len(tokens)).astype(np.float32)
    return make_evaluation(config, mesh), (state.params, state.router_bias, tokens, row_weights)


def expected(model):
    evaluate, (params, bias, tokens, weights) = evaluation(model, MICROBATCHES, devices=1)
    return sum(evaluate(params, bias, tokens[i : i + ROWS], weights[i : i + ROWS]) for i in range(0, len(tokens), ROWS))


@pytest.fixture(scope="module")
def uneven_loss():
    return expected(UNEVEN)


@pytest.mark.parametrize(
    "parallel",
    [
        {"devices": 2, "pipe": 2, "schedule": "dualpipe"},
        {"devices": 8, "pipe": 2, "node": 2, "gpu": 2, "schedule": "zb1p"},
    ],
    ids=["pipe 2", "pipe 2 x node 2 x gpu 2"],
)
def test_held_out_loss_is_that_of_one_device(parallel, uneven_loss):
    evaluate, arguments = evaluation(UNEVEN, MICROBATCHES, **parallel)
    np.testing.assert_allclose(evaluate(*arguments), uneven_loss, rtol=1e-5)


def test_no_device_holds_more_than_the_layers_of_its_stage():
    evaluate, arguments = evaluation(MODEL, MICROBATCHES, devices=8, pipe=8)
    params = arguments[0]
    experts = params["moe_layers"]["ffn"]["experts"]["gate_up"].size
    found = [
        math.prod(v.aval.shape) for _, e in equations(jax.make_jaxpr(evaluate)(*arguments).jaxpr) for v in e.outvars
    ]
    assert max(found) == experts * 3 // 16, "the fullest stage's three of sixteen layers are the largest array"
    compiled = evaluate.lower(*arguments).compile()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes < 0.15 * whole
    assert memory.temp_size_in_bytes < 0.5 * whole, "three layers and what they are gathered from, not sixteen"
    np.testing.assert_allclose(compiled(*arguments), expected(MODEL), rtol=1e-5)
