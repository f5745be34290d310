"""Whole training steps: the small MoE, two microbatches side by side, pipelines against their plan, and equality."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import KNOBS, Host, print_table, run_steps, with_parallel
from jax.stages import Compiled

from dsv3_jax.cli import load_config
from dsv3_jax.config import BatchConfig, Config, ConfigError, ModelConfig, OptimizerConfig, ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.program import exchange_overlaps
from dsv3_jax.parallel.trace import ExchangeTime, exchange_time, read_kernels
from dsv3_jax.planner.cluster import mean_state, plan_cluster
from dsv3_jax.planner.devices import Device, load_device
from dsv3_jax.planner.flops import training_flops_per_token_with_mtp

Configs = dict[tuple, Config]
Programs = dict[tuple, Compiled]
CONFIGS = Path(__file__).parents[2] / "configs"
TINY = ModelConfig(
    vocab_size=256, d_model=128, num_layers=2, num_dense_layers=0, d_ff=128, num_heads=2, qk_nope_head_dim=64,
    qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=None, kv_lora_rank=128, num_experts=16, num_groups=4,
    top_k_groups=2, top_k=4, d_ff_expert=128, num_mtp_modules=0, max_length=64,
)  # fmt: skip
# A model that one GPU trains in float32, with everything a step has.
SMALL = replace(
    TINY, vocab_size=4096, d_model=512, num_layers=4, num_dense_layers=1, d_ff=1024, num_heads=4, qk_nope_head_dim=128,
    kv_lora_rank=256, num_experts=32, num_groups=8, top_k_groups=4, d_ff_expert=256, num_mtp_modules=1, max_length=512,
)  # fmt: skip
PROFILES = Path("runs/multi_gpu")
"""Where a profile of each training line is left."""
ROOM = 0.4
"""Share of a GPU's memory for weights, gradients and optimizer: the rest is for activations and copies."""


def small_moe(host: Host, precision: str, microbatches: int = 4) -> Config:
    """configs/moe_16b.py, one sequence a device and microbatch, with as many of its layers as find room."""
    config = load_config(str(CONFIGS / "moe_16b.py"))
    config = replace(config, precision=precision, batch=_batch(host, 4096, microbatches))
    # A router that has learnt nothing sends one GPU far more than others; `devices` times its share is all there is.
    room = float(min(host.devices, 4))
    config = with_parallel(config, devices=host.devices, data=1, node=1, gpu=host.devices, expert_buffer_factor=room)
    if host.tiny:
        return replace(config, model=TINY, batch=_batch(host, 32, microbatches))
    mesh = {"pipe": 1, "data": 1, "node": 1, "gpu": host.devices}
    for layers in range(config.model.num_layers, 1, -1):
        cut = replace(config, model=replace(config.model, num_layers=layers))
        if mean_state(cut, mesh) < ROOM * host.memory:
            return cut
    raise RuntimeError(f"two layers of configs/moe_16b.py do not fit {host.memory / 1e9:.0f} GB")


def _batch(host: Host, seq_len: int, microbatches: int) -> BatchConfig:
    return BatchConfig(seq_len=seq_len, sequences=microbatches * host.devices, microbatch=host.devices)


STREAMS = {1: "one by one", 2: "two side by side"}


def training_configs(host: Host, precisions: Sequence[str], streams: Sequence[int]) -> Configs:
    """The small MoE in each precision, its microbatches one after the other or two side by side."""
    return {
        (precision, STREAMS[n]): with_parallel(small_moe(host, precision), overlap_microbatches=n == 2)
        for precision in precisions
        for n in streams
    }


def measure_training(host: Host, configs: Configs, programs: Programs, steps: int) -> None:
    """Prints the small MoE's speed, experts over all devices.

    The profile of a step says how much of the exchange ran beside products, the compiled program how much could.
    """
    layers = next(iter(configs.values())).model.num_layers
    print_table(
        f"configs/moe_16b.py with {layers} layers, {4 * host.devices} sequences of 4096 a step, experts over "
        f"{host.devices} GPUs",
        ["precision", "microbatches", "ms a step", "tokens/s a GPU", "MFU", "busiest expert",
         "exchanges beside products, in the program", "exchange ms", "of it hidden"],
        ([*name, *_training_cells(host, config, programs[name], "_".join(name), steps)]
         for name, config in configs.items()),
    )  # fmt: skip


def _training_cells(host: Host, config: Config, program: Compiled, name: str, steps: int) -> list[str]:
    folder = PROFILES / name.replace(" ", "_")
    seconds, reports = run_steps(config, program, steps, around=_profile(host, folder))
    tokens = config.batch.sequences * config.batch.seq_len / seconds / host.devices
    flops = training_flops_per_token_with_mtp(config.model, config.batch.seq_len)
    found = exchange_overlaps(program.as_text())
    beside = sum(bool(x.during) for x in found)
    load = max(float(np.max(x / x.mean(axis=-1, keepdims=True))) for x in reports[-1].losses.load.values())
    cells = [f"{1e3 * seconds:.0f}", f"{tokens:,.0f}", f"{tokens * flops / plan_device().peak['bf16']:.1%}"]
    return [*cells, f"{load:.2f}", f"{beside} of {len(found)}", *_hidden(host, folder)]


def _profile(host: Host, folder: Path) -> AbstractContextManager:
    return nullcontext() if host.tiny else jax.profiler.trace(str(folder))


def _hidden(host: Host, folder: Path) -> list[str]:
    """Of the GPU whose exchange takes longest."""
    if host.tiny:
        return ["-", "-"]
    times = [exchange_time(kernels) for kernels in read_kernels(folder).values()]
    longest = max(times, key=lambda time: time.exchange, default=ExchangeTime(0, 0, 0))
    return [f"{1e3 * longest.exchange:.0f}", f"{longest.hidden / max(longest.exchange, 1e-9):.0%}"]


