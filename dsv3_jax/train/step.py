"""One optimizer step as a single shard_map over the whole mesh: what one device does, collectives included."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.model.moe import Exchange, LocalExchange
from dsv3_jax.model.transformer import RouterBias
from dsv3_jax.ops.quantize import E4M3
from dsv3_jax.ops.recipe import Recipe
from dsv3_jax.ops.weights import FP8Weight, Params, Slot, attach_slots, gradient_slots, is_measured, weight_type
from dsv3_jax.parallel.expert import ExpertExchange, ReplicatedExperts, reach_of
from dsv3_jax.parallel.mesh import vary_over
from dsv3_jax.parallel.placement import batch_axes, expert_axes, pipe_axes
from dsv3_jax.parallel.sharding import Sharding, param_shardings
from dsv3_jax.train.loss import LossReport, LossWeights, held_out_loss, training_losses
from dsv3_jax.train.optimizer import adamw_update
from dsv3_jax.train.pipelined import pipelined_gradients, pipelined_held_out_loss, plan_evaluation, plan_pipeline
from dsv3_jax.train.state import TrainState, model_structure, state_specs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Knobs:
    """What the schedules say for this step, and how the one before it went."""

    learning_rate: Float[Array, ""]
    bias_update_speed: Float[Array, ""]
    loss: LossWeights
    overflow_before: Int[Array, ""] = field(default_factory=lambda: np.int32(0))
    """`losses.overflow` of the step that made the state, where the host has not seen it: unless it is zero, that step
    will run again, and this one changes nothing."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepReport:
    """Means over the global batch; loads and overflow are its sums. `applied` is False where the state is unchanged."""

    losses: LossReport
    grad_norm: Float[Array, ""]
    applied: Bool[Array, ""]


Step = Callable[[TrainState, Int[Array, "microbatches batch seq"], Knobs], tuple[TrainState, StepReport]]


def make_step(config: Config, mesh: Mesh, buffer_factor: float | None = None, recipe: Recipe | None = None) -> Step:
    """The compiled step: (state, tokens, knobs) -> (state, report). The state passed in is consumed.

    Tokens are [microbatches, sequences, seq], the sequences split over the mesh. A step whose loss or gradient is not
    finite, or whose expert exchange overflowed its buffer, as that of the step before it did according to the knobs,
    returns the state as it was. `recipe` is for studies of precision="fp8"; None is the report's.
    """
    specs = state_specs(config, mesh)
    tokens_spec = PartitionSpec(None, batch_axes(mesh.shape))
    step = jax.shard_map(
        partial(_device_step, config, mesh, buffer_factor or config.parallel.expert_buffer_factor, recipe or Recipe()),
        mesh=mesh,
        in_specs=(specs, tokens_spec, PartitionSpec()),
        out_specs=(specs, PartitionSpec()),
    )
    # XLA starts a collective early only where it is asked to look for work to hide it behind.
    options = {"xla_gpu_enable_latency_hiding_scheduler": True} if config.parallel.overlap_microbatches else None
    return jax.jit(step, donate_argnums=0, compiler_options=options)


Evaluation = Callable[[Params, RouterBias, Int[Array, "batch seq"], Float[Array, " batch"]], Float[Array, ""]]


def make_evaluation(config: Config, mesh: Mesh) -> Evaluation:
    """Compiled (params, router_bias, tokens, row_weights) -> weighted sum of the rows' mean next-token losses, in nats.

    Rows are split over the mesh. In a pipeline they pass it in microbatches of the batch's size, of which they must be
    a multiple.
    """
    specs = state_specs(config, mesh)
    rows = PartitionSpec(batch_axes(mesh.shape))
    evaluate = jax.shard_map(
        partial(_device_evaluation, config, mesh),
        mesh=mesh,
        in_specs=(specs.params, specs.router_bias, rows, rows),
        out_specs=PartitionSpec(),
    )
    return jax.jit(evaluate)


def exchange_for(config: Config, mesh: Mesh, buffer_factor: float) -> Exchange:
    """The expert exchange of a mesh; nothing is exchanged where every device has all experts."""
    experts, batch = expert_axes(mesh.shape), batch_axes(mesh.shape)
    if not batch:
        return LocalExchange()
    if not experts:
        return ReplicatedExperts(batch)
    levels = (experts,) if config.parallel.exchange == "flat" else tuple((axis,) for axis in experts)
    reach = reach_of(config.model, tuple(math.prod(mesh.shape[axis] for axis in level) for level in levels))
    return ExpertExchange(levels, reach, batch, buffer_factor)


