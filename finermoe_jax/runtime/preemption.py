"""SIGTERM and Ctrl-C: the step is finished and saved, and the command exits with code 75."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

# EX_TEMPFAIL of sysexits.h: running the same command again resumes.
EXIT_CODE = 75


# A moment for the finalizer or callback that lost an interrupt to return in.
_AGAIN_SECONDS = 0.05


@contextlib.contextmanager
def interrupts_arrive() -> Iterator[None]:
    """Makes sure that Ctrl-C reaches the program: an interrupt that Python drops comes again.

    Python raises KeyboardInterrupt wherever the program happens to be. In a finalizer or a callback
    of the garbage collector, such as JAX's, it can go no further: Python hands it to
    sys.unraisablehook, and the program would continue.
    """
    before = sys.unraisablehook

    def hook(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            again = threading.Timer(_AGAIN_SECONDS, os.kill, [os.getpid(), signal.SIGINT])
            again.daemon = True
            again.start()
        else:
            before(lost)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Gives a function that says whether a run must end after a step.

    To be asked after every step, in order, by all processes; true at the same step for all. One
    process listens to SIGTERM itself; of several any may get the signal, and JAX's preemption
    service agrees on a step that none has passed. Ctrl-C counts as SIGTERM the first time and ends
    the process at once the second time; repeating SIGTERM is a no-op. Outside the main thread no
    signal is handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    import jax  # here, as every command reads this module first
    from jax.experimental import multihost_utils

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
