"""Processes of a run that meet and watch one another: one that is gone is named to all others, with its host."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from dsv3_jax.launch import watch as module
from dsv3_jax.launch.training import LaunchError
from dsv3_jax.launch.watch import Member, Watch


class Process:
    """One member, with a thread for a process."""

    def __init__(self, member):
        self.stopped, self.sentence = threading.Event(), None
        self.watch = Watch(member, self._stop)

    def _stop(self, sentence):
        self.sentence = sentence
        self.stopped.set()

    def die(self):
        """As the kernel ends the connections of a killed process."""
        end = self.watch._end
        connections = list(end._connections.values()) if hasattr(end, "_connections") else [end._connection]

        def abort():
            for connection in connections:
                connection._writer.transport.abort()

        self.watch._loop.call_soon_threadsafe(abort)

    def fall_silent(self):
        """As a host whose power fails: nobody closes its connections."""
        for task in self.watch._end._tasks:
            self.watch._loop.call_soon_threadsafe(task.cancel)


def members(count, settings="same"):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    return [Member(address, count, index, settings, f"host{index}") for index in range(count)]


def meet(processes, seconds=20):
    """What each is told, all at once: hosts, or the sentence of a LaunchError."""

    def told(process):
        try:
            return process.watch.meet(seconds)
        except LaunchError as error:
            return str(error)

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(told, processes))


def start(count):
    processes = [Process(member) for member in members(count)]
    assert meet(processes) == [[f"host{index}" for index in range(count)]] * count
    return processes


@pytest.mark.parametrize("victim", [0, 2])
def test_process_that_dies_is_named_to_all_others(victim):
    processes = start(4)
    processes[victim].die()
    for index, process in enumerate(processes):
        if index != victim:
            assert process.stopped.wait(10), index
            assert process.sentence.startswith(f"process {victim} on host host{victim} ")


def test_host_that_falls_silent_is_named(monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "SILENCE_SECONDS", 1.0)
    processes = start(3)
    time.sleep(2)
    assert not any(process.stopped.is_set() for process in processes), "beats keep a quiet run alive"
    processes[1].fall_silent()
    for process in (processes[0], processes[2]):
        assert process.stopped.wait(10)
        assert process.sentence.startswith("process 1 on host host1 has said nothing for 1 seconds")


def test_failure_is_told_with_its_cause_and_all_finish_together():
    processes = start(3)
    processes[2].watch.report("data.source='texts': no such folder")
    for process in processes[:2]:
        assert process.stopped.wait(10)
        assert process.sentence == "process 2 on host host2 failed: data.source='texts': no such folder; the run stops"

    processes = start(3)
    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(process.watch.finish) for process in processes[1:]]
        time.sleep(0.5)
        assert not any(future.done() for future in done), "process 0 is still at work"
        processes[0].watch.finish()
        for future in done:
            future.result(10)
    assert not any(process.stopped.is_set() for process in processes)


def test_processes_that_do_not_come_are_named():
    came = [Process(member) for member in members(4) if member.index in (0, 2)]
    for sentence in meet(came, seconds=1):
        assert sentence.startswith("2 of 4 processes have come to localhost:")
        assert "without processes 1, 3" in sentence


def test_coordinator_that_cannot_be_reached_says_what_to_check():
    (alone,) = [member for member in members(2) if member.index == 1]
    (told,) = meet([Process(alone)], seconds=0.5)
    assert told.startswith(
        f"the coordinator {alone.address} cannot be reached from host host1: nothing listens at port"
    )
    (told,) = meet([Process(replace(alone, address="no-such-host.invalid:9"))], seconds=0.5)
    assert "the name no-such-host.invalid does not resolve" in told
    assert "/etc/hosts" in told


def test_run_with_other_settings_and_port_in_use_are_refused():
    first, second = members(2)
    started = time.monotonic()
    for told in meet([Process(first), Process(replace(second, settings="others"))], seconds=20):
        assert "process 1 on host host1 has other settings than process 0 on host host0" in told
    assert time.monotonic() - started < 5
    told = meet([Process(first)], seconds=1)
    assert "cannot listen at port" in told[0]
    assert "choose another coordinator port" in told[0]
