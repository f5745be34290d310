"""The Hopper kernels that select experts and copy their rows, on a GPU, against XLA's sort and gather."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.ops.permute import mosaic_gpu
from dsv3_jax.ops.quantize import E4M3
from dsv3_jax.ops.top_k import grouped_top_k

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


@pytest.mark.parametrize(("experts", "top_k", "groups", "kept"), [(256, 8, 8, 4), (64, 6, 8, 4), (256, 8, 1, 1)])
def test_selection(experts, top_k, groups, kept):
    scores = jax.random.uniform(jax.random.key(0), (4096, experts))
    scores = scores.at[:64].set(jnp.round(4 * scores[:64]))  # with ties
    ours = grouped_top_k(scores, top_k, groups, kept, "mosaic_gpu")
    np.testing.assert_array_equal(ours, grouped_top_k(scores, top_k, groups, kept, "reference"))


@pytest.mark.parametrize("dtype", [E4M3, jnp.bfloat16])
def test_rows(dtype):
    x = jax.random.normal(jax.random.key(0), (4096, 7168)).astype(dtype)
    index = jax.random.randint(jax.random.key(1), (33280,), 0, 4200, jnp.int32)
    wanted = jnp.take(x.astype(jnp.float32), index, axis=0, mode="fill", fill_value=0)
    assert (mosaic_gpu.take_rows(x, index).astype(jnp.float32) == wanted).all()
