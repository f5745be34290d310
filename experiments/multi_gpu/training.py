"""Whole training steps: the small MoE, two microbatches side by side, pipelines against their plan, and equality."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import Host, compile_all, lower_steps, print_table, run_steps, with_parallel

from dsv3_jax.cli import load_config
from dsv3_jax.config import BatchConfig, Config, ModelConfig, ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.program import exchange_overlaps
from dsv3_jax.parallel.trace import ExchangeTime, exchange_time, read_kernels
from dsv3_jax.planner.cluster import mean_state, plan_cluster
from dsv3_jax.planner.devices import Device, load_device
from dsv3_jax.planner.flops import training_flops_per_token_with_mtp

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = ModelConfig(
    vocab_size=256, d_model=128, num_layers=3, num_dense_layers=1, d_ff=128, num_heads=2, qk_nope_head_dim=64,
    qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=None, kv_lora_rank=128, num_experts=16, num_groups=4,
    top_k_groups=2, top_k=4, d_ff_expert=128, num_mtp_modules=1, max_length=64,
)  # fmt: skip
# A model that one GPU trains in float32, with everything a step has.
SMALL = replace(
    TINY, vocab_size=4096, d_model=512, num_layers=4, d_ff=1024, num_heads=4, qk_nope_head_dim=128, kv_lora_rank=256,
    num_experts=32, num_groups=8, top_k_groups=4, d_ff_expert=256, max_length=512,
)  # fmt: skip
ROOM = 0.4
"""Share of a GPU's memory for weights, gradients and optimizer: the rest is for activations and copies."""


def small_moe(host: Host, precision: str, microbatches: int = 4) -> Config:
    """configs/moe_16b.py, one sequence a device and microbatch, with as many of its layers as find room."""
    config = load_config(str(CONFIGS / "moe_16b.py"))
    config = replace(config, precision=precision, batch=_batch(host, 4096, microbatches))
    config = with_parallel(config, devices=host.devices, data=1, node=1, gpu=host.devices, expert_buffer_factor=2.0)
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


def measure_training(host: Host, precisions: list[str], steps: int) -> None:
    """Prints the small MoE's speed, experts over all devices, microbatches one after the other and side by side.

    The profile of a step says how much of the exchange ran beside products, the compiled program how much could.
    """
    layers = small_moe(host, "bf16").model.num_layers
    print_table(
        f"configs/moe_16b.py with {layers} layers, {4 * host.devices} sequences of 4096 a step, experts over "
        f"{host.devices} GPUs",
        ["precision", "microbatches", "ms a step", "tokens/s a GPU", "MFU", "busiest expert",
         "exchanges beside products, in the program", "exchange ms", "of it hidden"],
        (row for precision in precisions for row in _training_rows(host, precision, steps)),
    )  # fmt: skip


def _training_rows(host: Host, precision: str, steps: int) -> Iterator[list[str]]:
    configs = {name: _overlapped(small_moe(host, precision), name) for name in ("one by one", "two")}
    programs = compile_all(lower_steps(configs))
    for name, config in configs.items():
        folder = Path("profile") / f"{precision}_{name.replace(' ', '_')}"
        seconds, reports = run_steps(config, programs[name], steps, around=_profile(host, folder))
        tokens = config.batch.sequences * config.batch.seq_len / seconds / host.devices
        flops = training_flops_per_token_with_mtp(config.model, config.batch.seq_len)
        found = exchange_overlaps(programs[name].as_text())
        beside = sum(bool(x.during) for x in found)
        load = max(float(np.max(x / x.mean(axis=-1, keepdims=True))) for x in reports[-1].losses.load.values())
        cells = [f"{1e3 * seconds:.0f}", f"{tokens:,.0f}", f"{tokens * flops / _peak():.1%}", f"{load:.2f}"]
        yield [precision, name, *cells, f"{beside} of {len(found)}", *_hidden(host, folder)]


def _overlapped(config: Config, name: str) -> Config:
    return with_parallel(config, overlap_microbatches=name == "two")


def _profile(host: Host, folder: Path) -> AbstractContextManager:
    return nullcontext() if host.tiny else jax.profiler.trace(str(folder))


