"""Several processes as one run: who starts them, what they agree on, and what if one dies.

One process computes on all devices of its machine and needs nothing of this. Several are joined
by jax.distributed, which knows the common launchers. What is said here between processes goes
through the key-value store of its coordinator, which is process 0.
"""

import contextlib
import itertools
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import orbax.checkpoint as ocp

from finermoe_jax.errors import InputError, RunEnded
from finermoe_jax.runtime import rendezvous
from finermoe_jax.runtime.launchers import find_launch

HEARTBEAT_SECONDS = 60.0
START_SECONDS = 300.0

_PREFIX = "finermoe"
_BEAT, _END = f"{_PREFIX}/beat/", f"{_PREFIX}/end"
_DONE = "done"
_WEEK = 7 * 24 * 3600 * 1000  # ms; should a process be lost, the watch ends the wait
_numbers = itertools.count()
_hosts: list[str] = []


class _Refused(InputError):
    """An InputError that every process raises: nobody needs to be told."""


# --- joining --------------------------------------------------------------------------------


def initialize(
    heartbeat_seconds: float = HEARTBEAT_SECONDS, start_seconds: float = START_SECONDS
) -> None:
    """Joins the processes of this run, if it has several; to be called before JAX has devices.

    They meet first where the environment says where. Then JAX joins them, which aborts where one
    does not come: after start_seconds this process prints one message and ends with exit code 2.

    Raises InputError when the environment speaks of several processes and they cannot be joined.
    """
    launch = find_launch(os.environ)
    if launch is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if launch.member:
        rendezvous.meet(launch.member, start_seconds)
    alarm = threading.Timer(start_seconds, _not_joined, [start_seconds])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            **launch.arguments,
            # JAX's own watch ends a process without a word on checkpoints: ours comes first.
            heartbeat_timeout_seconds=max(1, round(2 * heartbeat_seconds)),
            initialization_timeout=round(start_seconds) + 60,  # ours comes first here, too
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes of this run cannot be joined: {error}\n"
            "see docs/launch.md; JAX_NUM_PROCESSES=1 runs one process on its own"
        ) from None
    finally:
        alarm.cancel()
    _hosts[:] = exchange(socket.gethostname())  # now: later a coordinator may not answer


def _not_joined(seconds: float) -> None:
    """Ends this process, whose main thread waits inside JAX for the others."""
    message = (
        f"error: not all processes of this run have started within {seconds:g} s: see what the "
        "launcher says of the others, or wait longer with --start_timeout"
    )
    os.write(2, f"\n{message}\n".encode())
    os._exit(2)


# --- agreeing -------------------------------------------------------------------------------


def exchange(text: str) -> list[str]:
    """Every process's text, by process index. All processes must call it, in the same order."""
    if jax.process_count() == 1:
        return [text]
    client, key = ocp.multihost.get_jax_distributed_client(), f"{_PREFIX}/{next(_numbers)}/"
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
        raise _Refused(str(error)) from None
    for process, message in enumerate(messages):
        if message:
            raise _Refused(f"{_name(process)}: {message}")


def same(value: str, message: str) -> None:
    """Raises InputError, on every process, unless all have process 0's value."""
    values = exchange(value)
    for process, other in enumerate(values):
        if other != values[0]:
            raise _Refused(f"{_name(process)} {message}")


# --- when one is lost -----------------------------------------------------------------------


