"""The training loop: data, steps, checkpoints, signals, and the report of every step."""

import logging
import signal
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from rich.console import Console

from dsv3_jax.checkpoint.training import Checkpoints, Restored
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.parallel.agreement import any_process
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.pipeline_stages import step_in_words
from dsv3_jax.train.batches import Batches
from dsv3_jax.train.ema import HostAverage
from dsv3_jax.train.loss import LossWeights
from dsv3_jax.train.report import NoReporter, Reporter
from dsv3_jax.train.schedules import bias_update_speed, learning_rate, mtp_weight
from dsv3_jax.train.state import TrainState, abstract_state, init_state
from dsv3_jax.train.step import Knobs, Step, StepReport, make_step
from dsv3_jax.train.text import Text, open_text
from dsv3_jax.train.throughput import Throughput, measure_throughput

logger = logging.getLogger(__name__)

_PROFILED_STEPS = (3, 6)


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what to change."""


@dataclass
class Progress:
    """What a run has to remember besides arrays."""

    step: int = 0
    tokens: int = 0
    rows: int = 0
    """Rows that each stream of the data has given."""
    bad_steps: int = 0
    """Steps in a row that were not finite."""
    device_seconds: float = 0.0
    buffer_factor: float = 0.0
    reruns: int = 0
    """Steps that were run again because the expert exchange overflowed its buffer."""
    data: list[dict[str, Any]] = field(default_factory=list)
    """The data iterator's state, by stream."""


@dataclass(frozen=True)
class Finished:
    """A run that has taken its last step, or was told to stop."""

    state: TrainState
    average: HostAverage | None
    text: Text
    mesh: Mesh
    progress: Progress
    rows_taken: int
    """Rows that each stream of the data has given."""
    interrupted: bool


def train(config: Config, console: Console | None = None) -> Finished:
    """Train from scratch, or from the newest checkpoint with `resume="auto"`; saves at the end and on SIGTERM.

    Raises ConfigError for settings that cannot work together, and TrainingError when steps stay non-finite.
    """
    mesh = make_mesh(config)
    # Closed even after an error, so that the last save is complete.
    with closing(Checkpoints(config.output_dir, config.checkpoint)) as checkpoints:
        if config.resume == "never" and checkpoints.steps():
            raise ConfigError(
                f"output_dir={config.output_dir!r}: already holds a run at step {checkpoints.steps()[0]}; continue it "
                "with resume=auto, or choose another folder"
            )
        restored = checkpoints.restore_newest(config, abstract_state(config, mesh))
        text = open_text(config, mesh, restored and len(restored.progress["data"]))
        run = _Run(config, mesh, text, checkpoints, restored)
        resumed = None if restored is None else restored.step
        with _Stop() as stop, _reporter(config, resumed, console) as reporter:
            reporter.message(_opening(config, mesh, text, resumed))
            interrupted = run.take_steps(stop, reporter)
    return Finished(run.state, run.average, text, mesh, run.progress, run.batches.rows_taken, interrupted)


