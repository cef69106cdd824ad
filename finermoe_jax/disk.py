"""A disk that is full: found out before a save where possible, and told in one message."""

import contextlib
import errno
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from finermoe_jax import distributed
from finermoe_jax.errors import RunEnded
from finermoe_jax.integrity import saved_steps


class Disk:
    """The disk under a run's checkpoints.

    Orbax writes in threads, and tells of an error there only through its log until the next save,
    or with several processes until a barrier's time is up: so the log is listened to.
    """

    def __init__(self, directory: Path):
        self.directory, self.full = directory, False
        self.logger = logging.getLogger("absl")
        self.logger.addFilter(self._listen)
        self.hook = sys.excepthook
        sys.excepthook = self._quieted

    def close(self) -> None:
        """Listens no more."""
        self.logger.removeFilter(self._listen)
        sys.excepthook = self.hook

    def _quieted(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        # Each write that Orbax cuts off after the first failure says this from a thread.
        if str(error) != "Event loop is closed":
            self.hook(kind, error, trace)

    def _listen(self, record: logging.LogRecord) -> bool:
        if isinstance(record.exc_info, tuple) and out_of_space(record.exc_info[1]):
            self.full = True
            return False  # no traceback: what is raised says it
        return True

    def refuse_full(self, step: int, *trees: Any) -> None:
        """Raises RunEnded, on all processes, unless a checkpoint of these arrays has room."""
        known = saved_steps(self.directory)
        needed = _size(self.directory / str(known[-1])) if known else _bytes(trees)
        free = shutil.disk_usage(self.directory).free
        if distributed.exchange("full" if free < needed else "")[0]:
            raise RunEnded(
                f"step {step} is not saved: a checkpoint needs about {_text(needed)}, and "
                f"{self._state()}"
            )

    def check(self) -> None:
        """Raises RunEnded once a save has failed for want of room."""
        if self.full:
            raise RunEnded(f"a checkpoint could not be written: {self._state()}", alone=True)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Raises RunEnded instead of what a full disk makes Orbax raise."""
        try:
            yield
        except Exception as error:
            self.full |= out_of_space(error)
            self.check()
            raise

    def _state(self) -> str:
        known, free = saved_steps(self.directory), shutil.disk_usage(self.directory).free
        size = f" (one takes {_text(_size(self.directory / str(known[-1])))})" if known else ""
        intact = f"complete: {', '.join(map(str, known))}" if known else "none complete"
        return (
            f"the disk of {self.directory} is full, {_text(free)} free{size}. Steps there are "
            f"{intact}. Make room, then run the same command again"
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


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _text(size: int) -> str:
    return tqdm.format_sizeof(size, "B")
