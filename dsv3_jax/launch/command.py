"""`dsv3 launch slurm | local | k8s`."""

import argparse
from pathlib import Path
from typing import Any

from dsv3_jax.launch.training import Training, check_mesh

_ABOUT = "Settings of the run follow: --steps 40 --output-dir DIR; `dsv3 train CONFIG --help` lists them."


def add_launchers(parser: argparse.ArgumentParser) -> None:
    """The launchers and their options, as subcommands of `dsv3 launch`."""
    launchers = parser.add_subparsers(dest="launcher", required=True, metavar="slurm | local | k8s")

    def launcher(name: str, about: str) -> Any:
        sub = launchers.add_parser(name, help=about, description=f"{about}. {_ABOUT}", allow_abbrev=False)
        sub.add_argument("config", help="a config file, such as configs/v3_671b.py")
        return sub

    slurm = launcher("slurm", "write an sbatch file, and submit it with --submit")
    _add_nodes(slurm)
    slurm.add_argument("--processes-per-node", type=int, help="default: one a GPU")
    slurm.add_argument("--cpus-per-process", type=int, help="CPU cores of each process")
    slurm.add_argument("--time", help="time limit, such as 24:00:00; the run saves before it and is queued again")
    slurm.add_argument("--partition", help="SLURM partition")
    slurm.add_argument("--account", help="SLURM account")
    slurm.add_argument("--script", help="file to write (default job.sbatch in the output folder)")
    slurm.add_argument("--submit", action="store_true", help="submit it with sbatch")

    local = launcher("local", "run several processes on this machine")
    local.add_argument("--processes", type=int, required=True, help="how many; GPUs are shared evenly among them")

    k8s = launcher("k8s", "write the manifest of a Kubernetes Indexed Job")
    _add_nodes(k8s)
    k8s.add_argument("--image", required=True, help="container image with dsv3_jax[gpu] and the config file")
    k8s.add_argument("--claim", required=True, help="PersistentVolumeClaim that all pods can write to")
    k8s.add_argument("--mount", default="/runs", help="where it appears in the pods (default /runs)")
    k8s.add_argument("--script", help="file to write (default: print it)")


def _add_nodes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, required=True, help="machines")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default 8; 0 for machines without GPUs")
    parser.add_argument("--save-seconds", type=int, default=300, help="time to save before the end (default 300)")


def launch(arguments: argparse.Namespace, training: Training) -> int:
    """Do what `dsv3 launch` was asked for; returns the exit status."""
    return {"slurm": _slurm, "local": _local, "k8s": _k8s}[arguments.launcher](arguments, training)


def _slurm(arguments: argparse.Namespace, training: Training) -> int:
    from dsv3_jax.launch.slurm import SlurmJob, batch_script, submit

    job = SlurmJob(
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        processes_per_node=arguments.processes_per_node or max(1, arguments.gpus_per_node),
        cpus_per_process=arguments.cpus_per_process,
        time=arguments.time,
        partition=arguments.partition,
        account=arguments.account,
        save_seconds=arguments.save_seconds,
    )
    check_mesh(training.config, job.nodes, job.gpus_per_node, job.processes_per_node)
    path = Path(arguments.script or training.output_dir / "job.sbatch")
    _write(path, batch_script(training, job))
    # SLURM does not make the folder of the log.
    training.output_dir.mkdir(parents=True, exist_ok=True)
    if arguments.submit:
        print(f"submitted {path} as job {submit(path)}; its log is {training.output_dir}/slurm-*.log")
    else:
        print(f"written to {path}; submit it with: sbatch {path}")
    return 0


def _local(arguments: argparse.Namespace, training: Training) -> int:
    from dsv3_jax.launch.local import run_local

    return run_local(training.command(), arguments.processes)


def _k8s(arguments: argparse.Namespace, training: Training) -> int:
    from dsv3_jax.launch.kubernetes import KubernetesJob, manifest

    check_mesh(training.config, arguments.nodes, arguments.gpus_per_node, 1)
    fields = ("nodes", "gpus_per_node", "image", "claim", "mount", "save_seconds")
    text = manifest(training, KubernetesJob(**{name: getattr(arguments, name) for name in fields}))
    if arguments.script is None:
        print(text, end="")
        return 0
    _write(Path(arguments.script), text)
    print(f"written to {arguments.script}; start it with: kubectl apply -f {arguments.script}")
    return 0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