@contextlib.contextmanager
def watched(heartbeat_seconds: float, way_on: Callable[[], str]) -> Iterator[None]:
    """Ends this process when another is lost or fails, with one message that says which.

    A process that dies is missed after heartbeat_seconds, the coordinator at once; a failure is
    told to the others. The exit code is then 1. JAX's own watch does the same after twice that
    time, should this one be unable to.

    Args:
      heartbeat_seconds: how long a process may be silent.
      way_on: a sentence on where the run can go on, asked for when it must end.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    watch = _Watch(heartbeat_seconds, way_on)
    watch.start()
    try:
        yield
        watch.finish()
    except BaseException as error:
        if isinstance(error, RunEnded) and not error.alone:
            watch.finish()
            jax.distributed.shutdown()
            raise
        failed = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
        if failed and "RESOURCE_EXHAUSTED" not in str(error):
            # Most likely the other end is gone: then the watch finds out and ends this process.
            time.sleep(1.5 * heartbeat_seconds)
        watch.fail(error)
    jax.distributed.shutdown()


class _Watch(threading.Thread):
    """Beats for this process, and in process 0 listens to the others' beats."""

    def __init__(self, seconds: float, way_on: Callable[[], str]):
        super().__init__(name="watch over the processes", daemon=True)
        self.client = ocp.multihost.get_jax_distributed_client()
        self.seconds, self.way_on, self.over = seconds, way_on, False
        self.unreachable = f"{_name(0)}, the coordinator, was lost: it cannot be reached any more"
        self.heard = {p: ("", time.monotonic()) for p in range(1, jax.process_count())}
        # Looked up ahead, and beside the beats: there is no time for it when the end comes, and a
        # file system that hangs must not look like a lost process.
        self.known = ""
        threading.Thread(target=self._look_up, daemon=True).start()

    def _look_up(self) -> None:
        while not self.over:
            self.known = self.way_on()
            time.sleep(0.2)

    def run(self) -> None:
        """Until `over`; ends the process when another is lost."""
        for beat in itertools.count():
            # A coordinator may hang instead of ending, and what is asked of it with it.
            alarm = threading.Timer(self.seconds, self._end, [self.unreachable])
            alarm.daemon = True
            alarm.start()
            try:
                self.client.key_value_set(
                    f"{_BEAT}{jax.process_index()}", str(beat), allow_overwrite=True
                )
                if jax.process_index() == 0 and (silent := self._silent()):
                    names = " and ".join(map(_name, silent))
                    self._tell(
                        f"{names} was lost: nothing has been heard of it for {self.seconds:g} s"
                    )
                # Instead of a sleep: it returns at once when the run must end, or is cut off
                # when the coordinator is.
                message = self.client.blocking_key_value_get(_END, round(100 * self.seconds))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error) and not self.over:
                    continue
                message = self.unreachable
            finally:
                alarm.cancel()
            self._end(message)
            return

    def _silent(self) -> list[int]:
        """The processes whose beat has not changed for too long."""
        now = time.monotonic()
        for key, beat in self.client.key_value_dir_get(_BEAT):
            process = int(key.rpartition("/")[2])
            if process and self.heard[process][0] != beat:
                self.heard[process] = (beat, now)
        return [p for p, (_, when) in self.heard.items() if now - when > self.seconds]

    def _tell(self, message: str) -> None:
        self.client.key_value_set(_END, message, allow_overwrite=True)

    def _end(self, message: str) -> None:
        if self.over or message == _DONE:
            return
        # At once, and unbuffered: where the coordinator is lost, JAX is about to abort the process.
        os.write(2, f"\nerror: {message}. {self.known}\n".encode())
        if jax.process_index() == 0:
            time.sleep(1)  # the message's readers lose the coordinator with this process
        os._exit(1)

    def finish(self) -> None:
        """Ends the watch once all processes have done their work: one gone earlier is missed."""
        exchange(_DONE)
        self.over = True
        if jax.process_index() == 0:
            self._tell(_DONE)
        self.join(self.seconds)

    def fail(self, error: BaseException) -> NoReturn:
        """Tells the others what ended this process, then lets it end."""
        self.over = True
        refused = isinstance(error, (InputError, OSError, RunEnded))
        if not refused and not isinstance(error, (KeyboardInterrupt, SystemExit)):
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if not isinstance(error, _Refused):
            with contextlib.suppress(Exception):
                self._tell(f"{_name(jax.process_index())} failed: {reason}")
        if jax.process_index() == 0:
            time.sleep(1)
        if refused:
            raise error
        # Without the interpreter's shutdown, which waits for processes that wait for this one.
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _name(process: int) -> str:
    """A process by index and host."""
    host = f" (host {_hosts[process]})" if _hosts else ""
    return f"process {process} of {jax.process_count()}{host}"
