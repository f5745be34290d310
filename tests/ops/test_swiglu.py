"""SwiGLU's own backward pass against automatic differentiation of its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.ops.swiglu import swiglu


def formula(gate_up, weights):
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return gate / (1 + jnp.exp(-gate)) * up * (1 if weights is None else weights)


def operands(weighted: bool):
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.uniform(keys[1], (7, 1)) if weighted else None
    return 3 * jax.random.normal(keys[0], (7, 12)), weights, jax.random.normal(keys[2], (7, 6))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_output_and_gradients_are_those_of_the_formula(weighted):
    gate_up, weights, d_out = operands(weighted)
    ours, pullback = jax.vjp(swiglu, gate_up, weights)
    expected, expected_pullback = jax.vjp(formula, gate_up, weights)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(pullback(d_out)), jax.tree.leaves(expected_pullback(d_out)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_in_bf16_only_the_results_are_rounded():
    gate_up, weights, d_out = (x.astype(jnp.bfloat16) for x in operands(True))
    weights = weights.astype(jnp.float32)
    ours, pullback = jax.vjp(swiglu, gate_up, weights)
    expected, expected_pullback = jax.vjp(formula, gate_up.astype(jnp.float32), weights)
    pairs = zip((ours, *pullback(d_out)), (expected, *expected_pullback(d_out.astype(jnp.float32))), strict=True)
    # Half a unit in the last of bfloat16's 8 bits, and float32's own rounding.
    for a, b in pairs:
        np.testing.assert_allclose(np.float32(a), b, rtol=2**-8, atol=1e-5)


def test_the_backward_pass_keeps_the_inputs_alone():
    gate_up, weights, _ = operands(True)
    kept = jax.tree.leaves(jax.vjp(swiglu, gate_up, weights)[1])
    assert sorted(x.shape for x in kept) == sorted([gate_up.shape, weights.shape])
