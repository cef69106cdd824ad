"""SIGTERM and Ctrl-C: the run finishes and saves the current step, and exits with code 75."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes
INTERRUPTED = 130  # a shell's exit code for Ctrl-C
_AGAIN_SECONDS = 0.05  # time for the finalizer or callback to return


@contextlib.contextmanager
def redeliver_interrupts() -> Iterator[None]:
    """Resends a Ctrl-C that Python dropped.

    Inside a finalizer or a garbage-collector callback, such as JAX's, Python passes
    KeyboardInterrupt to sys.unraisablehook and continues.
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
def handled(numbers: Sequence[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handles these signals inside the block."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step that returns True if the run must stop after it.

    All processes must call it after every step, in order; it is true at the same step on all.
    With several processes any may get SIGTERM: JAX's preemption service agrees on a common step.
    The first Ctrl-C counts as SIGTERM, the second exits at once; further SIGTERMs are no-ops.
    Outside the main thread no signal is handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    import jax  # here: every command imports this module
    from jax.experimental import multihost_utils

    several = jax.process_count() > 1
    received: list[int] = []

    def listen(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in received:
            os._exit(128 + number)
        received.append(number)
        if several and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)  # handled by JAX

    listened = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    with handled(listened, listen):
        yield (
            multihost_utils.reached_preemption_sync_point
            if several
            else lambda step: bool(received)
        )
