"""AdamW against optax's own, the stored type of its moments, and what it does not decay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.config import ModelConfig, OptimizerConfig
from dsv3_jax.train.optimizer import adamw_update, decayed, init_moments
from dsv3_jax.train.state import model_structure

NARROW = OptimizerConfig(weight_decay=0.1)
WIDE = dataclasses.replace(NARROW, moments="float32")
RATES = [0.0, 1e-2, 5e-3, 2e-3, 1e-3]


@pytest.fixture(scope="module")
def params():
    kernel = jax.random.normal(jax.random.key(0), (4, 5))
    return {"ffn": {"kernel": kernel}, "norm": {"scale": jnp.linspace(0.5, 2, 5)}}


@pytest.fixture(scope="module")
def gradients(params):
    def at(step: int):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(step), len(leaves))
        return tree.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])

    return [at(step) for step in range(len(RATES))]


def trained(config: OptimizerConfig, params, gradients):
    update = jax.jit(adamw_update, static_argnums=0)
    moments = init_moments(config, params)
    for rate, gradient in zip(RATES, gradients, strict=True):
        params, moments = update(config, params, gradient, moments, jnp.float32(rate))
    return params, moments


def test_with_float32_moments_it_is_optax_adamw(params, gradients):
    ours, moments = trained(WIDE, params, gradients)
    theirs, state = params, None
    for rate, gradient in zip(RATES, gradients, strict=True):
        mask = {"ffn": {"kernel": True}, "norm": {"scale": False}}
        adamw = optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=mask)
        state = adamw.init(theirs) if state is None else state
        updates, state = adamw.update(gradient, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(moments.mu["ffn"]["kernel"], state[0].mu["ffn"]["kernel"], rtol=1e-6)
    assert int(moments.count) == len(RATES)


def test_bf16_moments_are_stored_so_and_barely_change_the_weights(params, gradients):
    ours, moments = trained(NARROW, params, gradients)
    for stored in (moments, init_moments(NARROW, params)):
        assert {x.dtype for x in jax.tree.leaves((stored.mu, stored.nu))} == {jnp.dtype(jnp.bfloat16)}
    wide, _ = trained(WIDE, params, gradients)
    for a, b, start in zip(*map(jax.tree.leaves, (ours, wide, params)), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.02 * float(jnp.abs(b - start).max()))


def test_without_a_gradient_matrices_shrink_and_norm_gains_stay(params):
    zero = jax.tree.map(jnp.zeros_like, params)
    new, _ = adamw_update(WIDE, params, zero, init_moments(WIDE, params), jnp.float32(0.5))
    np.testing.assert_allclose(new["ffn"]["kernel"], params["ffn"]["kernel"] * (1 - 0.5 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(new["norm"]["scale"], params["norm"]["scale"])


def test_of_the_model_all_but_the_norm_gains_decay():
    _, shapes = model_structure(ModelConfig())
    for path, decays in jax.tree_util.tree_leaves_with_path(decayed(shapes)):
        name = jax.tree_util.keystr(path)
        assert decays == ("norm" not in name), name
