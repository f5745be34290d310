"""The processes of a run watch one another, so that one that dies takes all down, with its host's name and the cause.

Every process keeps one TCP connection to process 0. The kernel closes it when its process dies; a host that vanishes
falls silent. Either way process 0 tells the others who it was. Messages are lines of JSON.
"""

import asyncio
import json
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dsv3_jax.launch.training import LaunchError

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 40.0
"""A process that says nothing for so long is dead: a minute in all, with what it takes to tell the others."""
_RETRY_SECONDS = 0.2


@dataclass(frozen=True)
class Member:
    """One process of a run."""

    address: str
    """Where process 0 listens, host:port."""
    count: int
    index: int
    settings: str
    """Stands for the settings of the run: all processes must have the same."""
    host: str


class Watch:
    """Meets the other processes, and then watches them in a thread of its own until all are done.

    `stop` is called in that thread, once, with a sentence, when another process has died or failed.
    """

    def __init__(self, member: Member, stop: Callable[[str], None]):
        self._member, self._stop = member, stop
        self._loop = asyncio.new_event_loop()
        self._end = _Coordinator(member, self._failed) if member.index == 0 else _Worker(member, self._failed)
        self._over = False
        threading.Thread(target=self._loop.run_forever, name="watch", daemon=True).start()

    def meet(self, seconds: float) -> list[str]:
        """Every process's host, by index. Raises LaunchError unless all have come after so many seconds."""
        return self._run(self._end.meet(seconds)).result()

    def report(self, cause: str) -> None:
        """Tell the others that this process has failed."""
        self._over = True
        with suppress(OSError):
            self._run(self._end.report(cause)).result()

    def finish(self) -> None:
        """Wait until every process has finished its work, however long that takes."""
        self._run(self._end.finish()).result()
        self._over = True

    def _failed(self, sentence: str) -> None:
        if not self._over:
            self._over = True
            self._stop(sentence)

    def _run(self, work: Any) -> Future:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


class _Connection:
    """Lines of JSON both ways, with beats while there is nothing else to say."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer

    async def send(self, **message: Any) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")
        await self._writer.drain()

    async def receive(self) -> dict[str, Any]:
        """The next message that is no beat. Raises ConnectionError or TimeoutError with what happened."""
        while True:
            try:
                line = await asyncio.wait_for(self._reader.readline(), SILENCE_SECONDS)
            except TimeoutError:
                raise TimeoutError(f"has said nothing for {SILENCE_SECONDS:.0f} seconds") from None
            except OSError as error:
                raise ConnectionError(f"lost its connection ({error.strerror})") from error
            if not line.endswith(b"\n"):
                raise ConnectionError("was killed, ran out of memory or crashed")
            message = json.loads(line)
            if "beat" not in message:
                return message

    async def beat(self) -> None:
        with suppress(OSError):
            while True:
                await self.send(beat=True)
                await asyncio.sleep(BEAT_SECONDS)

    def close(self) -> None:
        self._writer.close()


class _Coordinator:
    """Process 0's end."""

    def __init__(self, member: Member, failed: Callable[[str], None]):
        self._member, self._failed = member, failed
        self._hosts = {0: member.host}
        self._connections: dict[int, _Connection] = {}
        self._misfit: str | None = None
        self._done: set[int] = set()
        self._all_here, self._all_done = asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task] = set()

    async def meet(self, seconds: float) -> list[str]:
        port = int(self._member.address.rsplit(":", 1)[1])
        try:
            self._server = await asyncio.start_server(self._welcome, port=port)
        except OSError as error:
            raise LaunchError(cannot_listen(port, self._member.host, error)) from error
        self._check_complete()
        try:
            await asyncio.wait_for(self._all_here.wait(), seconds)
        except TimeoutError:
            missing = sorted(set(range(self._member.count)) - set(self._hosts))
            sentence = (
                f"{len(self._hosts)} of {self._member.count} processes have come to {self._member.address} within "
                f"{seconds:.0f} seconds, without {_numbers(missing)}: look for their errors, check that each can reach "
                "this host and port, and if they only start slowly raise parallel.start_timeout"
            )
            await self._tell_all(stop=sentence)
            raise LaunchError(sentence) from None
        if self._misfit:
            await self._tell_all(stop=self._misfit)
            raise LaunchError(self._misfit)
        hosts = [self._hosts[i] for i in range(self._member.count)]
        await self._tell_all(go=hosts)
        return hosts

    async def report(self, cause: str) -> None:
        await self._tell_all(stop=_sentence(0, self._member.host, f"failed: {cause}"))

    async def finish(self) -> None:
        self._done.add(0)
        self._check_complete()
        await self._all_done.wait()
        await self._tell_all(bye=True)

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(reader, writer)
        try:
            hello = await connection.receive()
            index, host = int(hello["hello"]), str(hello["host"])
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()  # somebody else's connection
            return
        refusal = self._refusal(index, host, hello)
        if refusal:
            await connection.send(stop=refusal)
            connection.close()
            return
        self._hosts[index], self._connections[index] = host, connection
        self._tasks.add(asyncio.create_task(connection.beat()))
        self._check_complete()
        await self._listen(index, connection)

    def _refusal(self, index: int, host: str, hello: dict[str, Any]) -> str | None:
        if not 0 < index < self._member.count or index in self._hosts or hello.get("count") != self._member.count:
            return (
                f"process {index} of {hello.get('count')} on host {host} has no place in the run at "
                f"{self._member.address}, which has {self._member.count} processes: give each an index of its own, and "
                "every run a coordinator port of its own"
            )
        if hello.get("settings") != self._member.settings:
            self._misfit = (
                f"process {index} on host {host} has other settings than process 0 on host {self._member.host}: start "
                "all with the same config file and the same settings"
            )
            self._all_here.set()
        return self._misfit

    async def _listen(self, index: int, connection: _Connection) -> None:
        try:
            while True:
                message = await connection.receive()
                if "failed" in message:
                    await self._bury(index, f"failed: {message['failed']}")
                    return
                if "done" in message:
                    self._done.add(index)
                    self._check_complete()
        except (OSError, ValueError) as error:
            if not self._all_done.is_set():
                await self._bury(index, str(error))

    async def _bury(self, index: int, cause: str) -> None:
        sentence = _sentence(index, self._hosts[index], cause)
        await self._tell_all(stop=sentence)
        self._failed(sentence)

    async def _tell_all(self, **message: Any) -> None:
        async def tell(connection: _Connection) -> None:
            with suppress(OSError, TimeoutError):
                await asyncio.wait_for(connection.send(**message), BEAT_SECONDS)

        await asyncio.gather(*map(tell, self._connections.values()))

    def _check_complete(self) -> None:
        if len(self._hosts) == self._member.count:
            self._all_here.set()
        if len(self._done) == self._member.count:
            self._all_done.set()


