"""Selecting experts by maxima against sorting."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.ops.top_k import api, grouped_top_k, mosaic_gpu

SETTINGS = [(8, 8, 4, 256), (6, 8, 4, 64), (4, 1, 1, 64), (2, 4, 4, 32), (3, 2, 1, 16)]


@pytest.mark.parametrize(("top_k", "groups", "kept", "experts"), SETTINGS)
@pytest.mark.parametrize("distinct", [10**6, 5], ids=["all different", "ties"])
def test_the_kernel_selects_what_sorting_does(top_k, groups, kept, experts, distinct):
    random = np.random.default_rng(experts + groups)
    scores = jnp.asarray(random.integers(0, distinct, (128, experts)) / distinct, jnp.float32)
    got = mosaic_gpu.grouped_top_k(scores, top_k, groups, kept, interpret=plgpu.InterpretGPUParams())
    np.testing.assert_array_equal(got, api.reference(scores, top_k, groups, kept))


def test_scores_that_are_not_numbers_select_some_expert():
    scores = jnp.full((64, 32), jnp.nan)
    got = mosaic_gpu.grouped_top_k(scores, 4, 4, 2, interpret=plgpu.InterpretGPUParams())
    assert ((got >= 0) & (got < 32)).all()


@pytest.mark.parametrize(("top_k", "groups", "kept", "experts"), SETTINGS)
def test_the_kernel_lowers(top_k, groups, kept, experts):
    traced = jax.jit(lambda x: mosaic_gpu.grouped_top_k(x, top_k, groups, kept)).trace(
        jax.ShapeDtypeStruct((4096, experts), jnp.float32)
    )
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("scores", "groups", "says"),
    [
        (jnp.zeros((64, 256), jnp.bfloat16), 8, "takes float32"),
        (jnp.zeros((64, 512)), 8, "at most 256 experts"),
        (jnp.zeros((64, 48)), 8, "groups of a multiple of 8"),
        (jnp.zeros((63, 64)), 8, "in multiples of 64"),
    ],
)
def test_the_kernel_says_what_it_does_not_take(scores, groups, says):
    with pytest.raises(NotImplementedError, match=says):
        grouped_top_k(scores, 4, groups, 2, implementation="mosaic_gpu")
