"""The step in FP8: what is quantized when, what is kept and what travels, and that it trains like the one in bf16."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxpr_equations import equations
from random_state import random_state

from dsv3_jax.config import BatchConfig, Config, ModelConfig, OptimizerConfig, ParallelConfig
from dsv3_jax.model.moe import LocalExchange
from dsv3_jax.model.transformer import initial_router_bias
from dsv3_jax.ops.weights import attach_slots, cast_weights, gradient_slots
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.loss import LossWeights, training_loss
from dsv3_jax.train.state import TrainState, abstract_state, model_structure, state_shardings
from dsv3_jax.train.step import Knobs, make_evaluation, make_step

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
# Widths that no two tensors share, so that shapes tell them apart.
MODEL = ModelConfig(
    vocab_size=64, d_model=48, num_layers=2, d_ff=40, num_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=4,
    v_head_dim=14, q_lora_rank=20, kv_lora_rank=24, num_experts=8, d_ff_expert=16, top_k=2, max_length=64,
    init_std=0.08,
)  # fmt: skip
# What trains is one layer of each kind: the block of an MTP module is a third, for as long again to compile. From
# smaller weights, with which the rounding of two runs takes longer to lead them apart.
TRAINED = replace(MODEL, num_mtp_modules=0, init_std=0.04)
MICROBATCHES, ROWS, SEQ = 2, 8, 32
WEIGHTS = LossWeights(jnp.float32(0.3), jnp.float32(1e-2), jnp.float32(1e-2))
KNOBS = Knobs(jnp.float32(2e-3), jnp.float32(1e-3), WEIGHTS)


def make_config(precision: str, model: ModelConfig = MODEL, **parallel) -> Config:
    return Config(
        model=model,
        batch=BatchConfig(seq_len=SEQ, sequences=MICROBATCHES * ROWS, microbatch=ROWS),
        optimizer=OptimizerConfig(warmup_tokens=1, moments="float32"),
        parallel=ParallelConfig(**(parallel or {"devices": 1})),
        precision=precision,
    )


def traced(config: Config) -> list:
    mesh = make_mesh(config)
    tokens = jax.ShapeDtypeStruct((MICROBATCHES, ROWS, SEQ), jnp.int32)
    state = abstract_state(config, mesh)
    return list(equations(jax.make_jaxpr(make_step(config, mesh))(state, tokens, KNOBS).jaxpr))


def test_weights_are_quantized_once_a_step_outside_the_microbatches():
    shapes = model_structure(MODEL)[1]
    linears = [
        s.shape for s in jax.tree.leaves(gradient_slots(jax.eval_shape(lambda p: cast_weights(p, "fp8"), shapes)))
    ]
    places = {}
    for inside, equation in traced(make_config("fp8")):
        if equation.primitive.name == "convert_element_type" and equation.outvars[0].aval.dtype == E4M3:
            places.setdefault("scan" in inside, []).append(equation.outvars[0].aval.ndim)
    # Of weights, [layers, (experts,) k blocks, 128, n blocks, 128]; of activations, [rows, tiles, 128].
    assert linears
    assert set(places[False]) == {5, 6}
    assert set(places[True]) == {3}
    # q_down, q_up, kv_down, kv_up, out, gate_up and down of a dense layer; and the experts' two in each MoE kind.
    assert len(places[False]) == 7 + 2 * 9


def test_tokens_and_their_gradients_travel_in_e4m3_and_outputs_in_bf16():
    config = make_config("fp8", devices=2, gpu=2)
    sent = {}
    for _, equation in traced(config):
        if equation.primitive.name == "all_to_all":
            aval = equation.invars[0].aval
            if aval.shape[-1] == MODEL.d_model:
                sent[aval.dtype] = sent.get(aval.dtype, 0) + 1
    assert set(sent) == {E4M3, jnp.dtype(jnp.bfloat16)}
    # Both kinds of MoE layers dispatch tokens forward and gradients backward, and combine outputs and their gradients.
    assert sent[E4M3] >= 4
    assert sent[jnp.dtype(jnp.bfloat16)] >= 4


@pytest.mark.parametrize("recompute", ["none", "report"])
def test_no_input_of_a_linear_or_of_the_swiglu_is_kept_in_16_bits(recompute):
    graphdef, shapes = model_structure(MODEL)
    compute = jax.eval_shape(lambda p: cast_weights(p, "fp8"), shapes)
    slots = jax.eval_shape(gradient_slots, compute)
    bias = jax.eval_shape(lambda: initial_router_bias(MODEL))
    tokens = jnp.zeros((ROWS, SEQ), jnp.int32)

    def pullback(compute, slots, bias):
        def loss(slots):
            model = nnx.merge(graphdef, attach_slots(compute, slots))
            return training_loss(model, tokens, bias, WEIGHTS, LocalExchange(), recompute)[0]

        return jax.vjp(loss, slots)[1]

    kept = [(x.dtype, x.shape) for x in jax.tree.leaves(jax.eval_shape(pullback, compute, slots, bias))]
    eight_bits = [shape for dtype, shape in kept if dtype in (E4M3, jnp.uint8)]
    assert any(shape[-1:] == (2 * MODEL.d_ff,) for shape in eight_bits), "the SwiGLU's input is kept"
    wide = [shape for dtype, shape in kept if dtype in (jnp.bfloat16, jnp.float32)]
    many = [shape for shape in wide if len(shape) >= 3 and max(shape[-2], shape[-3] * shape[-2]) >= ROWS * SEQ]
    assert many, "the residual stream is kept"
    widths = {MODEL.d_ff, 2 * MODEL.d_ff, MODEL.d_ff_expert, 2 * MODEL.d_ff_expert}
    assert not [shape for shape in many if shape[-1] in widths]


@pytest.fixture(scope="module")
def start():
    """The state that every run starts from: the same on any mesh and in any precision."""
    config = make_config("fp8", TRAINED)
    return jax.device_get(random_state(config, make_mesh(config)))


def run(config: Config, start: TrainState, steps: int) -> tuple[list, Callable]:
    """Losses, and a function to the held-out loss afterwards."""
    rng = np.random.default_rng(0)
    frequent = rng.integers(0, config.model.vocab_size, 20)
    mesh = make_mesh(config)
    state = jax.device_put(start, state_shardings(config, mesh))
    step, losses = make_step(config, mesh), []
    for _ in range(steps):
        tokens = frequent[rng.integers(0, 20, (MICROBATCHES, ROWS, SEQ))].astype(np.int32)
        state, report = step(state, tokens, KNOBS)
        assert report.applied
        losses.append(float(report.losses.loss))

    def held_out() -> float:
        evaluate = make_evaluation(config, mesh)
        return float(evaluate(state.params, state.router_bias, tokens[0], np.ones(ROWS, np.float32))) / ROWS

    return losses, held_out


@pytest.fixture(scope="module")
def one_device(start):
    return run(make_config("fp8", TRAINED), start, 30)


def test_thirty_steps_in_fp8_give_the_losses_of_bf16(one_device, start):
    (losses, held_out), (expected, expected_held_out) = one_device, run(make_config("bf16", TRAINED), start, 30)
    assert losses[-1] < losses[0] - 0.5
    np.testing.assert_allclose(losses, expected, rtol=0.005)
    np.testing.assert_allclose(held_out(), expected_held_out(), rtol=0.005)


def test_a_mesh_gives_the_losses_of_one_device(one_device, start):
    config = make_config("fp8", TRAINED, devices=8, data=2, node=2, gpu=2, expert_buffer_factor=4.0)
    losses, _ = run(config, start, 6)
    # Not to float32's last bits: tiles of a weight gradient run along tokens, and each device has other tokens side
    # by side, so that their scales differ; an expert's rows come in another order.
    np.testing.assert_allclose(losses, one_device[0][:6], rtol=2e-3)
