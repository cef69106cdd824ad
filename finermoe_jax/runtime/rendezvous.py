"""Checks that all processes of a run are present before jax.distributed joins them.

JAX aborts without an exception if the coordinator's port is in use, a process is missing, or an
index is used twice. So the processes first meet at the coordinator's address: each connects and
sends its index, and process 0 answers all of them when they are complete, or with an error. Then
the port is free for JAX.
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
# The others time out this much later, to receive process 0's verdict first.
_GRACE_SECONDS = 3.0


@dataclass(frozen=True)
class Member:
    """One process of a run and its meeting point.

    Attributes:
      address: host:port of process 0 for all processes.
      bind: host:port at which process 0 listens; an empty host means all interfaces.
      index, processes: this process's index and the process count.
      index_name, processes_name: the environment variables of these.
      port_name: the environment variable that sets the port.
    """

    address: str
    bind: str
    index: int
    processes: int
    index_name: str = "JAX_PROCESS_ID"
    processes_name: str = "JAX_NUM_PROCESSES"
    port_name: str = "JAX_COORDINATOR_ADDRESS"


def meet(member: Member, seconds: float) -> None:
    """Waits up to `seconds` until all processes are present.

    Raises InputError, in all present processes, if the port is in use, an index is used twice, the
    process counts differ, or a process is missing.
    """
    asyncio.run(_meet(member, seconds))


def refuse_taken(bind: str, port_name: str) -> None:
    """Raises InputError if process 0 cannot listen at `bind`; `port_name` sets the port."""

    async def probe() -> None:
        (await _listen(bind, port_name, lambda *_: None)).close()

    asyncio.run(probe())


def split_address(address: str, name: str) -> tuple[str, int]:
    """Splits `host:port` or `[IPv6]:port`. Raises InputError for anything else."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise InputError(f"{name}={address} must be HOST:PORT, such as 10.0.0.1:12345")
    return host.strip("[]"), int(port)


def bind_address(address: str, environment: Mapping[str, str]) -> str:
    """Returns the host:port at which the coordinator listens.

    JAX_COORDINATOR_BIND_ADDRESS if set; else `address` if it is an IP address of this machine (so
    127.0.0.1 stays local); else all interfaces, as a host name may resolve differently elsewhere.
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
        # Process 0 asks too: a second process 0 on another machine then gets the first's answer.
        message = await _ask(member, seconds)
        await register.answer_all()
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
            f"process 0 cannot listen on {bind} ({os.strerror(error.errno or 0)}): stop the "
            f"program that uses the port, or set another one in {port_name} for all processes"
        ) from None


class _Register:
    """Process 0's list of the present processes, and its answer to all of them."""

    def __init__(self, member: Member, seconds: float):
        loop = asyncio.get_running_loop()
        self.member = member
        self.present: dict[int, str] = {}  # index → host
        self.connections: set[asyncio.Task] = set()
        self.verdict: asyncio.Future[str] = loop.create_future()
        loop.call_later(seconds, self._give_up, seconds)

    def _decide(self, message: str) -> None:
        if not self.verdict.done():
            self.verdict.set_result(message)

    def _give_up(self, seconds: float) -> None:
        address, processes = self.member.address, self.member.processes
        missing = [str(p) for p in range(processes) if p not in self.present]
        self._decide(
            f"process {' and '.join(missing)} of {processes} did not connect to {address} within "
            f"{seconds:g} s: check why it has not started, or raise --start_timeout"
        )

    async def receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keeps a process's connection open until the verdict, and sends it."""
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
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
            else:  # it disconnected; a restarted one may take its place
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
        """Adds a process; decides if the list is complete or contradictory."""
        ours = self.member
        if processes != ours.processes:
            self._decide(
                f"process {index} (host {host}) was started with {ours.processes_name}={processes},"
                f" process 0 with {ours.processes}: set the same value for all, and give each run "
                f"its own port ({ours.port_name})"
            )
        elif index in self.present:
            self._decide(
                f"{ours.index_name}={index} is set for two processes, on {self.present[index]} "
                f"and on {host}: give each process its own of 0 … {processes - 1}, and each run "
                f"its own port ({ours.port_name})"
            )
        else:
            self.present[index] = host
            if len(self.present) == processes:
                self._decide("")

    async def answer_all(self) -> None:
        """Waits until the verdict has been sent to all present processes."""
        if self.verdict.done() and self.connections:
            await asyncio.wait(self.connections, timeout=_GRACE_SECONDS)


async def _ask(member: Member, seconds: float) -> str:
    """Returns process 0's answer: "" if all are present, else an error message."""
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
                    seen = "another program or another, complete run answered"
                except ConnectionError as error:
                    seen = os.strerror(error.errno or 0)
                except (OSError, ValueError) as error:
                    seen = str(getattr(error, "strerror", None) or error)
                await asyncio.sleep(_RETRY_SECONDS)
    if not member.index:
        return (
            f"process 0, on {socket.gethostname()}, cannot reach itself at {member.address} "
            f"({seen}): set its address for all processes in JAX_COORDINATOR_ADDRESS"
        )
    return (
        f"process {member.index} of {member.processes} did not find process 0 at {member.address} "
        f"within {seconds:g} s ({seen}): check why process 0 has not started, or raise "
        "--start_timeout"
    )


def _read(line: bytes) -> dict | None:
    """Parses a greeting from a process of the run; returns None for anything else."""
    try:
        values = parse_json(line, "a greeting")
    except InputError:
        return None
    return values if isinstance(values, dict) and values.get("from") == _GREETING else None
