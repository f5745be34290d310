"""The exchange over two links computes what a dense layer does, and sends no more than the routing needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import MoE
from dsv3_jax.parallel.expert_hierarchical import HierarchicalExchange, most_nodes
from dsv3_jax.parallel.mesh import vary_over

AXES = ("node", "gpu")
MESHES = [(2, 4), (4, 2)]
MODEL = ModelConfig(
    d_model=8, num_experts=32, num_groups=8, top_k_groups=3, top_k=5, d_ff_expert=6, init_std=0.5, num_shared_experts=1
)
ROWS, SEQ = 8, 12
BIAS = {
    "balanced": np.zeros(32),
    "skewed": 0.02 * np.arange(32)[::-1],
    "all to one node": 2.0 * (np.arange(32) < 8),
}


def mesh_of(shape):
    return Mesh(np.asarray(jax.devices()[:8]).reshape(shape), AXES)


def exchange_on(shape, model, factor=float(MODEL.num_experts)):
    return HierarchicalExchange(*AXES, AXES, most_nodes(model, shape[0]), factor)


def weights_of(model):
    graphdef, state = nnx.split(MoE(model, nnx.Rngs(0)))
    return graphdef, nnx.to_pure_dict(state)


def hierarchical(model, shape, factor=float(MODEL.num_experts)):
    """Compiled (params, x, bias, target) -> output, overflow, gradients of sum(output * target)."""
    graphdef, params = weights_of(model)
    specs = jax.tree_util.tree_map_with_path(
        lambda path, _: PartitionSpec(AXES if path[0].key == "experts" else None), params
    )

    def device(params, x, bias, target):
        params = jax.tree.map(lambda p: vary_over(p, AXES), params)

        def loss(params, x):
            y, stats = nnx.merge(graphdef, params)(x, bias, exchange_on(shape, model, factor))
            return (y * target).sum(), (y, stats.overflow)

        gradients, (y, overflow) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        shared = {name: jax.lax.psum(g, AXES) for name, g in gradients[0].items() if name != "experts"}
        return y, jax.lax.psum(overflow, AXES), ({**gradients[0], **shared}, gradients[1])

    rows = PartitionSpec(AXES)
    run = jax.shard_map(
        device,
        mesh=mesh_of(shape),
        in_specs=(specs, rows, PartitionSpec(), rows),
        out_specs=(rows, PartitionSpec(), (specs, rows)),
    )
    return jax.jit(run)


def dense(model):
    """The same by every expert on every token, in plain arithmetic."""

    def feed_forward(x, gate_up, down):
        gate, up = jnp.split(x @ gate_up, 2, axis=-1)
        return (gate * jax.nn.sigmoid(gate) * up) @ down

    def output(params, x, bias):
        scores = jax.nn.sigmoid(x @ params["router"]["kernel"])
        routing = nnx.merge(weights_of(model)[0], params).router(x, bias)
        chosen = scores * (routing.experts[..., None] == jnp.arange(model.num_experts)).any(axis=-2)
        weights = model.routed_scaling_factor * chosen / chosen.sum(axis=-1, keepdims=True)
        each = jax.vmap(feed_forward, in_axes=(None, 0, 0))(x, params["experts"]["gate_up"], params["experts"]["down"])
        shared = params["shared"]
        y = jnp.einsum("ebsd,bse->bsd", each, weights)
        return y + feed_forward(x, shared["gate_up"]["kernel"], shared["down"]["kernel"])

    def run(params, x, bias, target):
        loss = lambda params, x: (output(params, x, bias) * target).sum()  # noqa: E731
        return output(params, x, bias), jax.grad(loss, argnums=(0, 1))(params, x)

    return jax.jit(run)


def arrays(model, rows, seq, seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((rows, seq, model.d_model)).astype(np.float32) for _ in range(2)]


def assert_equal(model, compiled, expected, rows, seq, bias, seed=0):
    params = weights_of(model)[1]
    x, target = arrays(model, rows, seq, seed)
    bias = np.float32(bias)
    with jax.default_matmul_precision("highest"):
        y, overflow, gradients = compiled(params, x, bias, target)
        want_y, want = expected(params, x, bias, target)
    assert int(overflow) == 0
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731
    close(y, want_y)
    jax.tree.map(close, gradients, want)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def compiled(request):
    return hierarchical(MODEL, request.param)


@pytest.fixture(scope="module")
def reference():
    return dense(MODEL)


@pytest.mark.parametrize("kind", BIAS)
def test_outputs_and_gradients_equal_the_dense_layers(compiled, reference, kind):
    assert_equal(MODEL, compiled, reference, ROWS, SEQ, BIAS[kind])
