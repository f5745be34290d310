"""A layer's passes apart give the gradients of the passes together, and compute nothing twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import LocalExchange
from dsv3_jax.model.rope import rotations
from dsv3_jax.model.transformer import DecoderLayer, recomputed
from dsv3_jax.ops.weights import attach_slots, cast_weights, gradient_slots, name_weights
from dsv3_jax.parallel import pipeline_layer

MODEL = ModelConfig(
    vocab_size=64, d_model=32, num_layers=1, num_dense_layers=0, num_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, q_lora_rank=16, kv_lora_rank=16, num_experts=8, num_groups=2, top_k_groups=1, top_k=2,
    d_ff_expert=16, init_std=0.08,
)  # fmt: skip


def products(compiled):
    return compiled.as_text().count(" dot(")


@pytest.mark.parametrize(("precision", "recompute"), [("fp32", "none"), ("fp8", "report")])
def test_forward_input_and_weight_passes_are_the_layers_gradients(precision, recompute):
    graphdef, state = nnx.split(DecoderLayer(MODEL, True, nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    compute = cast_weights(params, precision)
    dtype = jnp.float32 if precision == "fp32" else jnp.bfloat16
    x, dy = (jax.random.normal(jax.random.key(k), (2, 16, 32)).astype(dtype) for k in (1, 2))
    context = (rotations(MODEL, jnp.arange(16)), jnp.zeros(8))

    def apply(x, tree, context):
        y, stats = nnx.merge(graphdef, tree)(x, *context, LocalExchange())
        return (y, stats.sequence_balance), stats.load

    @jax.jit
    def together(compute, x, dy, context):
        def whole(x, slots):
            return recomputed(lambda x, s: apply(x, attach_slots(compute, s), context), recompute)(x, slots)

        (y, _), pullback, load = jax.vjp(whole, x, gradient_slots(compute), has_aux=True)
        return y, load, *pullback((dy, jnp.float32(1)))

    def nested(flat):
        path = lambda p: jax.tree_util.keystr(p, simple=True, separator="/")  # noqa: E731
        return jax.tree_util.tree_map_with_path(lambda p, _: flat[path(p)], params)

    layer = recomputed(lambda x, weights, context: apply(x, nested(weights), context), recompute)
    forward = jax.jit(lambda c, x, context: pipeline_layer.forward(layer, x, name_weights(c), context))
    backward = jax.jit(lambda c, kept, dy, context: pipeline_layer.backward(layer, kept, dy, name_weights(c), context))
    weight = jax.jit(lambda logs: {name: product.compute() for name, product in logs.items()})

    y, load, dx, gradients = together(compute, x, dy, context)
    got_y, kept, got_load = forward(compute, x, context)
    got_dx, small, logs = backward(compute, kept, dy, context)
    assert set(small) == {name for name, w in name_weights(compute).items() if isinstance(w, jax.Array)}
    as_float = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float32), tree)  # noqa: E731
    # XLA rounds to bf16 at other places in other programs.
    tolerance = 1e-6 if precision == "fp32" else 2e-2
    np.testing.assert_array_equal(got_load, load)
    pairs = [
        (got_y, y),
        (got_dx, dx),
        *zip(*map(jax.tree.leaves, (nested(small | weight(logs)), gradients)), strict=True),
    ]
    for got, want in as_float(pairs):
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())
    if recompute == "none":
        apart = [(forward, compute, x, context), (backward, compute, kept, dy, context), (weight, logs)]
        counts = [products(f.lower(*given).compile()) for f, *given in apart]
        # Three for each of nine linears and the router, whose gradients are not deferred; attention's; the sum over
        # tiles in each of the experts' two weight gradients.
        assert counts[2] == 9 + 2
        assert sum(counts) <= products(together.lower(compute, x, dy, context).compile()) + 1
