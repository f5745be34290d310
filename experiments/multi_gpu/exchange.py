"""What the links carry, what the expert exchange gets of it, and a whole MoE layer."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Host, compile_all, print_table
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dsv3_jax.config import BatchConfig, Config, ModelConfig, ParallelConfig
from dsv3_jax.model.moe import Exchange, MoE, select_experts
from dsv3_jax.ops.linear import quantize_input
from dsv3_jax.ops.quantize import TILE, quantize_rows
from dsv3_jax.ops.timing import interleaved_medians
from dsv3_jax.ops.weights import attach_slots, cast_weights, gradient_slots
from dsv3_jax.parallel.mesh import make_mesh, vary_over
from dsv3_jax.parallel.traffic import rows_sent_flat, rows_sent_hierarchical
from dsv3_jax.planner.exchange import row_bytes
from dsv3_jax.train.step import exchange_for

AXES = ("data", "node", "gpu")
SPEC = PartitionSpec(AXES)
V3 = ModelConfig(
    d_model=7168, d_ff_expert=2048, num_experts=256, num_groups=8, top_k_groups=4, top_k=8, num_shared_experts=1,
    routed_scaling_factor=2.5,
)  # fmt: skip
TINY = replace(V3, d_model=128, d_ff_expert=128, num_experts=32)
BUFFER = 1.25


def measure_links(host: Host) -> float:
    """Prints what a device sends in collectives of equal parts; returns the best, in bytes a second."""
    mesh = Mesh(np.asarray(jax.devices()[: host.devices]), ("gpu",))
    elements = 2**16 if host.tiny else 2**28
    x = _placed(mesh, PartitionSpec("gpu"), lambda key: jnp.ones((host.devices * elements,), jnp.bfloat16))
    shift = [(i, (i + 1) % host.devices) for i in range(host.devices)]
    collectives = {
        "all_to_all": (partial(jax.lax.all_to_all, axis_name="gpu", split_axis=0, concat_axis=0, tiled=True), 1),
        "all_gather": (partial(jax.lax.all_gather, axis_name="gpu", tiled=True), host.devices),
        "ppermute": (partial(jax.lax.ppermute, axis_name="gpu", perm=shift), None),
    }
    calls, sent = {}, {}
    for name, (collective, copies) in collectives.items():
        run = jax.shard_map(collective, mesh=mesh, in_specs=PartitionSpec("gpu"), out_specs=PartitionSpec("gpu"))
        calls[name] = partial(jax.jit(run), x)
        others = (host.devices - 1) / host.devices
        sent[name] = 2 * elements * (1 if copies is None else copies * others)
    seconds = interleaved_medians(calls, jax.block_until_ready, **host.turns)
    rates = {name: sent[name] / seconds[name] for name in calls}
    rows = [
        [name, f"{sent[name] / 1e6:.0f}", f"{1e3 * seconds[name]:.2f}", f"{rate / 1e9:.0f}"]
        for name, rate in rates.items()
    ]
    print_table("Links, each way", ["collective", "MB a GPU sends", "ms", "GB/s"], rows)
    return max(rates.values())


def topologies(host: Host) -> dict[str, ParallelConfig]:
    """The exchanges to compare."""
    one = ParallelConfig(devices=host.devices, data=1, gpu=host.devices, expert_buffer_factor=BUFFER)
    if host.nodes == 1:
        return {"flat": one}
    return {"flat": one, "hierarchical": replace(one, node=host.nodes, gpu=host.devices // host.nodes)}


def measure_exchange(host: Host, peak: float) -> None:
    """Prints dispatch and combine of every exchange in BF16 and FP8."""
    model, tokens = (TINY, 256) if host.tiny else (V3, 4096)
    table = []
    for precision in ("bf16", "fp8"):
        for name, parallel in topologies(host).items():
            table.append([precision, name, *_exchange_cells(host, model, tokens, precision, parallel, peak)])
    headers = ["dispatch", "exchange", "rows a token to others", "dispatch ms", "GB/s a GPU", "of peak"]
    print_table(
        f"Expert exchange, {tokens} tokens a GPU, width {model.d_model}, {model.top_k} of {model.num_experts} experts",
        [*headers, "combine ms", "GB/s a GPU", "of peak"],
        table,
    )


def _exchange_cells(
    host: Host, model: ModelConfig, tokens: int, precision: str, parallel: ParallelConfig, peak: float
) -> list[str]:
    config = _config(model, parallel, precision, host.devices)
    mesh, tile = make_mesh(config), TILE if precision == "fp8" else None
    exchange = exchange_for(config, mesh, BUFFER)
    on_mesh = partial(jax.shard_map, mesh=mesh, in_specs=SPEC, out_specs=SPEC)

    def random(key: Array) -> tuple[Array, Array]:
        rows = host.devices * tokens
        scores = jax.nn.sigmoid(jax.random.normal(key, (rows, model.num_experts)))
        return jax.random.normal(key, (rows, model.d_model), jnp.bfloat16), select_experts(scores, model)

    x, experts = _placed(mesh, SPEC, random)

    def plan(experts: Array) -> tuple[Any, Array]:
        route, overflow = exchange.route(experts, model.num_experts, tile)
        return jax.tree.map(_varies, route), _varies(overflow)[None]

    def dispatch(x: Any, route: Any) -> Any:
        return jax.tree.map(lambda part: route.sort(route.send(part)), x)

    route, overflow = jax.jit(on_mesh(plan))(experts)
    if int(overflow.sum()):
        raise RuntimeError(f"{int(overflow.sum())} rows found no room in buffers of {BUFFER} times a balanced load")
    sent = _travelling(x, precision, on_mesh)
    calls = {
        "dispatch": jax.jit(on_mesh(dispatch)),
        "combine": jax.jit(on_mesh(lambda rows, route: route.combine(rows))),
    }
    rows = jax.jit(on_mesh(dispatch))(x, route)
    seconds = interleaved_medians(
        {"dispatch": partial(calls["dispatch"], sent, route), "combine": partial(calls["combine"], rows, route)},
        jax.block_until_ready,
        **host.turns,
    )
    shape = (config.parallel.node, config.parallel.gpu, tokens, model.top_k)
    counted = (rows_sent_flat if parallel.exchange == "flat" else rows_sent_hierarchical)(
        np.asarray(experts).reshape(shape), model.num_experts
    )
    crossing = (counted.node + counted.gpu).mean()
    size = row_bytes(model, precision)
    cells = [f"{crossing / tokens:.2f}"]
    for way in ("dispatch", "combine"):
        rate = crossing * size[way] / seconds[way]
        cells += [f"{1e3 * seconds[way]:.2f}", f"{rate / 1e9:.0f}", f"{rate / peak:.0%}"]
    return cells


def _travelling(x: Array, precision: str, on_mesh: Callable) -> Any:
    """What a dispatch sends of each token: the row, or its FP8 values and their scales."""
    if precision == "bf16":
        return x

    def quantize(x: Array) -> tuple[Array, Array]:
        tiles = quantize_rows(x, power_of_2=True)
        return tiles.values, tiles.scales.T

    return jax.jit(on_mesh(quantize))(x)


def measure_layer(host: Host) -> None:
    """Prints one MoE layer with four experts a device: router, exchange, routed and shared experts."""
    tokens = 256 if host.tiny else 4096
    groups = {"num_groups": host.devices, "top_k_groups": max(2, host.devices // 2)}
    model = replace(TINY if host.tiny else V3, num_experts=4 * host.devices, **groups)
    names = [(p, name) for p in ("bf16", "fp8") for name in topologies(host)]
    layers = {key: _layer(host, model, tokens, key[0], topologies(host)[key[1]]) for key in names}
    compiled = compile_all(
        {(*key, what): f.lower(*args) for key, (fs, args) in layers.items() for what, f in fs.items()}
    )
    table = []
    for key in names:
        given = layers[key][1]
        calls = {what: partial(compiled[(*key, what)], *given) for what in ("forward", "both")}
        overflow = int(calls["forward"]()[1].sum())
        if overflow:
            raise RuntimeError(f"{overflow} rows found no room in buffers of {BUFFER} times a balanced load")
        seconds = interleaved_medians(calls, jax.block_until_ready, **host.turns)
        forward, both = 1e3 * seconds["forward"], 1e3 * seconds["both"]
        table.append([*key, f"{forward:.2f}", f"{both - forward:.2f}", f"{both:.2f}"])
    print_table(
        f"A MoE layer, {model.num_experts} experts of width {model.d_ff_expert} on {host.devices} GPUs, "
        f"{tokens} tokens each, {model.top_k} experts a token and a shared one",
        ["precision", "exchange", "forward ms", "backward ms", "both ms"],
        table,
    )


def _layer(
    host: Host, model: ModelConfig, tokens: int, precision: str, parallel: ParallelConfig
) -> tuple[dict[str, Any], tuple]:
    """Functions of (compute copy, x, dy), and these."""
    config = _config(model, parallel, precision, host.devices)
    mesh = make_mesh(config)
    exchange: Exchange = exchange_for(config, mesh, BUFFER)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: MoE(model, nnx.Rngs(0))))
    experts = lambda path, _: SPEC if path[0].key == "experts" else PartitionSpec()  # noqa: E731
    shapes = nnx.to_pure_dict(shapes)
    specs = jax.tree_util.tree_map_with_path(experts, shapes)
    params = jax.jit(
        lambda: nnx.to_pure_dict(nnx.split(MoE(model, nnx.Rngs(0)))[1]),
        out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs),
    )()
    on_mesh = partial(jax.shard_map, mesh=mesh)
    cast = lambda params: cast_weights(jax.tree.map(_varies, params), precision)  # noqa: E731
    compute = jax.jit(on_mesh(cast, in_specs=(specs,), out_specs=SPEC))(params)
    bias = jnp.zeros(model.num_experts)

    def forward(compute: Any, slots: Any, x: Array) -> tuple[Array, Array]:
        given = quantize_input(x, power_of_2=True) if precision == "fp8" else x
        y, stats = nnx.merge(graphdef, attach_slots(compute, slots))(given, bias, exchange)
        return y, _varies(stats.overflow)[None]

    def forward_only(compute: Any, x: Array, dy: Array) -> tuple[Array, Array]:
        return forward(compute, gradient_slots(compute), x)

    def both(compute: Any, x: Array, dy: Array) -> Any:
        slots = jax.tree.map(_varies, gradient_slots(compute))
        y, pullback, overflow = jax.vjp(partial(forward, compute), slots, x, has_aux=True)
        return y, overflow, pullback(dy)

    x, dy = _placed(
        mesh, SPEC, lambda key: jax.random.normal(key, (2, host.devices, tokens, model.d_model), jnp.bfloat16), 2
    )
    functions = {"forward": forward_only, "both": both}
    jitted = {name: jax.jit(on_mesh(f, in_specs=SPEC, out_specs=SPEC)) for name, f in functions.items()}
    return jitted, (compute, x, dy)


def _config(model: ModelConfig, parallel: ParallelConfig, precision: str, devices: int) -> Config:
    batch = BatchConfig(seq_len=model.num_mtp_modules + 2, sequences=devices)
    return Config(model=model, batch=batch, parallel=parallel, precision=precision)


def _varies(x: Array) -> Array:
    return vary_over(x, tuple(axis for axis in AXES if axis in jax.sharding.get_abstract_mesh().axis_names))


def _placed(mesh: Mesh, spec: PartitionSpec, make: Callable[[Array], Any], parts: int | None = None) -> Any:
    """Random arrays, made where they live; `parts` are those along a leading axis."""
    place = NamedSharding(mesh, spec)
    if parts is None:
        return jax.jit(make, out_shardings=place)(jax.random.key(0))
    return jax.jit(lambda key: tuple(make(key)), out_shardings=place)(jax.random.key(0))
