"""Gradients of a step's microbatches, and the held-out loss, through a pipeline."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.model.moe import Exchange
from dsv3_jax.model.rope import rotations
from dsv3_jax.model.transformer import DecoderLayer, RouterBias, Transformer, TrunkOutput, recomputed
from dsv3_jax.ops.weights import Params, attach_slots, gradient_slots, name_weights
from dsv3_jax.parallel.mesh import vary_over
from dsv3_jax.parallel.pipeline import Model, run, run_forward
from dsv3_jax.parallel.pipeline_layer import Layer, Weights
from dsv3_jax.parallel.pipeline_stages import LAYER_KINDS, Layout, layouts, schedule_of
from dsv3_jax.parallel.pipeline_table import Table, make_table
from dsv3_jax.parallel.schedule import forward_only
from dsv3_jax.train.loss import LossReport, LossWeights, held_out_loss_of, losses_of
from dsv3_jax.train.state import model_structure


@dataclass(frozen=True)
class Pipeline:
    """How a step of so many microbatches runs on the ranks of a pipeline."""

    table: Table
    stages: int
    layouts: dict[str, Layout]


def plan_pipeline(config: Config, microbatches: int) -> Pipeline:
    """The table and the layout. Raises ConfigError where the schedule does not work with so many microbatches."""
    schedule = schedule_of(config, microbatches)
    return Pipeline(make_table(schedule), schedule.stages, layouts(config.model, schedule))


def pipelined_gradients(
    config: Config,
    pipeline: Pipeline,
    compute: Params,
    router_bias: RouterBias,
    weights: LossWeights,
    exchange: Exchange,
    tokens: Int[Array, "microbatches batch seq"],
    axes: tuple[str, ...],
) -> tuple[Params, LossReport]:
    """Float32 gradients summed over microbatches, and the report: means over microbatches, sums of loads.

    Args:
        compute: the compute copy; of stacked layers, those that this rank holds. So are the gradients.
        axes: of the whole mesh, `pipe` first.
    """
    whole = _whole(config, pipeline, compute)

    def embed(slots: Params, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq d"]:
        return whole(slots).embed(tokens)

    def tail(x: Array, slots: Params, tokens: Int[Array, "batch seq"]) -> tuple[Array, LossReport]:
        module = whole(slots)
        trunk = TrunkOutput(module.final_norm(x), module.embed(tokens), (), None)
        how = config.recompute, config.loss.logits_tokens
        total, report = losses_of(module, [tokens], [trunk], router_bias, weights, exchange, *how)
        return total, jax.tree.map(jnp.asarray, report)

    model = _model(config, pipeline, compute, router_bias, weights, exchange, tokens.shape[2], axes, embed, tail)
    sums = run(model, pipeline.table, pipeline.stages, tokens, axes)
    gradients = {kind: _nested(flat, compute[kind]) for kind, flat in sums.gradients.items()} | sums.ends
    return {name: gradients[name] for name in compute}, _report(config.model, pipeline, sums, len(tokens))


def plan_evaluation(config: Config, microbatches: int) -> Pipeline:
    """A stage a rank, whatever the schedule of training: forwards alone need no order that spares memory."""
    schedule = forward_only(config.parallel.pipe, microbatches)
    return Pipeline(make_table(schedule), schedule.stages, layouts(config.model, schedule))


def pipelined_held_out_loss(
    config: Config,
    pipeline: Pipeline,
    compute: Params,
    router_bias: RouterBias,
    exchange: Exchange,
    tokens: Int[Array, "microbatches batch seq"],
    row_weights: Float[Array, "microbatches batch"],
    axes: tuple[str, ...],
) -> Float[Array, ""]:
    """`held_out_loss` summed over microbatches, on the rank of the last stage; 0 on the others.

    Args:
        compute: as in `pipelined_gradients`; the MTP modules, which are not needed, may be left out.
        axes: of the whole mesh, `pipe` first.
    """
    whole = _whole(config, pipeline, compute)

    def embed(slots: Params, batch: tuple[Array, Array]) -> Float[Array, "batch seq d"]:
        return whole(slots).embed(batch[0])

    def tail(x: Array, slots: Params, batch: tuple[Array, Array]) -> tuple[Array, Array]:
        module = whole(slots)
        loss = held_out_loss_of(module, module.final_norm(x), *batch)
        return loss, loss

    no_weight = LossWeights(*(jnp.zeros(()) for _ in fields(LossWeights)))
    model = _model(config, pipeline, compute, router_bias, no_weight, exchange, tokens.shape[2], axes, embed, tail)
    return run_forward(model, pipeline.table, pipeline.stages, (tokens, row_weights), axes)


def _whole(config: Config, pipeline: Pipeline, compute: Params) -> Callable[[Params], Transformer]:
    """The model of the slots of what is not a stack of layers."""
    graphdef, shapes = model_structure(config.model)
    ends = {name: part for name, part in compute.items() if name not in pipeline.layouts}
    # The module wants a value for every parameter; those of the layers are not read.
    unread = jax.tree.map(lambda _: jnp.zeros(()), {name: part for name, part in shapes.items() if name not in ends})
    return lambda slots: nnx.merge(graphdef, attach_slots(ends, slots) | unread)


def _model(
    config: Config,
    pipeline: Pipeline,
    compute: Params,
    router_bias: RouterBias,
    weights: LossWeights,
    exchange: Exchange,
    seq: int,
    axes: tuple[str, ...],
    embed: Callable,
    tail: Callable,
) -> Model:
    vary = lambda tree: jax.tree.map(lambda x: vary_over(x, axes), tree)  # noqa: E731
    stacks = {kind: compute[kind] for kind in pipeline.layouts}
    ends = {name: part for name, part in compute.items() if name not in stacks}
    here = jax.lax.axis_index("pipe")
    held = {kind: jnp.asarray(layout.held)[here] for kind, layout in pipeline.layouts.items()}
    return Model(
        embed=embed,
        tail=tail,
        ends=vary(gradient_slots(ends)),
        layers={kind: _layer(config, kind, compute[kind], exchange) for kind in LAYER_KINDS if kind in stacks},
        weights={kind: vary(name_weights(stack)) for kind, stack in stacks.items()},
        contexts={kind: vary(router_bias[kind][held[kind]] if kind in router_bias else None) for kind in stacks},
        shared=vary((rotations(config.model, jnp.arange(seq)), weights)),
        layouts=pipeline.layouts,
    )


def _layer(config: Config, kind: str, like: Params, exchange: Exchange) -> Layer:
    is_moe = kind == "moe_layers"
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: DecoderLayer(config.model, is_moe, nnx.Rngs(0))))

    def layer(x: Array, weights: Weights, context: Any) -> tuple[tuple[Array, Array], Any]:
        bias, (turns, loss_weights) = context
        y, stats = nnx.merge(graphdef, _nested(weights, like))(x, turns, bias, exchange)
        if stats is None:
            return (y, loss_weights.mtp * 0), {}
        balance = {"sequence_balance": stats.sequence_balance, "batch_balance": stats.batch_balance}
        own_loss = sum(getattr(loss_weights, name) * value for name, value in balance.items())
        return (y, own_loss), balance | {"load": stats.load, "overflow": stats.overflow}

    return recomputed(layer, config.recompute)


def _nested(flat: dict[str, Any], like: Params) -> Params:
    """A flat dict by path in the nesting of `like`."""
    is_leaf = lambda x: not isinstance(x, dict)  # noqa: E731
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[name(path)], like, is_leaf=is_leaf)


def _report(model: ModelConfig, pipeline: Pipeline, sums: Any, microbatches: int) -> LossReport:
    """The tail's report and the layers' statistics, from all ranks."""
    tail, load, here = sums.report, dict(sums.report.load), jax.lax.axis_index("pipe")
    stats = sums.stats.get("moe_layers")
    balance, overflow = [tail.sequence_balance, tail.batch_balance], tail.overflow
    if stats is not None:
        held = jnp.asarray(pipeline.layouts["moe_layers"].held)[here]
        load["moe_layers"] = jnp.zeros((model.num_moe_layers, model.num_experts), jnp.int32).at[held].add(stats["load"])
        balance = [balance[0] + stats["sequence_balance"].sum(), balance[1] + stats["batch_balance"].sum()]
        overflow = overflow + stats["overflow"].sum()
    over_ranks = lambda x: jax.lax.psum(x, "pipe") if x.size else jnp.zeros(x.shape, x.dtype)  # noqa: E731
    mean = lambda x: over_ranks(x) / microbatches  # noqa: E731
    return LossReport(
        loss=mean(tail.loss),
        mtp_loss=mean(tail.mtp_loss),
        mtp_accuracy=mean(tail.mtp_accuracy),
        sequence_balance=mean(balance[0]),
        batch_balance=mean(balance[1]),
        load={kind: over_ranks(counts) for kind, counts in load.items()},
        overflow=over_ranks(overflow),
    )