def _hidden(host: Host, folder: Path) -> list[str]:
    """Of the GPU whose exchange takes longest."""
    if host.tiny:
        return ["-", "-"]
    times = [exchange_time(kernels) for kernels in read_kernels(folder).values()]
    longest = max(times, key=lambda time: time.exchange, default=ExchangeTime(0, 0, 0))
    return [f"{1e3 * longest.exchange:.0f}", f"{longest.hidden / max(longest.exchange, 1e-9):.0%}"]


def measure_pipelines(host: Host, schedules: list[str], ranks: int, steps: int) -> None:
    """Prints the step time of pipelines with four layers a rank, and what the planner says of it."""
    device = plan_device()
    configs = {kind: pipeline_config(host, kind, ranks) for kind in schedules}
    programs = compile_all(lower_steps(configs))
    table = []
    for kind, config in configs.items():
        seconds, _ = run_steps(config, programs[kind], steps)
        plan = plan_cluster(config, device, make_mesh(config).shape, kind)
        after = plan.sync_seconds + plan.optimizer_seconds
        cells = [seconds, plan.lockstep_seconds + after, plan.step_seconds]
        table.append([kind, *(f"{1e3 * s:.0f}" for s in cells), f"{seconds / cells[1]:.2f}"])
    config = next(iter(configs.values()))
    print_table(
        f"Pipeline of {ranks} ranks, {config.model.num_layers} layers of configs/moe_16b.py with "
        f"{config.model.num_experts} experts, {4 * ranks} microbatches of {host.devices // ranks} x "
        f"{config.batch.seq_len}",
        ["schedule", "ms a step", "planned, ranks in lockstep", "planned, asynchronous", "measured / lockstep"],
        table,
    )


def pipeline_config(host: Host, schedule: str, ranks: int) -> Config:
    """Four layers a rank; what is left of the devices shares the experts."""
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
    fast = dict.fromkeys(("network",), device.achieved["nvlink"])
    return replace(device, achieved=device.achieved | fast)


def _peak() -> float:
    return plan_device().peak["bf16"]


def check_equal(host: Host, steps: int) -> None:
    """Prints how far losses on several devices are from those of one, in float32."""
    meshes = {"gpu": {"gpu": host.devices}, "data": {"data": host.devices}, "pipe": {"pipe": host.devices}}
    if host.nodes > 1:
        meshes |= {
            "node x gpu": {"node": 2, "gpu": host.devices // 2},
            "pipe x gpu": {"pipe": 2, "gpu": host.devices // 2},
        }
    configs = {"one": _equality_config(host, {}, 1)}
    configs |= {name: _equality_config(host, mesh, host.devices) for name, mesh in meshes.items()}
    with jax.default_matmul_precision("highest"):
        programs = compile_all(lower_steps(configs), xla_gpu_autotune_level=0)  # which takes minutes in float32
    losses, biases = {}, {}
    for name, config in configs.items():
        _, reports = run_steps(config, programs[name], steps, fresh=True)
        losses[name] = np.array([[float(r.losses.loss), *np.ravel(r.losses.mtp_loss)] for r in reports])
        biases[name] = [r.losses.load for r in reports]
    table = [
        [
            _mesh_name(meshes[name]),
            f"{np.abs(losses[name] / losses['one'] - 1).max():.1e}",
            "equal" if _all_equal(biases[name], biases["one"]) else "differ",
        ]
        for name in meshes
    ]
    print_table(
        f"{steps + 2} steps in float32 against one device, whose loss goes from {losses['one'][0, 0]:.4f} to "
        f"{losses['one'][-1, 0]:.4f}",
        ["mesh", "largest difference of a loss", "experts' loads of all steps"],
        table,
    )


def _equality_config(host: Host, mesh: dict[str, int], devices: int) -> Config:
    sizes = {"data": 1, "node": 1, "gpu": 1} | mesh
    schedule = {"schedule": "1f1b"} if "pipe" in mesh else {}
    model = replace(TINY if host.tiny else SMALL, num_layers=max(4, host.devices), init_std=0.05)
    seq_len = 32 if host.tiny else 256
    return Config(
        model=model,
        batch=BatchConfig(seq_len=seq_len, sequences=2 * host.devices * host.devices, microbatch=host.devices),
        parallel=ParallelConfig(devices=devices, expert_buffer_factor=8.0, **sizes, **schedule),
        precision="fp32",
    )


def _mesh_name(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def _all_equal(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))
