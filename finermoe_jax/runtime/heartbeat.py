"""Several processes that live and end together: when one is lost, the others end with its name."""

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
def heartbeats(heartbeat_seconds: float, way_on: Callable[[], str]) -> Iterator[None]:
    """Ends this process when another is lost or fails, with one message that says which.

    A process that dies is missed after heartbeat_seconds, the coordinator at once. A failure is
    reported to the others. The exit code is then 1. JAX's own watch does the same after twice that
    time if this process is unable to.

    Args:
      heartbeat_seconds: how long a process may be silent.
      way_on: returns one sentence on how to resume the run; called when the run must end.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    beats = Heartbeat(heartbeat_seconds, way_on)
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
            # Most likely the other end is gone: then the thread finds out and ends this process.
            time.sleep(1.5 * heartbeat_seconds)
        beats.fail(error)
    jax.distributed.shutdown()


class Heartbeat(threading.Thread):
    """Beats for this process, and in process 0 listens to the others' beats."""

    def __init__(self, seconds: float, way_on: Callable[[], str]):
        super().__init__(name="heartbeat", daemon=True)
        self.client = ocp.multihost.get_jax_distributed_client()
        self.seconds, self.way_on, self.over = seconds, way_on, False
        first = distributed.process_name(0)
        self.unreachable = f"{first}, the coordinator, was lost: it cannot be reached any more"
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
                    names = " and ".join(map(distributed.process_name, silent))
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
        """Ends the beats once all processes have done their work: one gone earlier is missed."""
        distributed.exchange(_DONE)
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
        if not isinstance(error, distributed.RefusedByAll):
            with contextlib.suppress(Exception):
                self._tell(f"{distributed.process_name(jax.process_index())} failed: {reason}")
        if jax.process_index() == 0:
            time.sleep(1)
        if refused:
            raise error
        # Without the interpreter's shutdown, which waits for processes that wait for this one.
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
