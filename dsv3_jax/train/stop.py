"""SIGTERM, by which schedulers ask a run to end: every process stops after the same step."""

import signal
from types import FrameType
from typing import Self

import jax
from jaxtyping import Array

from dsv3_jax.parallel.agreement import ask_any_process


class Stop:
    """Whether SIGTERM has asked any process of the run to stop. Once it has, another changes nothing, also after the
    loop: schedulers send several, and one that ends a process on its way out makes the job a failed one."""

    def __init__(self) -> None:
        self._asked = self._stopping = False
        self._answer: bool | Array | None = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._stopping:
            signal.signal(signal.SIGTERM, self._before)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True

    def ask(self) -> None:
        """Ask all processes, on the devices, after what these were given already."""
        self._answer = ask_any_process(self._asked)

    def requested(self) -> bool:
        """True in every process once it was in one; of what was asked last, else of now."""
        if self._answer is None or jax.process_count() == 1:
            self.ask()
        self._stopping, self._answer = bool(self._answer), None
        return self._stopping
