"""Which layers each stage of a pipeline runs, and which each rank therefore holds."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dsv3_jax.config import Config, ConfigError, ModelConfig
from dsv3_jax.parallel.schedule import Schedule, make

LAYER_KINDS = ("dense_layers", "moe_layers")
"""Names of the stacks, in the order that data passes them."""


@dataclass(frozen=True)
class Layout:
    """Layers on stages and ranks, of one kind. A rank holds the layers of its stages side by side, in their order."""

    held: Int[ndarray, "ranks most"]
    """Layers that each rank holds; a rank with fewer than most repeats layer 0, which no stage of it runs."""
    first: Int[ndarray, "ranks stages"]
    """Where a stage's first layer stands among those its rank holds."""
    count: Int[ndarray, " stages"]
    """Layers of each stage."""


def schedule_of(config: Config, microbatches: int) -> Schedule:
    """The schedule of a step of so many microbatches. Raises ConfigError where it does not work with that number or
    with the ranks."""
    name, ranks, batch = config.parallel.schedule, config.parallel.pipe, config.batch
    grows = microbatches < batch.sequences // batch.rows_per_microbatch
    if name == "dualpipe" and grows and microbatches < 2 * ranks:
        name = "dualpipe_lockstep"  # the same stages on the same ranks, in an order that any even number fits
    try:
        return make(name, ranks, microbatches)
    except ValueError as error:
        cause, _, reason = str(error).partition(": ")
        chosen = f"parallel.pipe={ranks} with parallel.schedule={name!r}"
        if cause.startswith("ranks"):
            raise ConfigError(f"{chosen}: {reason}") from error
        ramp = "batch.start_sequences or batch.ramp_microbatches" if len(batch.sizes) > 1 else "batch.sequences"
        raise ConfigError(
            f"{chosen}: a step of {microbatches * batch.rows_per_microbatch} sequences has {microbatches} "
            f"microbatches, and {reason}; change batch.microbatch={batch.microbatch} or {ramp}"
        ) from error


def step_in_words(config: Config) -> str:
    """The pipeline of a step, and what to do where its ranks mostly wait for one another; "" without a pipeline."""
    count, ranks = config.batch.sequences // config.batch.rows_per_microbatch, config.parallel.pipe
    if ranks == 1:
        return ""
    advice = f"; {2 * ranks} would keep its ranks busier: lower batch.microbatch" if count < 2 * ranks else ""
    return f"{config.parallel.schedule} of {count} microbatches{advice}"


def check_pipeline(config: Config) -> None:
    """Raises ConfigError for a pipeline that some step of the run could not use."""
    for sequences in config.batch.sizes:
        schedule = schedule_of(config, sequences // config.batch.rows_per_microbatch)
    layers, stages = config.model.num_layers, schedule.stages
    if stages > layers:
        fewer = ", or take a parallel.schedule with one stage a rank" if stages > schedule.ranks else ""
        raise ConfigError(
            f"parallel.pipe={schedule.ranks} with parallel.schedule={schedule.kind!r}: cuts the model into {stages} "
            f"stages, and model.num_layers={layers}; lower parallel.pipe{fewer}"
        )


def layouts(model: ModelConfig, schedule: Schedule) -> dict[str, Layout]:
    """The layout of both kinds of layers. Raises ConfigError where there are more stages than layers."""
    bounds = stage_bounds(model, schedule.stages)
    dense = model.num_dense_layers
    found = {}
    for kind, start, end in (("dense_layers", 0, dense), ("moe_layers", dense, model.num_layers)):
        ranges = [range(max(a, start) - start, max(min(b, end), start) - start) for a, b in itertools.pairwise(bounds)]
        if end > start:
            found[kind] = _layout([list(layers) for layers in ranges], schedule)
    return found


def _layout(layers: list[list[int]], schedule: Schedule) -> Layout:
    ranks = range(schedule.ranks)
    held = [[layer for stage in schedule.chunks(rank) for layer in layers[stage]] for rank in ranks]
    most = max(map(len, held))
    first = np.zeros((schedule.ranks, schedule.stages), np.int32)
    for rank in ranks:
        place = 0
        for stage in schedule.chunks(rank):
            first[rank, stage] = place
            place += len(layers[stage])
    padded = np.array([row + [0] * (most - len(row)) for row in held], np.int32)
    return Layout(padded, first, np.array([len(row) for row in layers], np.int32))


def stage_bounds(model: ModelConfig, stages: int) -> list[int]:
    """First layer of each stage, and the number of layers: so cut that the slowest stage takes as little as can be.

    Costs are matrix products of a token; the last stage also runs the head and the MTP modules.
    """
    if stages > model.num_layers:
        raise ConfigError(f"model.num_layers={model.num_layers}: a pipeline of {stages} stages needs as many layers")
    d, heads, rank = model.d_model, model.num_heads, model.q_lora_rank
    width = heads * model.qk_head_dim
    attention = d * width if rank is None else rank * (d + width)
    attention += d * (model.kv_lora_rank + model.qk_rope_head_dim) + heads * model.v_head_dim * d
    attention += model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    dense = attention + 3 * d * model.d_ff
    moe = attention + 3 * d * model.d_ff_expert * (model.top_k + model.num_shared_experts) + d * model.num_experts
    head = d * model.vocab_size
    tail = head + model.num_mtp_modules * (moe + 2 * d * d + head)
    costs = [dense] * model.num_dense_layers + [moe] * model.num_moe_layers
    costs[-1] += tail
    return cut(costs, stages)


def cut(costs: Sequence[float], stages: int) -> list[int]:
    """Bounds of `stages` runs of parts, none empty, whose largest sum is as small as can be."""
    # best[i]: the largest sum, and where the last run starts, of the first i parts in the runs so far.
    best = [(sum(costs[:i]), 0) for i in range(len(costs) + 1)]
    starts = []
    for stage in range(2, stages + 1):
        last = [(float("inf"), 0)] * len(best)
        for i in range(stage, len(costs) + 1):
            last[i] = min((max(best[j][0], sum(costs[j:i])), j) for j in range(stage - 1, i))
        starts.append([start for _, start in last])
        best = last
    bounds = [len(costs)]
    for row in reversed(starts):
        bounds.append(row[bounds[-1]])
    return [*([] if bounds[-1] == 0 else [0]), *reversed(bounds)]
