"""Heartbeats between the processes of a run: if one is lost, the others exit and name it."""

import contextlib
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import orbax.checkpoint as ocp

from finermoe_jax.errors import InputError, RunEnded
from finermoe_jax.runtime import distributed

_BEAT, _END = f"{distributed.PREFIX}/beat/", f"{distributed.PREFIX}/end"
_DONE = "done"


@contextlib.contextmanager
def heartbeats(heartbeat_seconds: float, resume_hint: Callable[[], str]) -> Iterator[None]:
    """Exits with code 1 and one message if another process is lost or fails.

    A dead process is detected after heartbeat_seconds, a dead coordinator at once. A failure of
    this process is reported to the others. JAX's own heartbeats are a fallback after twice that
    time.

    Args:
      heartbeat_seconds: maximum time between two beats of a process.
      resume_hint: returns one sentence on how to resume the run.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    beats = Heartbeat(heartbeat_seconds, resume_hint)
    beats.start()
    try:
        yield
        beats.finish()
    except BaseException as error:
        if isinstance(error, RunEnded) and not error.alone:
            beats.finish()
            jax.distributed.shutdown()
            raise
        failed = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
        if failed and "RESOURCE_EXHAUSTED" not in str(error):
            # Another process is probably lost: give the thread time to detect it and exit.
            time.sleep(1.5 * heartbeat_seconds)
        beats.fail(error)
    jax.distributed.shutdown()


class Heartbeat(threading.Thread):
    """Sends this process's beats; in process 0 also checks the others'."""

    def __init__(self, seconds: float, resume_hint: Callable[[], str]):
        super().__init__(name="heartbeat", daemon=True)
        self.client = ocp.multihost.get_jax_distributed_client()
        self.seconds, self.resume_hint, self.over = seconds, resume_hint, False
        first = distributed.process_name(0)
        self.unreachable = f"{first}, the coordinator, was lost: it cannot be reached"
        self.heard = {p: ("", time.monotonic()) for p in range(1, jax.process_count())}
        # The hint is refreshed in a thread: there is no time for it at the end, and a hanging file
        # system must not stop the beats.
        self.hint = ""
        threading.Thread(target=self._refresh_hint, daemon=True).start()

    def _refresh_hint(self) -> None:
        while not self.over:
            self.hint = self.resume_hint()
            time.sleep(0.2)

    def run(self) -> None:
        """Beats until `over`; exits the process if another is lost."""
        for beat in itertools.count():
            # A hanging coordinator would block the calls below.
            alarm = threading.Timer(self.seconds, self._end, [self.unreachable])
            alarm.daemon = True
            alarm.start()
            try:
                self.client.key_value_set(
                    f"{_BEAT}{jax.process_index()}", str(beat), allow_overwrite=True
                )
                if jax.process_index() == 0 and (silent := self._silent()):
                    names = " and ".join(map(distributed.process_name, silent))
                    self._publish_end(f"{names} was lost: no heartbeat for {self.seconds:g} s")
                # Waits between beats; returns at once if the run must end or the coordinator is
                # lost.
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
        """Returns the processes whose beat has not changed for too long."""
        now = time.monotonic()
        for key, beat in self.client.key_value_dir_get(_BEAT):
            process = int(key.rpartition("/")[2])
            if process and self.heard[process][0] != beat:
                self.heard[process] = (beat, now)
        return [p for p, (_, when) in self.heard.items() if now - when > self.seconds]

    def _publish_end(self, message: str) -> None:
        self.client.key_value_set(_END, message, allow_overwrite=True)

    def _end(self, message: str) -> None:
        if self.over or message == _DONE:
            return
        # Unbuffered: if the coordinator is lost, JAX is about to abort this process.
        os.write(2, f"\nerror: {message}. {self.hint}\n".encode())
        if jax.process_index() == 0:
            time.sleep(1)  # lets the others read the message before the coordinator exits
        os._exit(1)

    def finish(self) -> None:
        """Stops the beats when all processes are done."""
        distributed.exchange(_DONE)
        self.over = True
        if jax.process_index() == 0:
            self._publish_end(_DONE)
        self.join(self.seconds)

    def fail(self, error: BaseException) -> NoReturn:
        """Reports this process's failure to the others, then exits or re-raises."""
        self.over = True
        refused = isinstance(error, (InputError, OSError, RunEnded))
        if not refused and not isinstance(error, (KeyboardInterrupt, SystemExit)):
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if not isinstance(error, distributed.RefusedByAll):
            with contextlib.suppress(Exception):
                name = distributed.process_name(jax.process_index())
                self._publish_end(f"{name} failed: {reason}")
        if jax.process_index() == 0:
            time.sleep(1)
        if refused:
            raise error
        # A normal interpreter shutdown would deadlock with the other processes.
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