def pipeline_configs(host: Host, schedules: Sequence[str], ranks: Sequence[int]) -> Configs:
    """Each schedule on so many ranks."""
    return {(size, kind): pipeline_config(host, kind, size) for size in ranks for kind in schedules}


def measure_pipelines(configs: Configs, programs: Programs, steps: int) -> None:
    """Prints the step time of pipelines with four layers a rank, and what the planner says of it."""
    config = next(iter(configs.values()))
    print_table(
        f"Pipelines, 4 layers a rank of configs/moe_16b.py with {config.model.num_experts} experts, 4 microbatches a "
        f"rank, each of one sequence of {config.batch.seq_len} for every GPU that shares a stage's experts",
        ["ranks", "schedule", "ms a step", "planned, lockstep", "planned, asynchronous", "measured / lockstep"],
        ([str(name[0]), name[1], *_pipeline_cells(config, programs[name], steps)] for name, config in configs.items()),
    )


def _pipeline_cells(config: Config, program: Compiled, steps: int) -> list[str]:
    seconds, _ = run_steps(config, program, steps)
    plan = plan_cluster(config, plan_device(), dict(make_mesh(config).shape), config.parallel.schedule)
    after = plan.sync_seconds + plan.optimizer_seconds
    planned = plan.lockstep_seconds + after
    return [*(f"{1e3 * s:.0f}" for s in (seconds, planned, plan.step_seconds)), f"{seconds / planned:.2f}"]


def pipeline_config(host: Host, schedule: str, ranks: int) -> Config:
    """Four layers a rank; what is left of the devices shares the experts."""
    if host.devices % ranks:
        raise ConfigError(f"--pipe {ranks}: does not divide the {host.devices} devices; choose fewer ranks")
    spread = host.devices // ranks
    rows = 4 * ranks * spread
    base = load_config(str(CONFIGS / "moe_16b.py"))
    model = replace(TINY if host.tiny else replace(base.model, num_experts=16, vocab_size=32768), num_layers=4 * ranks)
    return replace(
        base,
        model=model,
        batch=BatchConfig(seq_len=32 if host.tiny else 4096, sequences=rows, microbatch=spread),
        parallel=ParallelConfig(
            devices=host.devices, pipe=ranks, data=1, node=1, gpu=spread, schedule=schedule, expert_buffer_factor=3.0
        ),
    )


def plan_device() -> Device:
    """The device file of this GPU, all links inside one host; h100 where there is none."""
    kind = jax.devices()[0].device_kind.lower()
    device = load_device("h200" if "h200" in kind else "h100")
    return replace(device, achieved=device.achieved | {"network": device.achieved["nvlink"]})


def equality_configs(host: Host) -> Configs:
    """A small model in float32 on one device, and on meshes of all."""
    all_of = host.devices
    meshes = [{}, {"gpu": all_of}, {"data": all_of}, {"pipe": all_of}]
    if host.nodes > 1:
        meshes += [{"node": 2, "gpu": all_of // 2}, {"pipe": 2, "gpu": all_of // 2}]
    return {tuple(mesh.items()): _equality_config(host, mesh, all_of if mesh else 1) for mesh in meshes}


def check_equal(configs: Configs, programs: Programs, steps: int) -> None:
    """Prints how far losses and gradients' norms on several devices are from those of one."""
    # AdamW's first steps move a weight by the learning rate whatever its gradient, also where that is all rounding.
    knobs = replace(KNOBS, learning_rate=np.float32(1e-5))
    reports = {name: run_steps(config, programs[name], steps, True, knobs)[1] for name, config in configs.items()}
    one, *several = configs
    losses = {name: np.array([[r.losses.loss, *r.losses.mtp_loss] for r in of]) for name, of in reports.items()}
    norms = {name: np.array([r.grad_norm for r in of]) for name, of in reports.items()}
    loads = {name: [r.losses.load for r in of] for name, of in reports.items()}
    print_table(
        f"{steps + 2} steps in float32 against one device, whose loss goes from {losses[one][0, 0]:.4f} to "
        f"{losses[one][-1, 0]:.4f}",
        [
            "mesh",
            "largest difference of a loss",
            "of it in the first 3 steps",
            "of a gradient's norm",
            "experts' loads",
        ],
        (
            [
                " x ".join(f"{axis} {size}" for axis, size in mesh),
                f"{_apart(losses[mesh], losses[one]):.1e}",
                f"{_apart(losses[mesh][:3], losses[one][:3]):.1e}",
                f"{_apart(norms[mesh], norms[one]):.1e}",
                "equal" if _all_equal(loads[mesh], loads[one]) else "differ",
            ]
            for mesh in several
        ),
    )


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a / b - 1).max())


def _equality_config(host: Host, mesh: dict[str, int], devices: int) -> Config:
    sizes = {"data": 1, "node": 1, "gpu": 1} | mesh
    schedule = {"schedule": "1f1b"} if "pipe" in mesh else {}
    model = replace(
        TINY if host.tiny else SMALL, num_layers=host.devices if host.tiny else max(4, host.devices), init_std=0.05
    )
    seq_len = 32 if host.tiny else 256
    return Config(
        model=model,
        batch=BatchConfig(seq_len=seq_len, sequences=2 * host.devices * host.devices, microbatch=host.devices),
        optimizer=OptimizerConfig(moments="float32"),
        parallel=ParallelConfig(devices=devices, expert_buffer_factor=8.0, **sizes, **schedule),
        precision="fp32",
    )


def _all_equal(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))
