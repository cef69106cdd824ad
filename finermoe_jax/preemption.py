"""SIGTERM and Ctrl-C: the step is finished and saved, and the command exits with code 75."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: the same command again goes on.
EXIT_CODE = 75


@contextlib.contextmanager
def interrupts_end() -> Iterator[None]:
    """Ctrl-C ends the process at once, except while `stop_requests` listens.

    For the start of a run, which has nothing to save yet. As a KeyboardInterrupt it can be lost: a
    library may swallow the exception in a callback, and the run would train on. Several processes
    keep the exception, since the others have to hear of it.
    """
    if jax.process_count() > 1:
        yield
        return

    def end(number: int, frame: Any) -> None:
        os.write(2, b"interrupted\n")
        os._exit(128 + number)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Gives a function that says whether a run must end after a step.

    To be asked after every step, in order, by all processes; true at the same step for all. One
    process listens to SIGTERM itself; of several any may get the signal, and JAX's preemption
    service agrees on a step that none has passed. Ctrl-C counts as SIGTERM the first time and ends
    the process at once the second time; SIGTERM can be repeated without effect. Outside the main
    thread no signal is listened to.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    several = jax.process_count() > 1
    received: list[int] = []

    def listen(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in received:
            os._exit(128 + number)
        received.append(number)
        if several and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX listens to

    listened = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, listen) for number in listened}
    try:
        yield (
            multihost_utils.reached_preemption_sync_point
            if several
            else lambda step: bool(received)
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