class _Worker:
    """The end of a process other than 0."""

    def __init__(self, member: Member, failed: Callable[[str], None]):
        self._member, self._failed = member, failed
        self._bye = asyncio.Event()
        self._tasks: set[asyncio.Task] = set()

    async def meet(self, seconds: float) -> list[str]:
        member = self._member
        deadline = asyncio.get_running_loop().time() + seconds
        self._connection = await _connect(member, deadline)
        await self._connection.send(hello=member.index, host=member.host, count=member.count, settings=member.settings)
        self._tasks.add(asyncio.create_task(self._connection.beat()))
        try:
            message = await self._connection.receive()
        except OSError as error:
            raise LaunchError(f"process 0 at {member.address} {error}, before all had come") from error
        if "stop" in message:
            raise LaunchError(message["stop"])
        self._hosts = message["go"]
        self._tasks.add(asyncio.create_task(self._listen()))
        return self._hosts

    async def report(self, cause: str) -> None:
        await self._connection.send(failed=cause)

    async def finish(self) -> None:
        await self._connection.send(done=True)
        await self._bye.wait()

    async def _listen(self) -> None:
        try:
            message = await self._connection.receive()
        except (OSError, ValueError) as error:
            self._failed(_sentence(0, self._hosts[0], str(error)))
            return
        if "stop" in message:
            self._failed(message["stop"])
        else:
            self._bye.set()


async def _connect(member: Member, deadline: float) -> _Connection:
    """A connection to process 0, which may start later than this one."""
    host, port = member.address.rsplit(":", 1)
    loop = asyncio.get_running_loop()
    while True:
        try:
            return _Connection(*await asyncio.wait_for(asyncio.open_connection(host, int(port)), 10))
        except (OSError, TimeoutError) as error:
            if loop.time() > deadline:
                raise LaunchError(unreachable(member.address, member.host, error)) from error
        await asyncio.sleep(_RETRY_SECONDS)


def unreachable(address: str, here: str, error: Exception) -> str:
    """A sentence for a coordinator that cannot be connected to: what is wrong, and what to check."""
    host, port = address.rsplit(":", 1)
    if isinstance(error, socket.gaierror):
        check = f"the name {host} does not resolve there; add it to the name service or to /etc/hosts"
    elif isinstance(error, ConnectionRefusedError):
        check = f"nothing listens at port {port}, or a firewall refuses it; look whether process 0 runs on {host}"
    else:
        check = f"no answer; check that no firewall between the hosts closes port {port}"
    return f"the coordinator {address} cannot be reached from host {here}: {check}"


def cannot_listen(port: int, here: str, error: OSError) -> str:
    """A sentence for a port that process 0 cannot have."""
    return (
        f"process 0 on host {here} cannot listen at port {port} ({os.strerror(error.errno or 0)}): another program, "
        "perhaps an earlier run, has it; end that, or choose another coordinator port"
    )


def _sentence(index: int, host: str, cause: str) -> str:
    return f"process {index} on host {host} {cause}; the run stops"


def _numbers(missing: list[int]) -> str:
    shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return f"process{'es' if len(missing) > 1 else ''} {shown}"
