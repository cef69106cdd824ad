"""Several processes as one run: who starts them, and what they agree on.

One process computes on all devices of its machine and needs nothing of this. Several are joined
by jax.distributed, which knows the common launchers. What is said here between processes goes
through the key-value store of its coordinator, which is process 0.
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
from finermoe_jax.runtime.launchers import find_launch, mpi_ends

HEARTBEAT_SECONDS = 60.0
START_SECONDS = 300.0

PREFIX = "finermoe"
_WEEK = 7 * 24 * 3600 * 1000  # ms; should a process be lost, the heartbeats end the wait
_numbers = itertools.count()
_hosts: list[str] = []


class RefusedByAll(InputError):
    """An InputError that every process raises, so none has to notify the others."""


# --- joining --------------------------------------------------------------------------------


def initialize(
    heartbeat_seconds: float = HEARTBEAT_SECONDS, start_seconds: float = START_SECONDS
) -> None:
    """Joins the processes of this run, if it has several; to be called before JAX has devices.

    They meet first where the environment says where. Then JAX joins them, which aborts where one
    does not come: after start_seconds this process prints one message and ends with exit code 2.

    Raises InputError when the environment names several processes and they cannot be joined.
    """
    # A second later than the alarm in this process, which also has an exit code of its own.
    late = mpi_ends(os.environ, start_seconds + 1, _missing(start_seconds))
    with _within(start_seconds), late:
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
            # JAX's own watch ends a process without naming a checkpoint; heartbeats act first.
            heartbeat_timeout_seconds=max(1, round(2 * heartbeat_seconds)),
            initialization_timeout=round(start_seconds) + 60,  # _within acts first
        )
    _hosts[:] = exchange(socket.gethostname())  # now: later a coordinator may not answer


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Ends this process where what is done takes longer; what fails becomes one InputError."""
    alarm = threading.Timer(seconds, _not_joined, [seconds])
    alarm.daemon = True
    alarm.start()
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # also whatever MPI's and Kubernetes' clients raise
        raise InputError(
            f"the processes of this run cannot be joined: {error}\n"
            "see docs/launch.md; JAX_NUM_PROCESSES=1 runs one process on its own"
        ) from None
    finally:
        alarm.cancel()


def _not_joined(seconds: float) -> None:
    """Ends this process, whose main thread waits inside JAX for the others."""
    os.write(2, _missing(seconds).encode())
    os._exit(2)


def _missing(seconds: float) -> str:
    return (
        f"\nerror: not all processes of this run have started within {seconds:g} s: see what the "
        "launcher says of the others, or wait longer with --start_timeout\n"
    )


# --- agreeing -------------------------------------------------------------------------------


def exchange(text: str) -> list[str]:
    """Every process's text, by process index. All processes must call it, in the same order."""
    if jax.process_count() == 1:
        return [text]
    client, key = ocp.multihost.get_jax_distributed_client(), f"{PREFIX}/{next(_numbers)}/"
    client.key_value_set(f"{key}{jax.process_index()}", f"={text}")  # no value may be empty
    everyone = range(jax.process_count())
    return [client.blocking_key_value_get(f"{key}{p}", _WEEK)[1:] for p in everyone]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Checks that succeed everywhere or end every process: nobody is left waiting for the others.

    Raises InputError: what is wrong here or, if nothing is, what another process found.
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
    """Raises InputError, on every process, unless all have process 0's value."""
    values = exchange(value)
    for process, other in enumerate(values):
        if other != values[0]:
            raise RefusedByAll(f"{process_name(process)} {message}")


def process_name(process: int) -> str:
    """A process by index and host."""
    host = f" (host {_hosts[process]})" if _hosts else ""
    return f"process {process} of {jax.process_count()}{host}"
