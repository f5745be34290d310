"""The plan of a run on a cluster, as tables."""

import dataclasses
from collections import defaultdict

from rich.console import Console
from rich.table import Table

from dsv3_jax.parallel.simulate import pair_time, peak_activations
from dsv3_jax.planner.cluster import ClusterPlan, plan_extension
from dsv3_jax.planner.report import table

_MEMORY_NAMES = {
    "weights": "weights it computes with",
    "gradients": "gradients, float32",
    "optimizer": "master weights and moments, its share (ZeRO-1)",
    "activations": "activations at the schedule's peak",
    "buffers": "exchange buffers and a layer's values",
}


def print_cluster_plan(plan: ClusterPlan, console: Console | None = None) -> None:
    """Prints a plan: inputs, stages, one pair's work, memory, communication, a step, and the run's cost."""
    console = console or Console()
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    console.print(
        f"{plan.devices:,} {plan.device.name}: {mesh}; {plan.schedule.kind} with {plan.schedule.microbatches} "
        f"microbatches of {plan.tokens:,} tokens a device; products in {plan.products.upper()}; recompute "
        f"{plan.config.recompute}"
    )
    console.print(_input_table(plan))
    console.print(_stage_table(plan))
    console.print(_work_table(plan))
    console.print(_memory_table(plan))
    console.print(_communication_table(plan))
    console.print(_step_table(plan))
    console.print(_cost_table(plan))


