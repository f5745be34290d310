"""What the sections of this experiment share."""

import dataclasses
import statistics
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled, Lowered

from dsv3_jax.config import Config
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.loss import LossWeights
from dsv3_jax.train.state import init_state
from dsv3_jax.train.step import Knobs, StepReport, make_step

KNOBS = Knobs(np.float32(3e-4), np.float32(1e-3), LossWeights(np.float32(0.3), np.float32(1e-4), np.float32(0.0)))


@dataclass(frozen=True)
class Host:
    """What is measured on."""

    devices: int
    tiny: bool
    """Sizes for emulated CPU devices."""

    @property
    def nodes(self) -> int:
        """Of the emulated cluster: GPUs of one host, taken for two nodes where each has several."""
        return 2 if self.devices >= 4 else 1

    @property
    def turns(self) -> dict[str, float]:
        """How long and how often each thing that is compared runs; emulated devices only show that it does."""
        return {"burst": 0.01, "rounds": 1} if self.tiny else {"burst": 0.1, "rounds": 5}

    @property
    def memory(self) -> float:
        """Bytes of a GPU that a program may use."""
        return jax.devices()[0].memory_stats()["bytes_limit"]


def compile_all(lowered: Mapping[Any, Lowered]) -> dict[Any, Compiled]:
    """Compiles many programs at once: one takes a core for most of its time."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(lowered, pool.map(Lowered.compile, lowered.values()), strict=True))


def tokens_of(config: Config, seed: int = 0) -> np.ndarray:
    """Random tokens of one step, [microbatches, rows, seq]."""
    batch = config.batch
    shape = (batch.sequences // batch.rows_per_microbatch, batch.rows_per_microbatch, batch.seq_len)
    return np.random.default_rng(seed).integers(0, config.model.vocab_size, shape).astype(np.int32)


def compile_steps(configs: Mapping[Any, Config]) -> dict[Any, Compiled]:
    """The training steps of many configs, each compiled while the next is traced. In float32 products are exact, and
    kernels are not tried out, which takes minutes there."""

    def lower(config: Config) -> Lowered:
        mesh = make_mesh(config)
        state = jax.eval_shape(lambda: init_state(config, mesh))
        return make_step(config, mesh).lower(state, tokens_of(config), KNOBS)

    def options(config: Config) -> dict[str, int] | None:
        return {"xla_gpu_autotune_level": 0} if config.precision == "fp32" else None

    with ThreadPoolExecutor(16) as pool:
        waiting = {}
        for name, config in configs.items():
            with jax.default_matmul_precision("highest" if config.precision == "fp32" else "default"):
                waiting[name] = pool.submit(lower(config).compile, options(config))
        return {name: future.result() for name, future in waiting.items()}


def run_steps(
    config: Config,
    step: Compiled,
    steps: int,
    fresh: bool = False,
    knobs: Knobs = KNOBS,
    around: AbstractContextManager | None = None,
) -> tuple[float, list[StepReport]]:
    """Median seconds of a step after the first two, and all reports.

    `fresh` gives every step tokens of its own; `around` holds one more step at the end. Raises RuntimeError where a
    step was not applied.
    """
    state, seconds, reports = init_state(config, make_mesh(config)), [], []
    for index in range(steps + 2):
        tokens = tokens_of(config, index if fresh else 0)
        started = time.perf_counter()
        state, report = jax.block_until_ready(step(state, tokens, knobs))
        seconds.append(time.perf_counter() - started)
        reports.append(jax.device_get(report))
        if not report.applied:
            raise RuntimeError(f"{int(report.losses.overflow)} rows found no room: raise expert_buffer_factor")
    if around is not None:
        with around:
            jax.block_until_ready(step(state, tokens_of(config), knobs))
    return statistics.median(seconds[2:]), reports


def with_parallel(config: Config, **changes: Any) -> Config:
    """The config on another mesh."""
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **changes))


def print_table(title: str, headers: list[str], rows: Iterable[list[str]]) -> None:
    """Markdown; each row as soon as it is measured, so that a run that is cut short has what it measured."""
    print(f"\n### {title}\n", f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}", sep="\n", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
