"""Where a training run reports to: metrics.jsonl, the terminal, TensorBoard and Weights & Biases."""

import dataclasses
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from dsv3_jax.config import Config, ConfigError

REQUIRED = ("step", "tokens", "loss")

type Scalars = dict[str, float]


def plain(value: Any) -> Any:
    """A value as Python's own types: arrays as lists, numbers as bool, int or float, dicts and lists walked through.

    Float32 and narrower keep 9 significant digits: enough to tell any two float32 apart, so the value reads back
    exactly, and no more, so that equal values give equal text. Raises TypeError for what is no number, text or
    container of these.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    array = np.asarray(value)
    if array.dtype.kind in "OUSM":
        raise TypeError(f"a metric of type {type(value).__name__} cannot be written: use numbers, text, lists or dicts")
    if array.dtype.kind in "biu" or array.dtype == np.float64:
        return array.tolist()
    if array.ndim:
        return [plain(item) for item in array]
    return float(f"{float(array):.9g}")


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """metrics.jsonl: one JSON object a step, with at least `step`, `tokens` and `loss`.

    Identical runs write identical text, `timing` apart, since keys keep the caller's order and numbers are written by
    `plain`. NaN and infinities, which JSON lacks, are null. Every row is handed to the system before `write` returns,
    so a killed process leaves at most one unfinished line.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Starts a new file, or continues one after `resume_step`: later rows, and an unfinished last line, are cut
        off by replacing the file at once. Raises ValueError for an unreadable line before the last."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None and path.exists():
            _cut_after(path, resume_step)
        self._file = path.open("w" if resume_step is None else "a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a step's row. Raises ValueError when `step`, `tokens` or `loss` is missing."""
        missing = [key for key in REQUIRED if key not in row]
        if missing:
            raise ValueError(f"a metrics row lacks {', '.join(missing)}: it has {', '.join(row)}")
        self._file.write(json.dumps(_finite_or_null(plain(row)), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; an unfinished last line, of a run that was killed or still runs, is left out.

    Raises ValueError for an unreadable line before the last.
    """
    return [row for _, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                row["step"]
            except (ValueError, TypeError, KeyError):
                row = None
            if row is None or not line.endswith(b"\n"):
                if file.read(1):
                    raise ValueError(f"{path}, line {number}: not a metrics row: repair or remove that line")
                return
            yield line, row


def _cut_after(path: Path, step: int) -> None:
    kept = path.with_name(path.name + ".kept")
    with kept.open("wb") as file:
        file.writelines(line for line, row in _rows(path) if row["step"] <= step)
        file.flush()
        os.fsync(file.fileno())
    kept.replace(path)


def scalars(row: Mapping[str, Any], prefix: str = "") -> Scalars:
    """A row's numbers by name, as TensorBoard and Weights & Biases take them: `timing/mfu`, `mtp_loss/1` for the first
    of a list. Matrices, such as the load of every expert, are left out."""
    named: Scalars = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            named |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            named |= {f"{prefix}{key}/{i}": item for i, item in enumerate(value, 1) if isinstance(item, int | float)}
        elif isinstance(value, int | float):
            named[prefix + key] = value
    return named


class Reporter:
    """Sends each step's row to metrics.jsonl, the terminal, TensorBoard and Weights & Biases; a context manager.

    A row is a dict with `step`, `tokens`, `loss` and whatever else the step reports; values that differ between
    identical runs belong under `timing`, where the terminal looks for `tokens_per_second` and `seconds`. On a terminal
    a live bar shows the run; elsewhere a plain line appears for the first, every `print_every`-th and the last step,
    and for each step whose loss is not finite. Build it in process 0 alone.
    """

    def __init__(
        self, config: Config, resume_step: int | None = None, *, console: Console | None = None, print_every: int = 10
    ) -> None:
        """Opens every place to report to, in `config.output_dir`; `resume_step` is the last step already done.

        Raises ConfigError when `log.wandb_project` is set and wandb is not installed, before any file is touched.
        """
        self._console = console or Console()
        self._print_every = print_every
        self._total = config.steps
        self._reported = False
        self._seconds: deque[float] = deque(maxlen=20)
        self._sinks: list[Callable[[int, Scalars], object]] = []
        start_wandb = _import_wandb(config.log.wandb_project)
        folder = Path(config.output_dir)
        with ExitStack() as stack:
            self._log = MetricsLog(folder / "metrics.jsonl", resume_step)
            stack.callback(self._log.close)
            if start_wandb:
                self._open_wandb(stack, start_wandb, config, folder, resume_step)
            if config.log.tensorboard:
                self._open_tensorboard(stack, folder / "tensorboard", resume_step)
            self._bar = _progress_bar(self._console) if self._console.is_terminal else None
            if self._bar:
                stack.enter_context(self._bar)
                self._task = self._bar.add_task("", total=self._total, completed=resume_step or 0, status="starting")
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def record(self, row: Mapping[str, Any]) -> None:
        """Reports one step. Raises ValueError when `step`, `tokens` or `loss` is missing."""
        row = plain(row)
        self._log.write(row)
        named = scalars(row)
        for sink in self._sinks:
            sink(row["step"], named)
        self._seconds.append(row.get("timing", {}).get("seconds", math.nan))
        self._show(row)

    def message(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, row: dict[str, Any]) -> None:
        step, status = row["step"], _status(row, self._total - row["step"], self._seconds)
        if self._bar:
            self._bar.update(self._task, completed=step, status=status)
        due = not self._reported or step % self._print_every == 0 or step == self._total
        if not math.isfinite(row["loss"]) or (due and not self._bar):
            self.message(f"step {step}/{self._total}  {status}")
        self._reported = True

    def _open_tensorboard(self, stack: ExitStack, folder: Path, resume_step: int | None) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            self.message("no TensorBoard files: tensorboardX is not installed")
            return
        # purge_step hides what an earlier, killed run reported after the checkpoint; the suffix keeps the file of a run
        # resumed within a second apart from it
        first = (resume_step or 0) + 1
        writer = stack.enter_context(SummaryWriter(str(folder), purge_step=first, filename_suffix=f".from{first}"))
        self._sinks.append(lambda step, named: [writer.add_scalar(name, x, step) for name, x in named.items()])

    def _open_wandb(
        self, stack: ExitStack, start: Callable[..., Any], config: Config, folder: Path, resume_step: int | None
    ) -> None:
        id_file = folder / "wandb_run_id.txt"
        resumed = resume_step is not None and id_file.exists()
        run = start(
            project=config.log.wandb_project,
            dir=str(folder),
            id=id_file.read_text() if resumed else None,
            resume="allow",
            config=dataclasses.asdict(config),
        )
        id_file.write_text(run.id)
        stack.push(lambda kind, error, trace: run.finish(exit_code=int(kind is not None)))
        # W&B's own counter refuses to go back, as a resumed run must: plot over ours
        run.define_metric("*", step_metric="step")
        self._sinks.append(lambda step, named: run.log(named))


class NoReporter:
    """Takes the place of a `Reporter` in the processes other than 0, and reports nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record(self, row: Mapping[str, Any]) -> None:
        """Process 0 reports the step."""

    def message(self, text: str) -> None:
        """Process 0 prints the line."""


def _import_wandb(project: str | None) -> Callable[..., Any] | None:
    if project is None:
        return None
    try:
        from wandb import init
    except ImportError as error:
        raise ConfigError(
            f"log.wandb_project={project!r}: the wandb package is not installed: "
            "pip install 'dsv3-jax[wandb]', or leave log.wandb_project unset"
        ) from error
    return init


def _progress_bar(console: Console) -> Progress:
    status = TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True))
    bar = BarColumn(bar_width=None, table_column=Column(ratio=1))
    return Progress(MofNCompleteColumn(), bar, status, console=console, expand=True, refresh_per_second=4)


def _status(row: dict[str, Any], steps_left: int, seconds: deque[float]) -> str:
    """Loss, speed and time left; the time is the median of the last steps', which a compilation does not disturb."""
    parts = [f"loss {row['loss']:.4f}", f"{row['tokens']:,} tokens"]
    speed = row.get("timing", {}).get("tokens_per_second")
    if speed is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    each = np.median(seconds)
    if np.isfinite(each):
        parts.append(f"{timedelta(seconds=round(steps_left * each))} left")
    return "  ".join(parts)
