"""A run as a SLURM job: a batch script that a person can read and change."""

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.launch.training import STOPPED, LaunchError, Training

_SCRIPT = """\
#!/bin/bash
{options}

# One process per GPU, or as many as asked for; jax finds the others by itself. They end together when one of them dies,
# and --wait ends what is left a minute after the first.
srun --kill-on-bad-exit=0 --wait=60 --distribution=block \\
  {command}
status=$?

# SIGTERM, before the time limit or at a preemption, makes the run save and exit with {stopped}: back to the queue, from
# where it goes on. A job that is being cancelled is not running any more, and stays away.
if [ $status -eq {stopped} ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
"""


@dataclass(frozen=True)
class SlurmJob:
    """What the job asks for; None leaves it to the cluster."""

    nodes: int
    gpus_per_node: int
    processes_per_node: int
    cpus_per_process: int | None
    time: str | None
    partition: str | None
    account: str | None
    save_seconds: int
    """Seconds before the time limit at which the run saves."""


def batch_script(training: Training, job: SlurmJob) -> str:
    """The sbatch file of a run."""
    log = training.output_dir / "slurm-%j.log"
    options = {
        "job-name": training.output_dir.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.processes_per_node,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_process,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "output": log,
        "open-mode": "append",
        "signal": f"TERM@{job.save_seconds}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    command = " \\\n    ".join(_words(training.command()))
    return _SCRIPT.format(options="\n".join([*lines, "#SBATCH --requeue"]), command=command, stopped=STOPPED)


def _words(command: list[str]) -> list[str]:
    """The command quoted, an option and its value together."""
    lines = [" ".join(map(shlex.quote, command[:5]))]
    for word in command[5:]:
        if word.startswith("--"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] += " " + shlex.quote(word)
    return lines


def submit(script: Path) -> str:
    """Hand the script to sbatch; returns the job's number. Raises LaunchError with what sbatch says."""
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise LaunchError(
            f"--submit: there is no sbatch on this machine; submit {script} from a login node of the cluster"
        ) from None
    except subprocess.CalledProcessError as error:
        raise LaunchError(f"--submit: sbatch refused {script}: {' '.join(error.stderr.split())}") from error
    return done.stdout.strip().split(";")[0]
