"""The expert exchange over 8 emulated devices computes what one device does on all tokens, however unbalanced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.model.moe import LocalExchange, swiglu
from dsv3_jax.ops.feed_forward import fp8_routed_feed_forward
from dsv3_jax.ops.grouped_matmul import grouped_matmul
from dsv3_jax.ops.linear import quantize_input
from dsv3_jax.ops.quantize import TILE, quantize_blocks
from dsv3_jax.ops.weights import FP8Weight
from dsv3_jax.parallel.expert import FlatExchange
from dsv3_jax.parallel.expert_hierarchical import HierarchicalExchange

DEVICES, TOKENS, TOP_K, EXPERTS, D, D_FF = 8, 12, 3, 16, 8, 6
AXES = ("node", "gpu")


def feed_forward(weights, x, gates, route):
    hidden = swiglu(grouped_matmul(route.dispatch(x), weights["gate_up"], route.tile_group))
    weighted = hidden * route.dispatch_choices(gates)[:, None]
    return route.combine(grouped_matmul(weighted, weights["down"], route.tile_group))


def loss_of(exchange, axes=()):
    def loss(weights, x, gates, experts, target):
        route, overflow = exchange.route(experts, EXPERTS, None)
        y = feed_forward(weights, x, gates, route)
        total = (y * target).sum()
        # Each device differentiates its own share; the gradients of other devices' experts come by the exchange.
        return total, (y, overflow)

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


@pytest.fixture(scope="module")
def both():
    """Compiled (weights, x, gates, experts, target) on 8 devices with room for everything, and on one."""
    mesh = Mesh(np.asarray(jax.devices()[:DEVICES]).reshape(2, 4), AXES)
    spec = PartitionSpec(AXES)

    def device(*args):
        (_, (y, overflow)), gradients = loss_of(FlatExchange(AXES, AXES, float(EXPERTS)))(*args)
        return y, overflow[None], gradients

    spread = jax.jit(jax.shard_map(device, mesh=mesh, in_specs=spec, out_specs=spec))
    return spread, jax.jit(loss_of(LocalExchange()))


def routing(kind, rng):
    if kind == "random":
        return np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(DEVICES * TOKENS)])
    first = {"first experts": 0, "last experts": EXPERTS - TOP_K}[kind]
    return np.tile(np.arange(first, first + TOP_K), (DEVICES * TOKENS, 1))


@pytest.mark.parametrize("kind", ["random", "first experts", "last experts"])
def test_output_and_gradients_equal_those_of_one_device(both, kind):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    weights = {"gate_up": normal(EXPERTS, D, 2 * D_FF), "down": normal(EXPERTS, D_FF, D)}
    x, target = normal(DEVICES * TOKENS, D), normal(DEVICES * TOKENS, D)
    gates = rng.random((DEVICES * TOKENS, TOP_K), np.float32)
    experts = routing(kind, rng).astype(np.int32)
    spread, alone = both
    y, overflow, gradients = spread(weights, x, gates, experts, target)
    (_, (expected, _)), expected_gradients = alone(weights, x, gates, experts, target)
    assert not np.asarray(overflow).any()
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)  # noqa: E731
    jax.tree.map(compare, gradients, expected_gradients)


def fp8_loss_of(exchange):
    def loss(weights, x, gates, experts, target):
        route, _ = exchange.route(experts, EXPERTS, TILE)
        fp8 = {name: FP8Weight(quantize_blocks(w), w) for name, w in weights.items()}
        y = fp8_routed_feed_forward(quantize_input(x, power_of_2=True), gates, route, fp8["gate_up"], fp8["down"])
        return (y.astype(np.float32) * target).sum(), y

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


# The hierarchical exchange rounds a device's and a node's sums to the type of the outputs, so that only with float32
# ones it must give what one device does.
@pytest.mark.parametrize(
    ("exchange", "dtype"),
    [
        (FlatExchange(AXES, AXES, float(EXPERTS)), jnp.bfloat16),
        (HierarchicalExchange(*AXES, AXES, 2, float(EXPERTS)), jnp.float32),
    ],
    ids=["flat", "hierarchical"],
)
def test_fp8_rows_travel_in_e4m3_and_come_out_as_on_one_device(exchange, dtype):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    weights = {"gate_up": normal(EXPERTS, D, 2 * D_FF), "down": normal(EXPERTS, D_FF, D)}
    x, target = normal(DEVICES * TOKENS, D), normal(DEVICES * TOKENS, D)
    gates = rng.random((DEVICES * TOKENS, TOP_K), np.float32)
    arguments = (weights, x.astype(dtype), gates, routing("random", rng).astype(np.int32), target)
    mesh = Mesh(np.asarray(jax.devices()[:DEVICES]).reshape(2, 4), AXES)
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


@pytest.mark.parametrize(
    ("exchange", "sent"),
    # Rows, weights and the way back, and the same backward; the hierarchical one over two links, and experts' numbers.
    [
        (FlatExchange(AXES, ("data", *AXES), 2.0), 3 + 3),
        (HierarchicalExchange(*AXES, ("data", *AXES), 2, 2.0), 2 * (4 + 3)),
    ],
    ids=["flat", "hierarchical"],
)
def test_on_gpus_rows_travel_by_ragged_all_to_all(exchange, sent, monkeypatch):
    """Lowered for CUDA, not run."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    axes = ("data", *AXES)
    spec = PartitionSpec(axes)

    def device(x, gates, experts):
        route, _ = exchange.route(experts, EXPERTS, None)
        there_and_back = lambda x, g: route.combine(route.dispatch(x) * route.dispatch_choices(g)[:, None])  # noqa: E731
        return jax.grad(lambda x, g: (there_and_back(x, g) ** 2).sum(), argnums=(0, 1))(x, gates)

    mesh = Mesh(np.asarray(jax.devices()[:DEVICES]).reshape(2, 2, 2), axes)
    run = jax.jit(jax.shard_map(device, mesh=mesh, in_specs=spec, out_specs=spec))
    traced = run.trace(jnp.zeros((64, D)), jnp.zeros((64, TOP_K)), jnp.zeros((64, TOP_K), jnp.int32))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("ragged_all_to_all") == sent
