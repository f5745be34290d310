"""What jax.checkpoint keeps of 8-bit floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.ops.kept import keep_bits


@pytest.mark.parametrize("name", [keep_bits, checkpoint_name])
def test_values_above_240_survive_being_kept_only_as_bytes(name):
    def product(x):
        rounded = name(jax.lax.stop_gradient(x).astype(jnp.float8_e4m3fn), "kept")
        return (rounded.astype(jnp.float32) * x).sum()

    policy = jax.checkpoint_policies.save_only_these_names("kept")
    gradient = jax.jit(jax.grad(jax.checkpoint(product, policy=policy)))(jnp.array([448.0, 100.0]))
    # The control: if it fails, jax has mended this, and bytes are no longer needed.
    np.testing.assert_array_equal(gradient, [448, 96] if name is keep_bits else [np.nan, 96])


def test_other_types_are_named_as_they_are():
    x = jnp.arange(3.0)
    assert "bitcast" not in str(jax.make_jaxpr(lambda x: keep_bits(x, "kept"))(x))
