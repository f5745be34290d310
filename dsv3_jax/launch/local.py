"""Real processes on this machine, as a cluster would start them."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from dsv3_jax.config import ConfigError
from dsv3_jax.launch.processes import ADDRESS, COUNT, INDEX

_LINES = 20


def run_local(command: list[str], processes: int, environment: Mapping[str, str] = os.environ) -> int:
    """Run a command in so many processes that know of one another; returns the exit status of the run.

    Process 0 writes to this terminal. Of another that fails the last lines are shown. SIGTERM goes to all of them.
    Raises ConfigError where they cannot share this machine's GPUs.
    """
    if processes < 1:
        raise ConfigError(f"--processes {processes}: must be at least 1")
    shares = _shares(visible_gpus(environment), processes)
    address = f"localhost:{_free_port()}"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        others = [stack.enter_context(Path(folder, f"{i}.log").open("w+")) for i in range(1, processes)]
        logs = [None, *others]
        started = [
            subprocess.Popen(
                command,
                env={**environment, ADDRESS: address, COUNT: str(processes), INDEX: str(index), **shares[index]},
                stdout=logs[index],
                stderr=logs[index],
            )
            for index in range(processes)
        ]
        stack.enter_context(_forwarding(started))
        first = _first_failure(started)
        if first is not None:
            _show(first, started[first].returncode, logs[first])
    status = 0 if first is None else started[first].returncode
    return status if status >= 0 else 128 - status


def visible_gpus(environment: Mapping[str, str]) -> int:
    """How many GPUs the processes would see."""
    if environment.get("JAX_PLATFORMS") == "cpu":
        return 0
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len(list(filter(None, chosen.split(","))))
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _shares(gpus: int, processes: int) -> list[dict[str, str]]:
    """What tells each process which GPUs are its own."""
    if gpus % processes:
        raise ConfigError(
            f"--processes {processes}: {gpus} GPUs cannot be shared evenly; change it or CUDA_VISIBLE_DEVICES, or set "
            "JAX_PLATFORMS=cpu"
        )
    each = gpus // processes
    ids = [",".join(map(str, range(i * each, (i + 1) * each))) for i in range(processes)]
    return [{"JAX_LOCAL_DEVICE_IDS": mine} if mine else {} for mine in ids]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextmanager
def _forwarding(processes: list[subprocess.Popen]) -> Iterator[None]:
    """Pass SIGTERM and SIGINT on, and leave no process behind."""

    def forward(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()


def _first_failure(processes: list[subprocess.Popen]) -> int | None:
    """Waits for all; returns the index of the process that was the first to fail, as far as can be told."""
    running, failed = set(range(len(processes))), []
    while running:
        ended = [index for index in running if processes[index].poll() is not None]
        running -= set(ended)
        failed += sorted((i for i in ended if processes[i].returncode != 0), key=lambda i: processes[i].returncode >= 0)
        time.sleep(0.05)
    return failed[0] if failed else None


def _show(index: int, status: int, log: IO[str] | None) -> None:
    if log is not None:
        log.seek(0)
        sys.stderr.writelines(f"[process {index}] {line}" for line in log.readlines()[-_LINES:])
    if status < 0:
        print(f"dsv3: process {index} was ended by {signal.Signals(-status).name}", file=sys.stderr)
