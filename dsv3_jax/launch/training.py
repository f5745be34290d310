"""A run to launch, and the command line that each of its processes executes."""

import sys
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.config import Config, ConfigError

STOPPED = 75
"""Exit status of a run that was told to stop and wants to go on later: EX_TEMPFAIL of sysexits.h."""


class LaunchError(RuntimeError):
    """A run could not be started, or lost one of its processes; the message says which and why."""


@dataclass(frozen=True)
class Training:
    """A run to launch: its config file, the settings given beside it, and what they come to."""

    file: str
    settings: tuple[str, ...]
    config: Config

    @property
    def output_dir(self) -> Path:
        """The run's output folder, absolute."""
        return Path(self.config.output_dir).expanduser().absolute()

    def command(self, file: str | None = None, python: str = sys.executable) -> list[str]:
        """What each process executes, with the config at `file`; a run that was stopped goes on where it was."""
        resume = [] if self.sets("resume") else ["--resume", "auto"]
        train = [python, "-m", "dsv3_jax.cli", "train", file or Path(self.file).absolute()]
        # Absolute, since a job may start in another folder.
        output = ["--output-dir", self.output_dir]
        return list(map(str, [*train, "--stopped-status", STOPPED, *output, *resume, *self._other_settings()]))

    def sets(self, name: str) -> bool:
        """Whether the settings beside the config file name this one, such as `output-dir`."""
        return any(_is(word, name) for word in self.settings)

    def _other_settings(self) -> list[str]:
        """All but the output folder."""
        kept, skip = [], False
        for word in self.settings:
            if not skip and not _is(word, "output-dir"):
                kept.append(word)
            skip = not skip and _is(word, "output-dir") and "=" not in word
        return kept


def check_mesh(config: Config, nodes: int, gpus: int, processes: int) -> None:
    """Raises ConfigError where the mesh of a run does not fit so many nodes with so many GPUs and processes each."""
    for name, value in (("--nodes", nodes), ("--processes-per-node", processes)):
        if value < 1:
            raise ConfigError(f"{name} {value}: must be at least 1")
    if gpus < 0 or gpus % processes:
        raise ConfigError(
            f"--gpus-per-node {gpus}: cannot be shared by {processes} processes of a node; make it a multiple of "
            "--processes-per-node, or 0 for nodes without GPUs"
        )
    devices = nodes * (gpus or processes)
    if config.parallel.devices not in (None, devices) and gpus:
        raise ConfigError(
            f"parallel.devices={config.parallel.devices}: the job has {nodes} x {gpus} GPUs; leave it out, or change "
            "--nodes or --gpus-per-node"
        )
    config.parallel.shape(config.parallel.devices or devices)


def _is(word: str, name: str) -> bool:
    return word.split("=")[0].replace("_", "-") == f"--{name}"
