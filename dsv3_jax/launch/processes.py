"""What one process of a run does before and after its work: finds its place, meets the others, and ends with them."""

import hashlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from dsv3_jax.config import Config, ConfigError, to_dict
from dsv3_jax.launch.training import LaunchError
from dsv3_jax.launch.watch import Member, Watch, cannot_listen, unreachable

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""How plain processes are told their place."""
_LAUNCHERS = ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JOB_COMPLETION_INDEX")
# A second port for the watch. Jobs take their coordinator's among 4096 ports, by their number.
_WATCH_PORT_OFFSET = 4096
# The watch tells what happened first, jax's own heartbeats end what is left.
_HEARTBEAT_SECONDS = 50
_VERDICT_SECONDS = 10


@dataclass(frozen=True)
class Place:
    """One process's place in a run."""

    coordinator: str
    """host:port of the service that process 0 starts."""
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None
    """The host's devices that this process uses; None is all it sees."""

    @property
    def watch_address(self) -> str:
        """Where process 0 listens to the others, see `launch.watch`."""
        host, port = self.coordinator.rsplit(":", 1)
        below = int(port) - _WATCH_PORT_OFFSET
        return f"{host}:{below if below > 1024 else int(port) + _WATCH_PORT_OFFSET}"


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place, from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or else as jax detects
    srun, mpirun and Kubernetes' indexed jobs; None for a process on its own.

    Raises ConfigError where a place is half given, or a launcher lacks what jax needs to detect it.
    """
    if COUNT in environment or INDEX in environment:
        return _told_place(environment)
    if not any(name in environment for name in _LAUNCHERS):
        return None
    place = _detected_place("mpi4py" if _is_plain_mpi(environment) else None)
    return place if place.count > 1 else None


def _told_place(environment: Mapping[str, str]) -> Place | None:
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in environment]
    if missing:
        raise ConfigError(f"{missing[0]}: is not set; a process of several needs {ADDRESS}, {COUNT} and {INDEX}")
    try:
        address, count, index = environment[ADDRESS], int(environment[COUNT]), int(environment[INDEX])
        int(address.rsplit(":", 1)[1])
    except (ValueError, IndexError):
        shown = ", ".join(f"{name}={environment[name]!r}" for name in (ADDRESS, COUNT, INDEX))
        raise ConfigError(f"{shown}: give host:port and two whole numbers") from None
    if not 0 <= index < count:
        raise ConfigError(f"{INDEX}={index}: must lie between 0 and {COUNT} - 1 = {count - 1}")
    return Place(address, count, index) if count > 1 else None


def _is_plain_mpi(environment: Mapping[str, str]) -> bool:
    return "PMI_SIZE" in environment and not {"SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE"} & environment.keys()


def _detected_place(method: str | None) -> Place:
    # jax has no public name for what `jax.distributed.initialize()` would detect, and does not tell it in its errors.
    from jax._src.clusters import ClusterEnv

    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, method, None
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"jax cannot make out its place in this job: {reason}") from error
    if None in (address, count, index):
        raise ConfigError(
            "jax knows no way to make out its place in this job: install mpi4py under mpirun or kubernetes in a pod, "
            f"or set {ADDRESS}, {COUNT} and {INDEX} in each process"
        )
    return Place(address, count, index, None if devices is None else tuple(devices))


@contextmanager
def joined(config: Config, place: Place | None) -> Iterator[None]:
    """All processes of a run at work together: jax spans them inside, and one that dies or fails ends the others.

    Raises LaunchError where they do not find one another within `parallel.start_timeout`.
    """
    if place is None:
        yield
        return
    import jax

    host = socket.gethostname()
    watch = Watch(Member(place.watch_address, place.count, place.index, fingerprint(config), host), _die)
    watch.meet(config.parallel.start_timeout)
    try:
        _initialize(place, host, config.parallel.start_timeout)
        yield
    except BaseException as error:
        cause = str(error)
        if not _is_own_fault(error):
            # Another's death reaches this one as a broken collective too: leave it to the watch to say so.
            time.sleep(_VERDICT_SECONDS)
            cause = f"{type(error).__name__}: {error}"
        watch.report(" ".join(cause.split())[:500] or "interrupted")
        _end(error)
    watch.finish()
    jax.distributed.shutdown()


def _is_own_fault(error: BaseException) -> bool:
    """Whether this process itself found out why it cannot go on, and says it in a sentence."""
    # Some of the classes live in modules that are not imported before they are needed.
    names = ("ConfigError", "LaunchError", "TrainingError", "CheckpointError")
    return type(error).__name__ in names or isinstance(error, KeyboardInterrupt | FileNotFoundError | FileExistsError)


def _end(error: BaseException) -> None:
    """Say why and end, without waiting for the others as jax does at exit."""
    if isinstance(error, KeyboardInterrupt):
        print("dsv3: interrupted", file=sys.stderr)
    elif _is_own_fault(error):
        print(f"dsv3: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if _is_own_fault(error) and not isinstance(error, LaunchError) else 1)


def fingerprint(config: Config) -> str:
    """Stands for the settings of a run."""
    return hashlib.blake2b(json.dumps(to_dict(config), sort_keys=True).encode(), digest_size=16).hexdigest()


def _initialize(place: Place, host: str, seconds: float) -> None:
    import jax

    if place.index == 0:
        _check_port_is_free(place.coordinator, host)
    else:
        _wait_for_port(place.coordinator, host, seconds)
    # The loop saves on SIGTERM at a step that it agrees on itself.
    jax.config.update("jax_enable_preemption_service", False)
    _bypass_proxy(place.coordinator.rsplit(":", 1)[0])
    jax.config.update("jax_check_proxy_envs", False)
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, round(seconds)),
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_VERDICT_SECONDS,
    )


def _check_port_is_free(address: str, here: str) -> None:
    """jax itself would share the port with another job's coordinator."""
    port = int(address.rsplit(":", 1)[1])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise LaunchError(cannot_listen(port, here, error)) from error


def _wait_for_port(address: str, here: str, seconds: float) -> None:
    """jax itself would end the process without a word of which address it was."""
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(unreachable(address, here, error)) from error
        time.sleep(0.1)


def _bypass_proxy(host: str) -> None:
    """gRPC would go through an HTTP proxy of the environment, which does not know the cluster's hosts."""
    name = "no_grpc_proxy"
    kept = os.environ.get(name, os.environ.get("no_proxy", ""))
    os.environ[name] = ",".join(filter(None, (kept, host)))


def _die(sentence: str) -> None:
    """End at once: the main thread waits in a collective that will never complete."""
    print(f"dsv3: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)
