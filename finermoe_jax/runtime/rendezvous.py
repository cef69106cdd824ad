"""Gathers the processes of a run before jax.distributed joins them.

JAX aborts a process, without an exception, where the coordinator's port is taken, a partner never
comes, or an index is given twice. So the processes meet here first, at the coordinator's address:
each connects and says its index, and process 0 answers all of them once they are complete, or says
what is wrong. The port is then free again for JAX.
"""

import asyncio
import contextlib
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.json_files import parse_json, to_json

_GREETING = "finermoe-jax"
_RETRY_SECONDS = 0.3
# Process 0's verdict on what is missing comes before the others give up by themselves.
_GRACE_SECONDS = 3.0


@dataclass(frozen=True)
class Member:
    """One process of a run, and where it meets the others.

    Attributes:
      address: host:port of process 0, as all reach it.
      bind: host:port at which process 0 listens; an empty host means all interfaces.
      index, processes: this process's, and how many there are.
      index_name, processes_name: the environment variables that say so.
      port_name: the one that gives all processes another port.
    """

    address: str
    bind: str
    index: int
    processes: int
    index_name: str = "JAX_PROCESS_ID"
    processes_name: str = "JAX_NUM_PROCESSES"
    port_name: str = "JAX_COORDINATOR_ADDRESS"


def meet(member: Member, seconds: float) -> None:
    """Returns in all processes once all are there; waits so many seconds for them.

    Raises InputError, in all that are there: the port is in use, an index is given twice, the
    processes disagree on their number, or not all came in time.
    """
    asyncio.run(_meet(member, seconds))


def refuse_taken(bind: str, port_name: str) -> None:
    """Raises InputError where process 0 cannot listen at `bind`; `port_name` gives another port."""

    async def look() -> None:
        (await _listen(bind, port_name, lambda *_: None)).close()

    asyncio.run(look())