def _device_step(
    config: Config,
    mesh: Mesh,
    buffer_factor: float,
    recipe: Recipe,
    state: TrainState,
    tokens: Int[Array, "microbatches batch seq"],
    knobs: Knobs,
) -> tuple[TrainState, StepReport]:
    graphdef, shapes = model_structure(config.model)
    axes = batch_axes(mesh.shape)
    pipe = pipe_axes(mesh.shape)
    pipeline = plan_pipeline(config, tokens.shape[0]) if pipe else None
    held = pipeline and {kind: layout.held for kind, layout in pipeline.layouts.items()}
    shardings = param_shardings(shapes, mesh, held)
    compute = _compute_weights(config, shardings, state.params, recipe)
    router_bias, loss_weights = _vary_all((state.router_bias, knobs.loss), pipe + axes)
    exchange = exchange_for(config, mesh, buffer_factor)

    def loss(slots: Params, streams: Int[Array, "streams batch seq"]) -> tuple[Array, LossReport]:
        model = nnx.merge(graphdef, attach_slots(compute, slots))
        how = config.recompute, config.unroll_layers, config.loss.logits_tokens
        return training_losses(model, list(streams), router_bias, loss_weights, exchange, *how)

    if pipeline is not None:
        gradients, report = pipelined_gradients(
            config, pipeline, compute, router_bias, loss_weights, exchange, tokens, pipe + axes
        )
    else:
        streams = 2 if config.parallel.overlap_microbatches else 1
        slots = gradient_slots(compute, _measured(shardings, tokens.shape[0]))
        gradients, report = _accumulate(loss, _vary_all(slots, axes), tokens, axes, streams)
    report = _over_mesh(report, axes)
    scale = 1.0 / (math.prod(mesh.shape[axis] for axis in axes) * tokens.shape[0])
    gradients, squares = _reduced(gradients, shardings, scale)
    grad_norm = jnp.sqrt(sum(jax.tree.leaves(squares)))
    applied = jnp.isfinite(report.loss) & jnp.isfinite(grad_norm) & (report.overflow == 0)
    applied &= knobs.overflow_before == 0
    clip = jnp.minimum(1.0, config.optimizer.clip_norm / (grad_norm + 1e-6))
    gradients = jax.tree.map(lambda g: g * clip, gradients)
    params, moments = adamw_update(config.optimizer, state.params, gradients, state.moments, knobs.learning_rate)
    bias = update_router_bias(state.router_bias, report.load, knobs.bias_update_speed)
    new = TrainState(params, moments, bias)
    new = jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, state)
    return new, StepReport(report, grad_norm, applied)


def _measured(shardings: dict[str, Any], microbatches: int) -> Params:
    """Of which gradients the squares are wanted where they are computed: of experts, which a model uses once, where no
    other microbatch or replica adds to them. The other weights are too few for it to matter."""
    return jax.tree.map(lambda s: microbatches == 1 and s.expert_dim is not None and s.is_whole, shardings)


def _reduced(gradients: Params, shardings: dict[str, Any], scale: float) -> tuple[Params, Params]:
    """The means over all replicas, as this device's shards, and the sums of their squares over all shards."""

    def reduced(gradient: Slot, sharding: Sharding) -> tuple[Array, Array]:
        if is_measured(gradient):
            return gradient.gradient * scale, sharding.total(jnp.sum(gradient.squares)) * scale**2
        mean = sharding.reduce(gradient) * scale
        return mean, sharding.total(jnp.sum(mean * mean))

    pairs = jax.tree.map(reduced, gradients, shardings, is_leaf=is_measured)
    return jax.tree.transpose(jax.tree.structure(shardings), jax.tree.structure((0, 0)), pairs)


def update_router_bias(
    bias: RouterBias, load: dict[str, Int[Array, "layers experts"]], speed: Float[Array, ""]
) -> RouterBias:
    """b + speed * sign(mean load - load), from the load of the global batch (report 2.1.2)."""

    def update(b: Array, count: Array) -> Array:
        # Integers, so that the sign is exact: mean > load is the same as total > load * experts.
        return b + speed * jnp.sign(count.sum(axis=-1, keepdims=True) - count * count.shape[-1]).astype(jnp.float32)

    return {kind: update(b, load[kind]) for kind, b in bias.items()}


def _compute_weights(config: Config, shardings: dict[str, Any], params: Params, recipe: Recipe) -> Params:
    """Cast first, then gather: the network moves the narrow type."""

    def cast(path: tuple[Any, ...], shard: Array, sharding: Sharding) -> Array | FP8Weight:
        dtype = weight_type(path, config.precision)
        if dtype == E4M3:
            return FP8Weight(sharding.gather_fp8(shard), recipe=recipe)
        return sharding.gather(shard.astype(dtype))

    return jax.tree_util.tree_map_with_path(cast, params, shardings)


