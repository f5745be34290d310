"""The fastest ways to run a configuration on a number of devices: meshes, schedules, microbatches, recomputation."""

import dataclasses
import itertools
from collections.abc import Iterator

from rich.console import Console

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.parallel.schedule import KINDS
from dsv3_jax.planner.cluster import ClusterPlan, mean_state, plan_cluster
from dsv3_jax.planner.devices import Device
from dsv3_jax.planner.report import table

SEQUENCES = (1, 2, 4, 8)
"""Sequences of a microbatch on each device that are tried."""


def search(config: Config, device: Device, devices: int, best: int = 10) -> list[ClusterPlan]:
    """The `best` fastest plans that fit into the devices' memory, fastest first.

    Tries every mesh whose axes are powers of two times what remains, every schedule, 1 to 8 sequences a device, and
    every recomputation. Plans are simulated in the order of what their busiest rank must work at least, until no other
    can be among the best.

    Raises:
        ConfigError: nothing fits, or nothing divides.
    """
    plans = [plan for plan in _candidates(config, device, devices) if plan.fits]
    if not plans:
        raise ConfigError(
            f"--search: nothing fits {devices:,} x {device.name} of {device.memory / 1e9:,.0f} GB, or no mesh divides "
            "the model and the batch; use more devices, or change batch.sequences"
        )
    found: list[ClusterPlan] = []
    for plan in sorted(plans, key=_least_seconds):
        if len(found) == best and _least_seconds(plan) >= found[-1].step_seconds:
            break
        found = sorted([*found, plan], key=lambda plan: plan.step_seconds)[:best]
    return found


def print_search(plans: list[ClusterPlan], console: Console | None = None) -> None:
    """Prints plans that `search` found."""
    rows = [
        (
            "x".join(str(size) for size in plan.mesh.values()),
            plan.schedule.kind,
            f"{plan.tokens // plan.config.batch.seq_len}",
            plan.config.recompute,
            f"{plan.memory[plan.fullest].total / 1e9:,.1f}",
            f"{plan.step_seconds:,.2f}",
            f"{plan.mfu():.1%}",
            f"{plan.gpu_hours_per_trillion / 1e3:,.4g}",
        )
        for plan in plans
    ]
    headers = ("mesh", "schedule", "seqs", "recompute", "GB", "step s", "MFU", "hours")
    title = (
        f"The best on {plans[0].devices:,} {plans[0].device.name} (mesh: pipe x data x node x gpu; seqs: of a "
        "microbatch on each device; hours: thousands of GPU-hours for 1e12 tokens)"
    )
    (console or Console()).print(table(title, headers, rows))


def _candidates(config: Config, device: Device, devices: int) -> Iterator[ClusterPlan]:
    """Every plan that divides."""
    for pipe, node, gpu in itertools.product(
        _powers(min(devices, config.model.num_layers)), _powers(devices), _powers(device.gpus_per_node)
    ):
        data, rest = divmod(devices, pipe * node * gpu)
        if rest or data == 0 or (node > 1 and gpu < device.gpus_per_node):
            continue
        mesh = {"pipe": pipe, "data": data, "node": node, "gpu": gpu}
        if mean_state(config, mesh) > device.memory:
            continue
        kinds = KINDS if pipe > 1 else ("1f1b",)  # without a pipeline they are all the same
        for kind, sequences, recompute in itertools.product(kinds, SEQUENCES, ("none", "report", "layer")):
            try:
                batch = dataclasses.replace(config.batch, microbatch=sequences * data * node * gpu)
                changed = dataclasses.replace(config, batch=batch, recompute=recompute)
                yield plan_cluster(changed, device, mesh, kind)
            except ConfigError:
                continue


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]


def _least_seconds(plan: ClusterPlan) -> float:
    """Products or exchange of the busiest rank, whichever is more, with nothing waited for."""
    schedule = plan.schedule
    each = schedule.microbatches / schedule.copies

    def rank_seconds(rank: int) -> float:
        times = [plan.chunk_times[chunk] for chunk in schedule.chunks(rank)]
        return max(sum(t.forward + t.backward for t in times), sum(2 * t.exchange for t in times))

    return each * max(map(rank_seconds, range(schedule.ranks)))