def split_address(address: str, name: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[IPv6]:port`. Raises InputError for anything else."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise InputError(f"{name}={address} must be HOST:PORT, such as 10.0.0.1:12345")
    return host.strip("[]"), int(port)


def bind_address(address: str, environment: Mapping[str, str]) -> str:
    """host:port at which the coordinator listens.

    JAX_COORDINATOR_BIND_ADDRESS where it is set. Else the address itself where that is an IP
    address of this machine: 127.0.0.1 then stays out of the network's reach. A name may mean
    another address elsewhere than here, so with a name all interfaces are listened on.
    """
    if given := environment.get("JAX_COORDINATOR_BIND_ADDRESS"):
        return given
    host, port = split_address(address, "JAX_COORDINATOR_ADDRESS")
    try:
        version = ipaddress.ip_address(host).version
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except (ValueError, OSError):
        return f"[::]:{port}"
    return address


async def _meet(member: Member, seconds: float) -> None:
    if member.index:
        message = await _ask(member, seconds)
    else:
        register = _Register(member, seconds)
        server = await _listen(member.bind, member.port_name, register.receive)
        # Process 0 asks at the common address, too: a second process 0, on another machine, then
        # gets the first one's answer.
        message = await _ask(member, seconds)
        await register.all_told()
        server.close()
    if message:
        raise InputError(message)


async def _listen(bind: str, port_name: str, receive: Callable[..., Any]) -> asyncio.Server:
    host, port = split_address(bind, "JAX_COORDINATOR_BIND_ADDRESS")
    try:
        return await asyncio.start_server(
            receive, None if host in ("", "::", "0.0.0.0") else host, port
        )
    except OSError as error:
        raise InputError(
            f"process 0 cannot listen on {bind} ({os.strerror(error.errno or 0)}): end "
            f"what uses the port, or give all processes another one in {port_name}"
        ) from None


class _Register:
    """Process 0's list of who is there, and its answer to all of them."""

    def __init__(self, member: Member, seconds: float):
        loop = asyncio.get_running_loop()
        self.member = member
        self.present: dict[int, str] = {}  # index → host
        self.telling: set[asyncio.Task] = set()
        self.verdict: asyncio.Future[str] = loop.create_future()
        loop.call_later(seconds, self._give_up, seconds)

    def _decide(self, message: str) -> None:
        if not self.verdict.done():
            self.verdict.set_result(message)

    def _give_up(self, seconds: float) -> None:
        address, processes = self.member.address, self.member.processes
        missing = [str(p) for p in range(processes) if p not in self.present]
        self._decide(
            f"process {' and '.join(missing)} of {processes} did not come to {address} within "
            f"{seconds:g} s: see why it has not started, or wait longer with --start_timeout"
        )

    async def receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Holds a process's connection until there is an answer to send."""
        task = asyncio.current_task()
        assert task is not None
        self.telling.add(task)
        with contextlib.closing(writer), contextlib.suppress(OSError, ValueError, KeyError):
            hello = _read(await self._unless_decided(reader.readline()))
            if hello is None:
                return
            self._enter(hello["index"], hello["processes"], hello["host"])
            await self._unless_decided(reader.read(1))
            if self.verdict.done():
                answer = {"from": _GREETING, "message": self.verdict.result()}
                writer.write(to_json(answer).encode() + b"\n")
                await writer.drain()
            else:  # it ended; one that is started in its place is welcome
                self.present.pop(hello["index"], None)

    async def _unless_decided(self, reading: Coroutine[Any, Any, bytes]) -> bytes:
        """Returns the bytes read, or b"" if the verdict comes first."""
        task = asyncio.ensure_future(reading)
        first: list[asyncio.Future[Any]] = [task, self.verdict]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        return b""

    def _enter(self, index: int, processes: int, host: str) -> None:
        """Adds a process; decides when the list is complete, or cannot be."""
        ours = self.member
        if processes != ours.processes:
            self._decide(
                f"process {index} (host {host}) was started with {ours.processes_name}={processes},"
                f" process 0 with {ours.processes}: give all the same, and each run its own port "
                f"({ours.port_name})"
            )
        elif index in self.present:
            self._decide(
                f"{ours.index_name}={index} was given to two processes, on {self.present[index]} "
                f"and on {host}: each needs its own of 0 … {processes - 1}, and each run its own "
                f"port ({ours.port_name})"
            )
        else:
            self.present[index] = host
            if len(self.present) == processes:
                self._decide("")

    async def all_told(self) -> None:
        """Waits until the verdict has been sent to all that are there."""
        if self.verdict.done() and self.telling:
            await asyncio.wait(self.telling, timeout=_GRACE_SECONDS)


async def _ask(member: Member, seconds: float) -> str:
    """Returns process 0's answer: "" when all are there. Without one, says who is missing."""
    host, port = split_address(member.address, "JAX_COORDINATOR_ADDRESS")
    hello = {
        "from": _GREETING,
        "index": member.index,
        "processes": member.processes,
        "host": socket.gethostname(),
    }
    seen, end = "no answer", time.monotonic() + seconds
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds + _GRACE_SECONDS):
            while time.monotonic() < end:
                try:
                    reader, writer = await asyncio.open_connection(host, port)
                    with contextlib.closing(writer):
                        writer.write(to_json(hello).encode() + b"\n")
                        answer = _read(await reader.readline())
                    if answer is not None:
                        return str(answer.get("message"))
                    seen = "another program answers, or a run that has all its processes"
                except ConnectionError as error:
                    seen = os.strerror(error.errno or 0)
                except (OSError, ValueError) as error:
                    seen = str(getattr(error, "strerror", None) or error)
                await asyncio.sleep(_RETRY_SECONDS)
    if not member.index:
        return (
            f"process 0, on {socket.gethostname()}, cannot reach itself at {member.address} "
            f"({seen}): give all processes its address in JAX_COORDINATOR_ADDRESS"
        )
    return (
        f"process {member.index} of {member.processes} has not found process 0 at {member.address} "
        f"within {seconds:g} s ({seen}): see why that one has not started, or wait longer with "
        "--start_timeout"
    )


def _read(line: bytes) -> dict | None:
    """Parses a greeting from a process of the run; returns None for anything else."""
    try:
        values = parse_json(line, "a greeting")
    except InputError:
        return None
    return values if isinstance(values, dict) and values.get("from") == _GREETING else None
