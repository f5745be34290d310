"""The exchange over two links computes what a dense layer does, and sends no more than the routing needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import MoE, select_experts
from dsv3_jax.parallel.expert_hierarchical import HierarchicalExchange, most_nodes
from dsv3_jax.parallel.mesh import vary_over
from dsv3_jax.parallel.traffic import rows_sent_flat, rows_sent_hierarchical

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


small = st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from(MESHES), st.integers(0, 2**31))


@settings(max_examples=2, deadline=None, derandomize=True)
@given(small, st.data())
def test_any_sizes_equal_the_dense_layer(sizes, data):
    per_device, seq, shape, seed = sizes
    groups = data.draw(st.sampled_from([1, 2, 4]))
    reachable = data.draw(st.integers(1, groups))
    per_group = 8 * data.draw(st.integers(1, 2)) // groups
    model = ModelConfig(
        d_model=4, d_ff_expert=data.draw(st.integers(1, 5)), num_experts=groups * per_group, num_groups=groups,
        top_k_groups=reachable, top_k=data.draw(st.integers(1, min(6, reachable * per_group))), init_std=0.5,
    )  # fmt: skip
    bias = np.random.default_rng(seed).uniform(-0.2, 0.2, model.num_experts)
    assert_equal(model, hierarchical(model, shape), dense(model), 8 * per_device, seq, bias, seed)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_rows_sent_are_those_counted_from_the_routing(shape):
    experts = np.concatenate([select(BIAS[kind], seed) for seed, kind in enumerate(BIAS)])
    experts = np.random.default_rng(0).permutation(experts)  # so that every device has tokens of each kind

    def device(experts):
        route, overflow = exchange_on(shape, MODEL).route(experts, MODEL.num_experts, None)
        sent = {hop.axis: to_others(hop) for hop in (route.across, route.within)}
        return jax.tree.map(lambda x: x[None, None], (sent, overflow))

    spec = PartitionSpec(AXES)
    run = jax.shard_map(device, mesh=mesh_of(shape), in_specs=spec, out_specs=PartitionSpec(*AXES))
    sent, overflow = jax.jit(run)(experts)
    assert not np.asarray(overflow).any()
    by_device = experts.reshape(*shape, -1, MODEL.top_k)
    counted = rows_sent_hierarchical(by_device, MODEL.num_experts)
    np.testing.assert_array_equal(sent["node"], counted.node)
    np.testing.assert_array_equal(sent["gpu"], counted.gpu)
    node = by_device // (MODEL.num_experts // shape[0])
    distinct = [len({*token} - {n}) for n in range(shape[0]) for token in node[n].reshape(-1, MODEL.top_k).tolist()]
    assert counted.node.sum() == sum(distinct), "a row for each destination node other than the token's own"
    assert counted.node.sum() < rows_sent_flat(by_device, MODEL.num_experts).node.sum()


def to_others(hop):
    return hop.plan.send_sizes.at[jax.lax.axis_index(hop.axis)].set(0).sum()


def select(bias, seed):
    """Choices of a router, [64, top_k]."""
    logits = np.random.default_rng(seed).standard_normal((64, MODEL.num_experts))
    return np.asarray(select_experts(1 / (1 + np.exp(-logits)) + bias, MODEL), np.int32)


def test_most_nodes_follows_the_groups():
    assert [most_nodes(MODEL, nodes) for nodes in (1, 2, 4, 8, 16)] == [1, 2, 3, 3, 5]
    straddling = ModelConfig(num_experts=12, num_groups=4, top_k_groups=1, top_k=3)
    assert [most_nodes(straddling, nodes) for nodes in (2, 3, 6)] == [1, 2, 2]


def test_what_finds_no_room_is_counted_at_each_level():
    experts = np.tile(np.arange(4, dtype=np.int32), (64, 1))  # which all live on the first of 4 x 2 devices

    def overflow(factor):
        def device(experts):
            exchange = exchange_on((4, 2), MODEL, factor)
            return jax.lax.psum(exchange.route(experts, MODEL.num_experts, tile=1)[1], AXES)

        run = jax.shard_map(device, mesh=mesh_of((4, 2)), in_specs=PartitionSpec(AXES), out_specs=PartitionSpec())
        return int(jax.jit(run)(experts))

    # With room for a balanced load only, both devices of the first node want 32 rows and have room for 8 tokens on 3
    # nodes; the first device wants 2 x 24 rows and then 32 x 4, and has room for 8 tokens' 4 choices each time.
    assert overflow(1.0) == 2 * (32 - 24) + (48 - 32) + (128 - 32)
    assert overflow(8.0) == 0
