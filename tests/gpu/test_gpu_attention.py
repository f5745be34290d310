"""The Hopper kernels of attention on a GPU, against the reference in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_softmax import parts, turns

from dsv3_jax.ops import hopper
from dsv3_jax.ops.attention import causal_attention
from dsv3_jax.ops.attention.mosaic_gpu import WIDTHS

refusal = hopper.device_refusal()
pytestmark = pytest.mark.skipif(refusal is not None, reason=str(refusal))

BATCH, SEQ, HEADS, SCALE = 2, 1000, 4, 0.07  # the last tiles of queries and of keys are no whole ones


@pytest.mark.parametrize("segmented", [False, True])
def test_output_and_gradients_are_those_of_the_reference(segmented):
    """Norms differ by half of one percent at most.

    Operands are the same numbers. Rotated queries, probabilities, gradients of scores and results are rounded to
    bfloat16, each by 2^-9 (0.2%) at most: all four together 0.8%, and independent as they are 0.2% to 0.3% of the norm.
    """
    nope, rope, v = WIDTHS
    shapes = [(HEADS, nope + rope), (HEADS, nope + v), (rope,), (HEADS, v)]
    rng = np.random.default_rng(0)
    *inputs, d_out = (jnp.asarray(rng.standard_normal((BATCH, SEQ, *s)), jnp.bfloat16) for s in shapes)
    # Samples that end within a tile and at its end, that fill several tiles, and ids that do not ascend.
    ids = jnp.asarray(np.repeat([[3, 1, 7, 2], [0, 0, 5, 5]], [10, 118, 512, 360], axis=1), jnp.int32)

    def both(implementation, inputs, d_out):
        @jax.jit
        def run(inputs, d_out, ids):
            def attention(*x):
                return causal_attention(*x, turns(SEQ, rope), SCALE, implementation, ids if segmented else None)

            out, pullback = jax.vjp(attention, *inputs)
            return out, *pullback(d_out)

        return run(inputs, d_out, ids)

    got = both("mosaic_gpu", inputs, d_out)
    with jax.default_matmul_precision("highest"):
        wanted = both("reference", [x.astype(jnp.float32) for x in inputs], d_out.astype(jnp.float32))
    wanted = parts(nope, *wanted)
    for name, x in parts(nope, *got).items():
        assert x.dtype == jnp.bfloat16
        off = x.astype(jnp.float32) - wanted[name]
        assert jnp.linalg.norm(off) < 5e-3 * jnp.linalg.norm(wanted[name]), name
