"""The expert exchange computes what a dense layer does, and sends no more rows than the routing needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import LocalExchange, MoE, select_experts
from dsv3_jax.ops.feed_forward import fp8_routed_feed_forward
from dsv3_jax.ops.linear import quantize_input
from dsv3_jax.ops.quantize import TILE, quantize_blocks
from dsv3_jax.ops.weights import FP8Weight
from dsv3_jax.parallel.expert import ExpertExchange, most_nodes, reach_of
from dsv3_jax.parallel.mesh import vary_over
from dsv3_jax.parallel.traffic import rows_sent_flat, rows_sent_hierarchical, rows_sent_per_expert

AXES = ("node", "gpu")
LEVELS = [(2, 4), (4, 2), (8,)]
"""Devices of each level; one level goes over both axes of a mesh at once."""
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
    return Mesh(np.asarray(jax.devices()[:8]).reshape(grid(shape)), AXES)


def grid(shape):
    return shape if len(shape) == 2 else (2, 4)


def exchange_on(shape, model, factor=float(MODEL.num_experts)):
    levels = (AXES,) if len(shape) == 1 else tuple((axis,) for axis in AXES)
    return ExpertExchange(levels, reach_of(model, shape), AXES, factor)


def weights_of(model):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MoE(model, nnx.Rngs(0))))
    rng = np.random.default_rng(0)  # the initializers would take seconds to compile
    weight = lambda leaf: np.float32(model.init_std * rng.standard_normal(leaf.shape))  # noqa: E731
    return graphdef, jax.tree.map(weight, nnx.to_pure_dict(state))


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


@pytest.fixture(scope="module", params=LEVELS, ids=str)
def compiled(request):
    return hierarchical(MODEL, request.param)


@pytest.fixture(scope="module")
def reference():
    return dense(MODEL)


@pytest.mark.parametrize("kind", BIAS)
def test_outputs_and_gradients_equal_the_dense_layers(compiled, reference, kind):
    assert_equal(MODEL, compiled, reference, ROWS, SEQ, BIAS[kind])


small = st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from(LEVELS), st.integers(0, 2**31))


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


@pytest.mark.parametrize("shape", LEVELS, ids=str)
def test_rows_sent_are_those_counted_from_the_routing(shape):
    experts = np.concatenate([select(BIAS[kind], seed) for seed, kind in enumerate(BIAS)])
    experts = np.random.default_rng(0).permutation(experts)  # so that every device has tokens of each kind
    nodes, gpus = grid(shape)

    def device(experts):
        route, overflow = exchange_on(shape, MODEL).route(experts, MODEL.num_experts, None)
        sent = {hop.level: hop.slots.sizes for hop in route.hops}
        return jax.tree.map(lambda x: x[None, None], (sent, overflow))

    spec = PartitionSpec(AXES)
    run = jax.shard_map(device, mesh=mesh_of(shape), in_specs=spec, out_specs=PartitionSpec(*AXES))
    sent, overflow = jax.jit(run)(experts)
    assert not np.asarray(overflow).any()
    by_device = experts.reshape(nodes, gpus, -1, MODEL.top_k)
    per_expert = rows_sent_per_expert(by_device, MODEL.num_experts)
    own_node, own_gpu = np.eye(nodes, dtype=bool)[:, None], np.eye(gpus, dtype=bool)[None]
    if len(shape) == 2:
        counted = rows_sent_hierarchical(by_device, MODEL.num_experts)
        np.testing.assert_array_equal(np.where(own_node, 0, sent["node",]).sum(-1), counted.node)
        np.testing.assert_array_equal(np.where(own_gpu, 0, sent["gpu",]).sum(-1), counted.gpu)
        node = by_device // (MODEL.num_experts // nodes)
        distinct = [len({*token} - {n}) for n in range(nodes) for token in node[n].reshape(-1, MODEL.top_k).tolist()]
        assert counted.node.sum() == sum(distinct), "a row for each destination node other than the token's own"
        assert counted.node.sum() < per_expert.node.sum()
    else:
        counted = rows_sent_flat(by_device, MODEL.num_experts)
        to = sent[AXES].reshape(nodes, gpus, nodes, gpus)
        np.testing.assert_array_equal(np.where(own_node[..., None], 0, to).sum((2, 3)), counted.node)
        np.testing.assert_array_equal(to.sum((2, 3)) - counted.node - counted.gpu, own_rows(by_device))
    assert (counted.node + counted.gpu).sum() < (per_expert.node + per_expert.gpu).sum()


def own_rows(by_device):
    """Tokens of each device that have an expert on it."""
    nodes, gpus = by_device.shape[:2]
    device = by_device // (MODEL.num_experts // (nodes * gpus))
    return (device == np.arange(nodes * gpus).reshape(nodes, gpus, 1, 1)).any(-1).sum(-1)


def select(bias, seed):
    """Choices of a router, [64, top_k]."""
    logits = np.random.default_rng(seed).standard_normal((64, MODEL.num_experts))
    scores = 1 / (1 + np.exp(-logits)) + bias
    return np.asarray(jax.jit(select_experts, static_argnums=1)(scores, MODEL), np.int32)


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

    # Each device has 8 tokens for the first node and a slab of 8; both devices there have 32 rows for the first one and
    # a slab of 16; that one has room for 8 tokens' 4 choices, and 32 rows of 4.
    assert overflow(1.0) == 2 * (32 - 16) + (4 * 32 - 32)
    assert overflow(4.0) == 4 * 64 - 4 * 32


FP8 = ModelConfig(d_model=8, d_ff_expert=6, num_experts=16, num_groups=1, top_k_groups=1, top_k=3)
TOKENS = 12


def fp8_loss_of(exchange):
    def loss(weights, x, gates, experts, target):
        route, _ = exchange.route(experts, FP8.num_experts, TILE)
        fp8 = {name: FP8Weight(quantize_blocks(w), w) for name, w in weights.items()}
        y = fp8_routed_feed_forward(quantize_input(x, power_of_2=True), gates, route, fp8["gate_up"], fp8["down"])
        return (y.astype(np.float32) * target).sum(), y

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


# The exchange rounds a device's and a node's sums to the type of the outputs: with float32 ones it must give what one
# device does.
@pytest.mark.parametrize("shape", [(8,), (2, 4)], ids=str)
def test_fp8_rows_travel_in_e4m3_and_come_out_as_on_one_device(shape):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    width, hidden = FP8.d_model, FP8.d_ff_expert
    weights = {"gate_up": normal(16, width, 2 * hidden), "down": normal(16, hidden, width)}
    x, target = normal(8 * TOKENS, width), normal(8 * TOKENS, width)
    gates = rng.random((8 * TOKENS, FP8.top_k), np.float32)
    experts = np.stack([rng.permutation(16)[: FP8.top_k] for _ in range(8 * TOKENS)]).astype(np.int32)
    arguments, exchange = (weights, x, gates, experts, target), exchange_on(shape, FP8)
    mesh = mesh_of(shape)
    spec = PartitionSpec(AXES)

    def device(*args):
        (_, y), gradients = fp8_loss_of(exchange)(*args)
        return y, gradients

    spread = jax.shard_map(device, mesh=mesh, in_specs=spec, out_specs=spec)
    y, (d_weights, dx, d_gates) = jax.jit(spread)(*arguments)
    (_, want), (want_weights, want_dx, want_gates) = jax.jit(fp8_loss_of(LocalExchange()))(*arguments)
    for got, expected in ((y, want), (dx, want_dx), (d_gates, want_gates)):
        np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=2**-7, atol=1e-2)
    for name in weights:  # an expert's rows come in another order, and so in other tiles of 128 if it has more
        np.testing.assert_allclose(d_weights[name], want_weights[name], rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("shape", [(8,), (2, 4)], ids=str)
def test_a_level_exchanges_rows_choices_and_weights_there_and_rows_back(shape):
    """And the same backward, but for the choices."""
    spec = PartitionSpec(AXES)

    def device(x, gates, experts):
        route, _ = exchange_on(shape, FP8).route(experts, FP8.num_experts, None)
        there_and_back = lambda x, g: route.combine(route.sort(route.send(x)) * route.dispatch_choices(g)[:, None])  # noqa: E731
        return jax.grad(lambda x, g: (there_and_back(x, g) ** 2).sum(), argnums=(0, 1))(x, gates)

    run = jax.shard_map(device, mesh=mesh_of(shape), in_specs=spec, out_specs=spec)
    choices = (64, FP8.top_k)
    x, gates, experts = np.zeros((64, FP8.d_model)), np.zeros(choices), np.zeros(choices, np.int32)
    traced = jax.jit(run).trace(x, gates, experts)
    assert str(traced.jaxpr).count("all_to_all[") == (4 + 3) * len(shape)
