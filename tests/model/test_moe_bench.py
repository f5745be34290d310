"""What the benchmark of a MoE layer times is the layer."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax.model.moe_bench import CHOICES, LAYER, inputs, layer_functions

SMALL = dataclasses.replace(LAYER, d_model=256, d_ff_expert=128)
TOKENS = 64


def relative(x, y):
    x, y = (np.asarray(v, np.float32) for v in (x, y))
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.fixture(scope="module")
def results():
    given = inputs(SMALL, TOKENS)
    layers = {precision: layer_functions(SMALL, precision) for precision in ("bf16", "fp8")}
    return {
        name: [functions[what](compute, *given) for what in functions] for name, (compute, functions) in layers.items()
    }


def test_bf16_is_every_expert_twice_and_the_shared_one(results):
    compute, _ = layer_functions(SMALL, "bf16")
    x, weights, _ = (np.asarray(v, np.float32) for v in inputs(SMALL, TOKENS))
    gate_up, down = (np.asarray(compute["experts"][name], np.float32) for name in ("gate_up", "down"))

    def feed_forward(gate_up, down, scale):
        gate, up = np.split(x @ gate_up, 2, axis=-1)
        return (gate / (1 + np.exp(-gate)) * up * scale) @ down

    shared = (np.asarray(compute["shared"][name]["kernel"], np.float32) for name in ("gate_up", "down"))
    expected = feed_forward(*shared, 1) + sum(
        feed_forward(gate_up[j % SMALL.num_experts], down[j % SMALL.num_experts], weights[:, j : j + 1])
        for j in range(CHOICES)
    )
    assert relative(results["bf16"][0], expected) < 0.01  # bf16 rounds inputs, the SwiGLU and the output


def test_fp8_is_bf16_up_to_its_rounding_and_gradients_are_float32(results):
    forward, (again, gradients) = results["fp8"]
    np.testing.assert_array_equal(np.asarray(again), np.asarray(forward))
    bf16 = results["bf16"][1]
    # e4m3 rounds each operand by 2.6% on average, and a layer multiplies twice.
    assert relative(forward, bf16[0]) < 0.1
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(bf16[1]), strict=True):
        assert ours.dtype == theirs.dtype
        assert relative(ours, theirs) < 0.1
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients[0])} == {np.dtype("float32")}
