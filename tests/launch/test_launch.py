"""What the launchers write, and how a process finds its place."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dsv3_jax import cli
from dsv3_jax.config import ConfigError
from dsv3_jax.launch.kubernetes import job_name
from dsv3_jax.launch.local import run_local
from dsv3_jax.launch.processes import Place, find_place
from dsv3_jax.launch.training import Training

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/v3_671b.py")
MESH = ["--parallel.pipe", "1", "--parallel.schedule", "1f1b", "--parallel.node", "8", "--parallel.gpu", "8"]
TOLD = {"JAX_COORDINATOR_ADDRESS": "n1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "gpu[07-10]", "SLURM_NTASKS": "32", "SLURM_PROCID": "9",
         "SLURM_LOCALID": "1"}  # fmt: skip
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}  # fmt: skip


@pytest.fixture
def in_environment(monkeypatch):
    """The place of a process whose environment has these variables besides; jax reads the real one."""

    def place(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return find_place()

    return place


def test_place_is_told_or_detected(in_environment):
    assert in_environment({}) is None
    assert in_environment(SLURM) == Place("gpu07:61517", 32, 9, (1,))
    assert in_environment(TOLD) == Place("n1:1234", 4, 3), "what the user says comes first"


def test_place_under_open_mpi(in_environment):
    place = in_environment(OPEN_MPI)
    assert place.coordinator.startswith("10.96.0.1:")
    assert (place.count, place.index, place.local_devices) == (2, 1, (1,))


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS: is not set; a process of several needs"),
        ({**TOLD, "JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4: must lie between 0 and JAX_NUM_PROCESSES - 1 = 3"),
        ({**TOLD, "JAX_COORDINATOR_ADDRESS": "n1"}, "JAX_COORDINATOR_ADDRESS='n1', .* give host:port and two whole"),
        ({"JOB_COMPLETION_INDEX": "1"}, "install mpi4py under mpirun or kubernetes in a pod"),
    ],
)
def test_place_that_is_half_given_is_refused(variables, sentence):
    with pytest.raises(ConfigError, match=sentence):
        find_place(variables)


def test_slurm_script_says_what_was_asked_for_and_bash_reads_it(capsys, tmp_path):
    output = tmp_path / "the run"
    options = ["--nodes", "16", "--time", "24:00:00", "--partition", "gpu", "--account", "lab"]
    settings = [*MESH, "--steps", "40", "--output-dir", str(output)]
    assert cli.main(["launch", "slurm", CONFIG, *options, *settings]) == 0
    script = output / "job.sbatch"
    assert f"sbatch {script}" in capsys.readouterr().out
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    for line in ("nodes=16", "ntasks-per-node=8", "gpus-per-node=8", "time=24:00:00", "partition=gpu", "account=lab",
                 "requeue", "signal=TERM@300", f"output={output}/slurm-%j.log"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in text
    # The command as bash splits it, given to our own parser: the run that was asked for.
    command = text[text.index(sys.executable) : text.index("status=$?")]
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    ).stdout.split("\n")[:-1]
    assert words[3:5] == ["train", CONFIG]
    given = words[words.index("--output-dir") :]
    config = cli.override(cli.load_config(CONFIG), given, "train")
    assert config == dataclasses.replace(
        cli.override(cli.load_config(CONFIG), settings, "train"), output_dir=str(output), resume="auto"
    )


def test_kubernetes_manifest(capsys):
    options = ["--nodes", "16", "--image", "lab/dsv3:1", "--claim", "runs"]
    assert cli.main(["launch", "k8s", CONFIG, *options, *MESH, "--output-dir", "/runs/V3_a"]) == 0
    service, job = yaml.safe_load_all(capsys.readouterr().out)
    assert service["kind"] == "Service"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 16
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] == "v3-a"
    (container,) = pod["containers"]
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert container["env"][2] == {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}}
    told = {variable["name"]: variable.get("value", "3") for variable in container["env"]}
    assert find_place(told) == Place("v3-a-0.v3-a:55527", 16, 3)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert container["command"][4] == CONFIG
    assert [job_name(name) for name in ("671B", "My Run.2", "x" * 60)] == ["run-671b", "my-run-2", "x" * 52]


REFUSED = {
    "nodes": (["slurm", CONFIG, "--nodes", "3", *MESH], "data 1 x node 8 x gpu 8': is 64 devices, and there are 24"),
    "no node": (["slurm", CONFIG, "--nodes", "0"], "--nodes 0: must be at least 1"),
    "gpus": (
        ["slurm", CONFIG, "--nodes", "1", "--processes-per-node", "3"],
        "--gpus-per-node 8: cannot be shared by 3",
    ),
    "mount": (
        ["k8s", CONFIG, "--nodes", "256", "--image", "a", "--claim", "c", "--output-dir", "/tmp/a"],
        "--output-dir /tmp/a: lies outside /runs, where the pods share --claim c; choose a folder in /runs",
    ),
    "config": (["local", "no.py", "--processes", "2"], "no.py: no such config file"),
    "none": (["local", CONFIG, "--processes", "0"], "--processes 0: must be at least 1"),
}


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_launched_is_refused_in_one_sentence(capsys, arguments, sentence):
    assert cli.main(["launch", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sentence in error


def test_sbatch_that_is_missing_or_refuses_is_one_sentence(capsys, tmp_path, monkeypatch):
    command = ["launch", "slurm", CONFIG, "--nodes", "8", *MESH, "--output-dir", str(tmp_path / "run"), "--submit"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(command) == 1
    assert "there is no sbatch on this machine; submit" in capsys.readouterr().err
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert cli.main(command) == 1
    assert capsys.readouterr().err.endswith("sbatch: error: invalid partition\n")


def test_gpus_are_shared_evenly_among_local_processes(capfd):
    program = "import os; print(os.environ['JAX_LOCAL_DEVICE_IDS'], os.environ['JAX_PROCESS_ID'])"
    command = [sys.executable, "-c", program]
    assert run_local(command, 2, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}) == 0
    assert capfd.readouterr().out == "0,1 0\n", "process 0 alone is shown"
    with pytest.raises(ConfigError, match="--processes 3: 4 GPUs cannot be shared evenly"):
        run_local(command, 3, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"})


def test_local_launch_shows_why_another_process_failed(capfd):
    program = "import os, sys; sys.exit('no memory' if os.environ['JAX_PROCESS_ID'] == '1' else 0)"
    assert run_local([sys.executable, "-c", program], 2, {"JAX_PLATFORMS": "cpu"}) == 1
    assert capfd.readouterr().err == "[process 1] no memory\n"


def test_output_folder_is_given_once_and_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for settings in (("--output-dir", "a", "--steps", "3"), ("--output_dir=a", "--steps", "3")):
        config = cli.override(cli.load_config(CONFIG), list(settings), "train")
        command = Training(CONFIG, settings, config).command()
        assert command[-6:] == ["--output-dir", str(tmp_path / "a"), "--resume", "auto", "--steps", "3"]


def test_help_of_launch_answers_within_a_second_without_jax():
    program = "import sys; from dsv3_jax import cli\ntry: cli.main(['launch', '--help'])\nfinally: print(*sys.modules)"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
    assert "jax" not in done.stdout.split()
    assert "local" in done.stdout