class _Run:
    """The parts of a run that change from step to step."""

    def __init__(self, config: Config, mesh: Mesh, text: Text, checkpoints: Checkpoints, restored: Restored | None):
        self.config, self.mesh, self.text, self.checkpoints = config, mesh, text, checkpoints
        self.throughput: Throughput = measure_throughput(config, mesh.size)
        decay = config.optimizer.ema_decay
        if restored is None:
            self.state = init_state(config, mesh)
            self.progress = Progress(buffer_factor=config.parallel.expert_buffer_factor)
            self.average = HostAverage(self.state.params, decay) if decay else None
        else:
            self.state = restored.state
            self.progress = Progress(**restored.progress)
            wanted = config.parallel.expert_buffer_factor
            self.progress.buffer_factor = max(self.progress.buffer_factor, wanted)
            start = self.state.params if restored.average is None else restored.average
            self.average = HostAverage(start, decay) if decay else None
            self._restore_data()
        self.batches = Batches(text.streams, config.batch, mesh, self.progress.rows)
        self.throughput.tokens = self.progress.tokens
        self.throughput.device_seconds = self.progress.device_seconds
        self._steps: dict[float, Step] = {}

    def take_steps(self, stop: "_Stop", reporter: Reporter | NoReporter) -> bool:
        """Run to the last step, or until told to stop; returns whether it was."""
        first = self.progress.step
        while self.progress.step < self.config.steps:
            self._profile(self.progress.step - first, reporter)
            reporter.record(self._take_step())
            self._refuse_endless_failure()
            interrupted = stop.requested()
            if interrupted or self._save_is_due():
                self._save()
            if interrupted:
                reporter.message(f"stopped by SIGTERM after step {self.progress.step}; continue with --resume auto")
                return True
        self._profile(self.progress.step - first, reporter)
        return False

    def _profile(self, steps: int, reporter: Reporter | NoReporter) -> None:
        """Start and stop the trace, in process 0, after so many steps of this start."""
        if not self.config.profile or jax.process_index() != 0:
            return
        if steps == _PROFILED_STEPS[0]:
            jax.profiler.start_trace(self.config.output_dir + "/profile", create_perfetto_trace=True)
        elif steps == _PROFILED_STEPS[1]:
            jax.profiler.stop_trace()
            reporter.message(f"profile of three steps in {self.config.output_dir}/profile")

    def _take_step(self) -> dict[str, Any]:
        config, progress = self.config, self.progress
        sequences = config.batch.sequences_at(progress.tokens)
        started = time.perf_counter()
        tokens = self.batches.take(sequences)
        knobs, shown = _knobs(config, progress.tokens)
        report = self._apply(tokens, knobs)
        taken = sequences * config.batch.seq_len
        finite = bool(report.applied)
        if finite and self.average is not None:
            self.average.update(self.state.params)
        progress.step += 1
        progress.tokens += taken
        progress.bad_steps = 0 if finite else progress.bad_steps + 1
        timing = self.throughput.record(taken, time.perf_counter() - started)
        progress.device_seconds = self.throughput.device_seconds
        return _row(progress, report, shown, timing)

    def _apply(self, tokens: Array, knobs: Knobs) -> StepReport:
        """One step; again with a larger buffer where the expert exchange overflowed, so that no token is lost."""
        while True:
            factor = self.progress.buffer_factor
            if factor not in self._steps:
                self._steps = {factor: make_step(self.config, self.mesh, factor)}
            self.state, report = self._steps[factor](self.state, tokens, knobs)
            report = jax.device_get(report)
            overflow = int(report.losses.overflow)
            if not overflow:
                return report
            self.progress.buffer_factor = 2 * factor
            self.progress.reruns += 1
            logger.warning(
                "step %d: %d rows exceeded the expert buffer; run again with expert_buffer_factor=%g",
                self.progress.step + 1, overflow, 2 * factor,
            )  # fmt: skip

    def _refuse_endless_failure(self) -> None:
        bad, most = self.progress.bad_steps, self.config.max_bad_steps
        if bad >= most:
            raise TrainingError(
                f"{bad} steps in a row up to step {self.progress.step} had a non-finite loss or gradient, and none was "
                f"applied: lower optimizer.peak_lr={self.config.optimizer.peak_lr}, or resume from an earlier one of "
                f"the checkpoints in {self.checkpoints.folder}"
            )

    def _save_is_due(self) -> bool:
        step = self.progress.step
        return step % self.config.checkpoint.every == 0 or step == self.config.steps

    def _save(self) -> None:
        self.progress.data = self.batches.states()
        self.progress.rows = self.batches.rows_taken
        average = None if self.average is None else self.average.params()
        self.checkpoints.save(self.progress.step, self.config, self.state, average, asdict(self.progress))

    def _restore_data(self) -> None:
        states = self.progress.data
        for number, rows in self.text.streams.mine.items():
            # A number that is not there belongs to other settings, which every stream's state names.
            rows.set_state(states[min(number, len(states) - 1)])


class _Stop:
    """Whether SIGTERM has asked any process of the run to stop. Once it has, another changes nothing, also after the
    loop: schedulers send several, and one that ends a process on its way out makes the job a failed one."""

    def __init__(self) -> None:
        self._asked = self._stopping = False

    def __enter__(self) -> "_Stop":
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._stopping:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True

    def requested(self) -> bool:
        """True in every process once it is in one."""
        self._stopping = any_process(self._asked)
        return self._stopping


def _knobs(config: Config, tokens: int) -> tuple[Knobs, dict[str, float]]:
    """The schedules' values for the step that starts after `tokens` tokens, for the devices and for the report.

    The learning rate is that of the step's end, so that the first step of a warmup moves.
    """
    batch_tokens = config.batch.sequences_at(tokens) * config.batch.seq_len
    shown = {
        "lr": learning_rate(config.optimizer, tokens + batch_tokens),
        "mtp_weight": mtp_weight(config.loss, tokens),
        "bias_update_speed": bias_update_speed(config.loss, tokens),
    }
    weights = LossWeights(
        jnp.float32(shown["mtp_weight"]),
        jnp.float32(config.loss.sequence_balance_weight),
        jnp.float32(config.loss.batch_balance_weight),
    )
    return Knobs(jnp.float32(shown["lr"]), jnp.float32(shown["bias_update_speed"]), weights), shown


def _row(progress: Progress, report: StepReport, shown: dict[str, float], timing: dict[str, float]) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    losses = report.losses
    load = np.concatenate([np.asarray(counts) for counts in losses.load.values()]) if losses.load else None
    row = {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": losses.loss,
        "mtp_loss": losses.mtp_loss,
        "mtp_accuracy": losses.mtp_accuracy,
        "sequence_balance_loss": losses.sequence_balance,
        "batch_balance_loss": losses.batch_balance,
        "grad_norm": report.grad_norm,
        **shown,
        "applied": bool(report.applied),
        "dropped_tokens": int(losses.overflow),
        "expert_buffer_reruns": progress.reruns,
    }
    if load is not None:
        row["expert_load_max_over_mean"] = (load.max(axis=1) / np.maximum(load.mean(axis=1), 1)).tolist()
        row["expert_load"] = load.tolist()
    return {**row, "timing": timing}


def _reporter(config: Config, resumed: int | None, console: Console | None) -> Reporter | NoReporter:
    return Reporter(config, resumed, console=console) if jax.process_index() == 0 else NoReporter()


def _opening(config: Config, mesh: Mesh, text: Text, resumed: int | None) -> str:
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    shape += f"; {step_in_words(config)}" if config.parallel.pipe > 1 else ""
    start = "from the start" if resumed is None else f"from step {resumed}"
    return (
        f"{len(text.source)} documents of {config.data.source}, vocabulary {text.tokenizer.vocab_size}; "
        f"{mesh.size} {mesh.devices.flat[0].device_kind} ({shape}); steps to {config.steps}, {start}"
    )
