"""The training loop: data, steps, checkpoints, signals, and the report of every step."""

import logging
import time
from collections import deque
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from rich.console import Console

from dsv3_jax.checkpoint.training import Checkpoints, Restored
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.parallel.agreement import runs_in_order
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.pipeline_stages import step_in_words
from dsv3_jax.train.batches import Batches
from dsv3_jax.train.ema import HostAverage
from dsv3_jax.train.loss import LossWeights
from dsv3_jax.train.report import NoReporter, Reporter
from dsv3_jax.train.schedules import bias_update_speed, learning_rate, mtp_weight
from dsv3_jax.train.state import TrainState, abstract_state, init_state
from dsv3_jax.train.step import Knobs, Step, StepReport, make_step
from dsv3_jax.train.stop import Stop
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
        with Stop() as stop, _reporter(config, resumed, console) as reporter:
            reporter.message(_opening(config, mesh, text, resumed))
            interrupted = run.take_steps(stop, reporter)
    return Finished(run.state, run.average, text, mesh, run.progress, run.batches.rows_taken, interrupted)


@dataclass(frozen=True)
class _Sent:
    """A step that the devices were given, and may still be at."""

    number: int
    sequences: int
    tokens: Int[Array, "microbatches batch seq"]
    knobs: Knobs
    shown: dict[str, float]
    started: float
    report: StepReport | None = None
    """On the devices, once they were given the step."""


class _Run:
    """The parts of a run that change from step to step.

    The devices are given the next step before the report of the one they are at has come, so that they do not wait for
    the host. What the host must see in between, it sees: nothing is sent past a step after which a checkpoint is due or
    the profile begins or ends, nor past any step where an average of the weights is kept.
    """

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
        self.sends_ahead = self.average is None and runs_in_order()
        self._first = self.progress.step
        self._tokens_sent = self.progress.tokens
        self._under_way: deque[_Sent] = deque()
        self._settled_at = 0.0
        self._no_overflow = jax.device_put(np.int32(0), NamedSharding(mesh, PartitionSpec()))
        self._steps: dict[float, Step] = {}

    def take_steps(self, stop: Stop, reporter: Reporter | NoReporter) -> bool:
        """Run to the last step, or until told to stop; returns whether it was."""
        while self.progress.step < self.config.steps:
            self._profile(reporter)
            if self.sends_ahead:
                stop.ask()  # answered between the step under way and the next
            self._send()
            self._settle(reporter)
            interrupted = stop.requested()
            while interrupted and self._under_way:
                self._settle(reporter)
            if interrupted or self._save_is_due(self.progress.step):
                self._save()
            if interrupted:
                reporter.message(f"stopped by SIGTERM after step {self.progress.step}; continue with --resume auto")
                return True
        self._profile(reporter)
        return False

    def _profile(self, reporter: Reporter | NoReporter) -> None:
        """Start and stop the trace, in process 0, after so many steps of this start."""
        if not self.config.profile or jax.process_index() != 0:
            return
        steps = self.progress.step - self._first
        if steps == _PROFILED_STEPS[0]:
            jax.profiler.start_trace(self.config.output_dir + "/profile", create_perfetto_trace=True)
        elif steps == _PROFILED_STEPS[1]:
            jax.profiler.stop_trace()
            reporter.message(f"profile of three steps in {self.config.output_dir}/profile")

    def _send(self) -> None:
        """Give the devices the next step, and the one after it where they may have it already."""
        while len(self._under_way) < (2 if self.sends_ahead else 1):
            last = self._under_way[-1].number if self._under_way else self.progress.step
            if last >= self.config.steps or (self._under_way and self._must_see(last)):
                return
            started = time.perf_counter()
            sequences = self.config.batch.sequences_at(self._tokens_sent)
            tokens = self.batches.take(sequences)
            knobs, shown = _knobs(self.config, self._tokens_sent)
            self._tokens_sent += sequences * self.config.batch.seq_len
            self._launch(_Sent(last + 1, sequences, tokens, knobs, shown, started))

    def _must_see(self, step: int) -> bool:
        """Whether the host needs the state as it is after this step."""
        profiled = self.config.profile and step - self._first in _PROFILED_STEPS
        return profiled or self._save_is_due(step)

    def _launch(self, sent: _Sent) -> None:
        factor = self.progress.buffer_factor
        if factor not in self._steps:
            self._steps = {factor: make_step(self.config, self.mesh, factor)}
        before = self._under_way[-1].report.losses.overflow if self._under_way else self._no_overflow
        self.state, report = self._steps[factor](self.state, sent.tokens, replace(sent.knobs, overflow_before=before))
        self._under_way.append(replace(sent, report=report))

    def _settle(self, reporter: Reporter | NoReporter) -> None:
        """Wait for the oldest step under way, and count and report it."""
        config, progress = self.config, self.progress
        report = self._wait_without_overflow()
        sent = self._under_way.popleft()
        taken = sent.sequences * config.batch.seq_len
        finite = bool(report.applied)
        if finite and self.average is not None:
            self.average.update(self.state.params)
        progress.step += 1
        progress.tokens += taken
        progress.bad_steps = 0 if finite else progress.bad_steps + 1
        now = time.perf_counter()
        timing = self.throughput.record(taken, now - max(sent.started, self._settled_at))
        self._settled_at = now
        progress.device_seconds = self.throughput.device_seconds
        reporter.record(_row(progress, report, sent.shown, timing))
        self._refuse_endless_failure()

    def _wait_without_overflow(self) -> StepReport:
        """The report of the oldest step under way; it runs again with a larger buffer where the expert exchange
        overflowed, so that no token is lost, and so does what came after it, which changed nothing."""
        while True:
            report = jax.device_get(self._under_way[0].report)
            overflow = int(report.losses.overflow)
            if not overflow:
                return report
            factor = 2 * self.progress.buffer_factor
            self.progress.buffer_factor = factor
            self.progress.reruns += 1
            logger.warning(
                "step %d: %d rows exceeded the expert buffer; run again with expert_buffer_factor=%g",
                self.progress.step + 1, overflow, factor,
            )  # fmt: skip
            again, self._under_way = self._under_way, deque()
            for sent in again:
                self._launch(sent)

    def _refuse_endless_failure(self) -> None:
        bad, most = self.progress.bad_steps, self.config.max_bad_steps
        if bad >= most:
            raise TrainingError(
                f"{bad} steps in a row up to step {self.progress.step} had a non-finite loss or gradient, and none was "
                f"applied: lower optimizer.peak_lr={self.config.optimizer.peak_lr}, or resume from an earlier one of "
                f"the checkpoints in {self.checkpoints.folder}"
            )

    def _save_is_due(self, step: int) -> bool:
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
