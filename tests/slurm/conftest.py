"""A real SLURM cluster of two nodes on this machine, in a folder of its own, gone after the tests."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

NODES = ("dsv3-test-1", "dsv3-test-2")
PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
CONFIG = """
ClusterName=dsv3-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/linear
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
JobRequeue=1
KillWait=5
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(condition, otherwise, seconds=60):
    # Every look starts a SLURM command.
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.3)


@dataclass(frozen=True)
class Cluster:
    """A running cluster; its environment is what submits to it."""

    environment: dict[str, str]
    wait_for = staticmethod(wait_for)

    def run(self, *command):
        """Standard output of a SLURM command."""
        done = subprocess.run(list(map(str, command)), env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def cluster():
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(
            f"{missing[0]} is not installed: tests/slurm/install.sh installs SLURM, as root on Debian or Ubuntu"
        )
    if os.getuid() != 0:
        pytest.skip("a cluster of its own takes root")
    # Short, since sockets have short names.
    with tempfile.TemporaryDirectory(prefix="dsv3-slurm-") as folder, ExitStack() as stack:
        stack.enter_context(resolving(NODES))
        yield start(Path(folder), stack)


def start(folder, stack):
    config, host = folder / "slurm.conf", socket.gethostname().split(".")[0]
    config.write_text(CONFIG.format(folder=folder, host=host, ports=free_ports(3), nodes=NODES))
    (folder / "state").mkdir()
    subprocess.run(["mungekey", "--create", f"--keyfile={folder}/munge.key"], check=True)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    files += [f"--socket={folder}/munge.socket"]
    environment = os.environ | {"SLURM_CONF": str(config)}
    stack.enter_context(daemon(["munged", "--foreground", "--force", *files], environment))
    wait_for(lambda: (folder / "munge.socket").exists(), "munged has made no socket")
    stack.enter_context(daemon(["slurmctld", "-D"], environment))
    for node in NODES:
        stack.enter_context(daemon(["slurmd", "-D", "-N", node], environment))
    cluster = Cluster(environment)
    stack.callback(cancel_all, cluster)
    wait_for(lambda: idle(environment) == len(NODES), f"the nodes are not idle; see {folder}")
    return cluster


def idle(environment):
    done = subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], env=environment, capture_output=True, text=True)
    return int(done.stdout.strip() or 0) if done.returncode == 0 else 0


def cancel_all(cluster):
    cluster.run("scancel", "--user=root")
    wait_for(lambda: not cluster.run("squeue", "-h").strip(), "jobs do not end")


@contextmanager
def daemon(command, environment):
    """A program that runs until the end, and its children with it."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def resolving(names):
    """Names of this machine, in /etc/hosts where they do not resolve: jax connects to the first node by its name."""
    hosts = Path("/etc/hosts")
    before = hosts.read_text()
    unknown = [name for name in names if not resolves(name)]
    if unknown:
        with hosts.open("a") as file:
            file.write(f"127.0.0.1 {' '.join(unknown)}\n")
    try:
        yield
    finally:
        if unknown:
            hosts.write_text(before)


def resolves(name):
    try:
        return socket.gethostbyname(name).startswith("127.")
    except OSError:
        return False


def free_ports(count):
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]
