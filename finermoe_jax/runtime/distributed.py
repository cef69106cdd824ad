"""Multi-process runs: joining the processes, and agreement between them.

jax.distributed joins the processes. They exchange messages through the key-value store of its
coordinator, which is process 0. A run with a single process needs none of this.
"""

import contextlib
import itertools
import os
import socket
import threading
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp

from finermoe_jax.errors import InputError
from finermoe_jax.runtime import rendezvous
from finermoe_jax.runtime.launchers import find_launch, mpi_watchdog

HEARTBEAT_SECONDS = 60.0
START_SECONDS = 300.0

PREFIX = "finermoe"
_WEEK = 7 * 24 * 3600 * 1000  # ms; if a process is lost, the heartbeats end the wait
_numbers = itertools.count()
_hosts: list[str] = []


class RefusedByAll(InputError):
    """An InputError that all processes raise, so that none needs to notify the others."""


# --- joining --------------------------------------------------------------------------------


def initialize(
    heartbeat_seconds: float = HEARTBEAT_SECONDS, start_seconds: float = START_SECONDS
) -> None:
    """Joins the processes of this run, if it has several. Call it before JAX finds its devices.

    If a process is missing after start_seconds, prints one message and exits with code 2.

    Raises InputError if the environment describes several processes that cannot be joined.
    """
    # One second after the alarm of _within, which sets the right exit code.
    watchdog = mpi_watchdog(os.environ, start_seconds + 1, _timeout_message(start_seconds))
    with _within(start_seconds), watchdog:
        launch = find_launch(os.environ)
    if launch is None:
        return
    if launch.member:
        rendezvous.meet(launch.member, start_seconds)
    elif bind := launch.arguments.get("coordinator_bind_address"):
        rendezvous.refuse_taken(bind, "JAX_COORDINATOR_PORT")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    with _within(start_seconds):
        jax.distributed.initialize(
            **launch.arguments,
            # Longer than our own timeouts, which have better messages.
            heartbeat_timeout_seconds=max(1, round(2 * heartbeat_seconds)),
            initialization_timeout=round(start_seconds) + 60,
        )
    _hosts[:] = exchange(socket.gethostname())  # now: later the coordinator may be lost


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Exits if the block takes longer than `seconds`; converts its errors to InputError."""
    alarm = threading.Timer(seconds, _exit_on_timeout, [seconds])
    alarm.daemon = True
    alarm.start()
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # also those of MPI's and Kubernetes' clients
        raise InputError(
            f"the processes of this run cannot be joined: {error}\n"
            "See docs/launch.md, or set JAX_NUM_PROCESSES=1 to run a single process"
        ) from None
    finally:
        alarm.cancel()


def _exit_on_timeout(seconds: float) -> None:
    """Exits while the main thread is blocked inside JAX."""
    os.write(2, _timeout_message(seconds).encode())
    os._exit(2)


def _timeout_message(seconds: float) -> str:
    return (
        f"\nerror: not all processes of this run started within {seconds:g} s: check the "
        "launcher's output for the others, or raise --start_timeout\n"
    )


# --- agreeing -------------------------------------------------------------------------------


def exchange(text: str) -> list[str]:
    """Returns every process's text, by process index. All processes must call it in step."""
    if jax.process_count() == 1:
        return [text]
    client, key = ocp.multihost.get_jax_distributed_client(), f"{PREFIX}/{next(_numbers)}/"
    client.key_value_set(f"{key}{jax.process_index()}", f"={text}")  # values must not be empty
    everyone = range(jax.process_count())
    return [client.blocking_key_value_get(f"{key}{p}", _WEEK)[1:] for p in everyone]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs checks that must succeed on all processes; if one fails, all raise.

    Raises InputError with this process's error or, if it has none, another process's.
    """
    error = None
    try:
        yield
    except (InputError, OSError) as found:
        error = found
    messages = exchange(str(error) if error else "")
    if error:
        raise RefusedByAll(str(error)) from None
    for process, message in enumerate(messages):
        if message:
            raise RefusedByAll(f"{process_name(process)}: {message}")


def same(value: str, message: str) -> None:
    """Raises InputError on all processes unless they all have process 0's value."""
    values = exchange(value)
    for process, other in enumerate(values):
        if other != values[0]:
            raise RefusedByAll(f"{process_name(process)} {message}")


def process_name(process: int) -> str:
    """Names a process by index and host."""
    host = f" (host {_hosts[process]})" if _hosts else ""
    return f"process {process} of {jax.process_count()}{host}"