def usual_stage(plan: ClusterPlan) -> int:
    """The middle of the stages that are most common: what a usual pair runs."""
    labels = [stage.label for stage in plan.stages]
    usual = max(labels, key=labels.count)
    same = [i for i, label in enumerate(labels) if label == usual]
    return same[len(same) // 2]


def _input_table(plan: ClusterPlan) -> Table:
    rows = []
    for rate, value in plan.device.achieved.items():
        unit, scale = ("GB/s", 1e9) if rate in ("memory", "nvlink", "network") else ("TFLOP/s", 1e12)
        rows.append((rate.replace("_", " "), f"{value / scale:,.0f} {unit}", f"{plan.device.fraction(rate):.0%}"))
    rows.append(("compute stream busy, of a chunk's time", "", f"{plan.device.busy:.0%}"))
    return table(f"What {plan.device.name} achieves (inputs)", ("", "rate", "of its peak"), rows)


def _stage_table(plan: ClusterPlan) -> Table:
    """Stages, equal neighbours in one row."""
    rows: list[tuple[str, ...]] = []
    first = 0
    for i, stage in enumerate(plan.stages):
        if i + 1 < len(plan.stages) and plan.stages[i + 1].label == stage.label:
            continue
        times = plan.chunk_times[i]
        name = f"{first}" if first == i else f"{first} to {i}"
        inputs = times.backward - times.weight
        figures = (times.forward, inputs, times.weight, times.exchange, pair_time(times, times))
        rows.append((f"{name}: {stage.label}", *(f"{1e3 * seconds:,.1f}" for seconds in figures)))
        first = i + 1
    headers = ("stage", "F", "input gradient", "W", "exchange, each way", "pair F&B")
    return table("Chunk times, one microbatch (ms)", headers, rows)


def _work_table(plan: ClusterPlan) -> Table:
    """What one forward and backward of the usual stage is made of."""
    stage = plan.stages[usual_stage(plan)]
    items: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for item in stage.work:
        for i, amount in enumerate((item.flops, item.bytes, item.seconds(plan.device))):
            items[item.name][i] += amount * plan.tokens
    rows: list[tuple[str, ...] | None] = [
        (name, f"{flops / 1e12:,.2f}" if flops else "-", f"{moved / 1e9:,.1f}" if moved else "-", f"{1e3 * time:,.1f}")
        for name, (flops, moved, time) in items.items()
    ]
    busy = sum(time for _, _, time in items.values())
    rows += [
        None,
        ("compute stream busy", "", "", f"{1e3 * busy:,.1f}"),
        (f"at {plan.device.busy:.0%} busy", "", "", f"{1e3 * busy / plan.device.busy:,.1f}"),
    ]
    return table(f"One F+B pair of {stage.label}", ("", "TFLOP", "memory GB", "ms"), rows)


def _memory_table(plan: ClusterPlan) -> Table:
    rank = plan.fullest
    memory = plan.memory[rank]
    slots = peak_activations(plan.schedule)[rank]
    rows: list[tuple[str, ...] | None] = [
        (_MEMORY_NAMES[kind] + (f" ({slots} microbatches)" if kind == "activations" else ""), _gigabytes(value))
        for kind, value in dataclasses.asdict(memory).items()
    ]
    verdict = "fits" if plan.fits else "does not fit"
    rows += [
        None,
        (
            f"total: {verdict} into {_gigabytes(plan.device.memory)}; the largest: {memory.largest}",
            _gigabytes(memory.total),
        ),
    ]
    return table(f"Memory of rank {rank}, the fullest", ("", "GB"), rows)


def _communication_table(plan: ClusterPlan) -> Table:
    device, per_layer = plan.device.achieved, plan.exchange_bytes
    sync, transfer = plan.sync_bytes, plan.transfer_bytes
    rows = [
        ("exchange over node, a MoE layer and pass", per_layer["network"], device["network"]),
        ("exchange over gpu, a MoE layer and pass", per_layer["nvlink"], device["nvlink"]),
        ("activations over pipe, a microbatch", transfer, device["network"]),
        ("gradients and weights over gpu, a step", sync["nvlink"], device["nvlink"]),
        ("gradients and weights over data x node, a step", sync["network"], device["network"]),
    ]
    return table(
        "Communication of a device",
        ("", "MB sent", "ms"),
        [(name, f"{sent / 1e6:,.0f}", f"{1e3 * sent / speed:,.1f}") for name, sent, speed in rows],
    )


def _step_table(plan: ClusterPlan) -> Table:
    rows: list[tuple[str, ...] | None] = [(name, f"{value:,.2f}") for name, value in plan.step_parts.items()]
    bubble = plan.timeline.bubble
    rows += [
        None,
        ("a step", f"{plan.step_seconds:,.2f}"),
        ("of it the bubble of the ranks", f"{min(bubble):,.2f} to {max(bubble):,.2f}"),
        ("the pipeline, asynchronous", f"{plan.timeline.makespan:,.2f}"),
        ("the pipeline in lockstep", f"{plan.lockstep_seconds:,.2f}"),
    ]
    return table("One step with the whole batch, busiest rank (s)", ("", "s"), rows)


def _cost_table(plan: ClusterPlan) -> Table:
    """Phases side by side: their tokens and cost add up to the whole run's, their speeds do not."""
    phases = [("pre-training", plan)]
    phases += [(f"at {long.config.batch.seq_len // 1024}K", long) for long in plan_extension(plan)]
    plans = [phase for _, phase in phases]
    hours = [phase.gpu_hours for phase in plans]
    tokens = [phase.config.total_tokens for phase in plans]
    price = plan.device.dollars_per_hour
    dollars = [price * each for each in hours]
    rows: list[tuple[str, ...] | None] = [
        ("tokens/s a GPU", *(f"{phase.tokens_per_second_per_gpu:,.0f}" for phase in plans), ""),
        ("MFU, main model's FLOPs", *(f"{phase.mfu():.1%}" for phase in plans), ""),
        ("MFU, with MTP", *(f"{phase.mfu(with_mtp=True):.1%}" for phase in plans), ""),
        ("GPU-hours / 1e12 tokens", *(f"{phase.gpu_hours_per_trillion:,.0f}" for phase in plans), ""),
        ("$ / 1e12 tokens", *(f"{price * phase.gpu_hours_per_trillion:,.0f}" for phase in plans), ""),
        None,
        ("tokens / 1e9", *(f"{each / 1e9:,.1f}" for each in (*tokens, sum(tokens)))),
        ("GPU-hours", *(f"{each:,.0f}" for each in (*hours, sum(hours)))),
        ("$", *(f"{each:,.0f}" for each in (*dollars, sum(dollars)))),
        ("days", *(f"{each / plan.devices / 24:,.1f}" for each in (*hours, sum(hours)))),
    ]  # fmt: skip
    title = f"Cost at {price:,.2f} $ a GPU-hour; context extension as in the report, 4.3"
    return table(title, ("", *(name for name, _ in phases), "the whole run"), rows)


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:,.1f}"