def _vary_all(tree: Any, axes: tuple[str, ...]) -> Any:
    return jax.tree.map(lambda x: vary_over(x, axes), tree)


def _accumulate(
    loss: Callable, slots: Params, tokens: Int[Array, "microbatches batch seq"], axes: tuple[str, ...], streams: int
) -> tuple[Params, LossReport]:
    """Float32 gradients summed over microbatches, and the report: means, and sums of loads.

    So many microbatches run side by side as `streams` says; those that are left over run last.
    """
    # Traced once, for its shapes and for the loop.
    gradient = jax.jit(jax.grad(loss, has_aux=True), inline=True)
    count = tokens.shape[0]
    if count <= streams:
        total = gradient(slots, tokens)
    else:
        together = tokens[: count // streams * streams].reshape(-1, streams, *tokens.shape[1:])

        def microbatches(total: Any, rows: Int[Array, "streams batch seq"]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(slots, rows)), None

        like = jax.eval_shape(gradient, slots, together[0])
        zeros = _vary_all(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), axes)
        total, _ = jax.lax.scan(microbatches, zeros, together)
        if count % streams:
            total, _ = microbatches(total, tokens[-(count % streams) :])
    gradients, report = total
    return gradients, _map_means(lambda x: x / count, report)


def _over_mesh(report: LossReport, axes: tuple[str, ...]) -> LossReport:
    if not axes:
        return report
    # XLA's CPU compiler crashes on a collective of nothing, which the MTP losses of a model without MTP are.
    mean = _map_means(lambda x: jax.lax.pmean(x, axes) if jnp.size(x) else jnp.zeros(x.shape, x.dtype), report)
    total = jax.tree.map(lambda x: jax.lax.psum(x, axes), (report.load, report.overflow))
    return LossReport(**{**_fields(mean), "load": total[0], "overflow": total[1]})


def _map_means(f: Callable[[Array], Array], report: LossReport) -> LossReport:
    """Apply f to the parts that are means, and not to those that are sums."""
    sums = {"load", "overflow"}
    return LossReport(**{name: x if name in sums else f(x) for name, x in _fields(report).items()})


def _fields(report: LossReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in LossReport.__dataclass_fields__}


def _device_evaluation(
    config: Config,
    mesh: Mesh,
    params: Params,
    router_bias: RouterBias,
    tokens: Int[Array, "batch seq"],
    row_weights: Float[Array, " batch"],
) -> Float[Array, ""]:
    graphdef, shapes = model_structure(config.model)
    axes, pipe = batch_axes(mesh.shape), pipe_axes(mesh.shape)
    # A device may receive any load here: evaluation has no second try.
    exchange = exchange_for(config, mesh, buffer_factor=float(mesh.size * config.model.num_experts))
    router_bias = _vary_all(router_bias, pipe + axes)
    if pipe:
        return _pipelined_evaluation(config, mesh, params, router_bias, tokens, row_weights, exchange)
    compute = _compute_weights(config, param_shardings(shapes, mesh), params, Recipe())
    loss = held_out_loss(nnx.merge(graphdef, compute), tokens, row_weights, router_bias, exchange)
    return jax.lax.psum(loss, axes) if axes else loss


def _pipelined_evaluation(
    config: Config,
    mesh: Mesh,
    params: Params,
    router_bias: RouterBias,
    tokens: Int[Array, "batch seq"],
    row_weights: Float[Array, " batch"],
    exchange: Exchange,
) -> Float[Array, ""]:
    """Each rank gets the weights of its stage's layers only, and no device those of the MTP modules."""
    axes = batch_axes(mesh.shape)
    rows = config.batch.rows_per_microbatch // math.prod(mesh.shape[axis] for axis in axes)
    tokens, row_weights = tokens.reshape(-1, rows, tokens.shape[1]), row_weights.reshape(-1, rows)
    pipeline = plan_evaluation(config, len(tokens))
    shapes = model_structure(config.model)[1]
    params, shapes = ({name: part for name, part in tree.items() if name != "mtp"} for tree in (params, shapes))
    held = {kind: layout.held for kind, layout in pipeline.layouts.items()}
    compute = _compute_weights(config, param_shardings(shapes, mesh, held), params, Recipe())
    axes = pipe_axes(mesh.shape) + axes
    loss = pipelined_held_out_loss(config, pipeline, compute, router_bias, exchange, tokens, row_weights, axes)
    return jax.lax.psum(loss, axes)
