"""Saves that fail: a full disk, found before a save where possible, and any other failure."""

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from finermoe_jax.errors import RunEnded
from finermoe_jax.runtime import distributed
from finermoe_jax.weights.integrity import saved_steps


@contextlib.contextmanager
def failures() -> Iterator[list[Exception]]:
    """Collects the errors that Orbax's threads log, instead of showing their tracebacks.

    Orbax raises an error of a background save only when it is next called, or with several
    processes when a barrier's time is up. Its log has the error at once.
    """
    found: list[Exception] = []

    def listen(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if record.levelno < logging.ERROR or not isinstance(error, Exception):
            return True
        found.append(error)
        return False

    logger = logging.getLogger("absl")
    logger.addFilter(listen)
    try:
        yield found
    finally:
        logger.removeFilter(listen)


class Disk:
    """The disk under a run's checkpoints, and the saves that failed on it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._open = contextlib.ExitStack()
        self.failures = self._open.enter_context(failures())

    def close(self) -> None:
        """Stops listening."""
        self._open.close()

    def refuse_full(self, step: int, *trees: Any) -> None:
        """Raises RunEnded, on all processes, unless a checkpoint of these arrays has room."""
        size, files = _bytes(trees), 0
        if known := saved_steps(self.directory):
            newest = list((self.directory / str(known[-1])).rglob("*"))
            size, files = sum(path.stat().st_size for path in newest), len(newest)
        disk = os.statvfs(self.directory)
        full = size > disk.f_bavail * disk.f_frsize or (disk.f_files and files > disk.f_favail)
        if distributed.exchange("full" if full else "")[0]:
            raise RunEnded(
                f"step {step} is not saved: a checkpoint needs about {_text(size)} and {files} "
                f"files, and {self._full()}"
            )

    def check(self) -> None:
        """Raises RunEnded once a save has failed."""
        if self.failures:
            raise self._ended(self.failures[0])

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Raises RunEnded instead of whatever a failed save makes Orbax raise."""
        try:
            yield
        except RunEnded:
            raise
        except Exception as error:
            self.failures.append(error)
            raise self._ended(error) from error

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Raises RunEnded instead of what a full disk raises; other errors stay as they are."""
        try:
            yield
        except RunEnded:
            raise
        except Exception as error:
            if out_of_space(error):
                raise self._ended(error) from error
            raise

    def _ended(self, error: Exception) -> RunEnded:
        if out_of_space(error):
            return RunEnded(f"a checkpoint could not be written: {self._full()}", alone=True)
        reason = (str(error) or repr(error)).splitlines()[0].partition(" [tensorstore_spec")[0]
        return RunEnded(
            f"a checkpoint could not be written to {self.directory}: {reason}. "
            f"{self._complete()}. Mend that, then run the same command again",
            alone=True,
        )

    def _full(self) -> str:
        disk = os.statvfs(self.directory)
        free = f"{_text(disk.f_bavail * disk.f_frsize)} free"
        if disk.f_files:  # some file systems have no limit
            free += f", room for {disk.f_favail} more files"
        return (
            f"the disk of {self.directory} is full, {free}. {self._complete()}. Make room, then "
            "run the same command again"
        )

    def _complete(self) -> str:
        known = saved_steps(self.directory)
        return (
            f"Steps there are complete: {', '.join(map(str, known))}"
            if known
            else ("No step there is complete")
        )


def out_of_space(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a disk or quota that is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error)
        if "No space left on device" in text or "Disk quota exceeded" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _text(size: int) -> str:
    return tqdm.format_sizeof(size, "B")
