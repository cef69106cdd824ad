"""New directories and bucket prefixes: they count as models only when they are complete.

A local directory is renamed when it is complete (`files.new_directory`). A bucket has no renames,
so the object that makes a model readable is written last: commit_success.txt of a checkpoint,
config.json of a Hugging Face directory.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from finermoe_jax.errors import InputError, RunEnded, first_line
from finermoe_jax.runtime import files
from finermoe_jax.runtime.buckets import BucketPath, Changed, Place, is_outage, place
from finermoe_jax.runtime.lease import Lease
from finermoe_jax.runtime.preemption import EXIT_CODE

_COMPLETE = ("commit_success.txt", "config.json")
_AT_A_TIME = 16


class NewTarget(NamedTuple):
    """A path to write to, and a check to call before the object that completes a bucket's target.

    `confirm` raises RunEnded if another process has taken over the target.
    """

    path: Place
    confirm: Callable[[], None]


def _claim(target: BucketPath) -> BucketPath:
    """Returns the object that marks a target while it is written, next to it."""
    return target.with_name(f".{target.name}.partial")


def is_occupied(target: Place) -> bool:
    """Returns True if `target` has content, other than what a killed process left in a bucket."""
    if not isinstance(target, BucketPath):
        return target.is_dir() and any(target.iterdir())
    names = target.names()
    return bool(names) and (not _claim(target).is_file() or any(n in names for n in _COMPLETE))


def refuse_occupied(target: Place) -> None:
    """Raises InputError if target is a file, or has content (`is_occupied`)."""
    if not isinstance(target, BucketPath):
        files.refuse_occupied(target)
    elif is_occupied(target):
        raise InputError(f"{target} is not empty; nothing is overwritten: give a new prefix")
    elif target.is_file():
        raise InputError(f"{target} is an object; give a new prefix")


@contextlib.contextmanager
def new_target(path: str | os.PathLike) -> Iterator[NewTarget]:
    """Yields a path to write to; `path` is complete when the block succeeds, else empty.

    Of a local path it is a temporary one (`files.new_directory`), of a bucket path the path itself.
    Objects that a killed process left there are deleted first.

    Raises InputError if there is content already, or while another process writes there.
    """
    target = place(path)
    if not isinstance(target, BucketPath):
        with files.new_directory(target) as directory:
            yield NewTarget(directory, lambda: None)
        return
    refuse_occupied(target)
    lease = Lease(target, functools.partial(print, file=sys.stderr), "target", _claim(target))
    lease.take()
    with contextlib.closing(lease):
        refuse_occupied(target)  # again: the previous holder may have completed it
        _clear(target)
        try:
            yield NewTarget(target, lease.confirm)
        except BaseException as error:
            with contextlib.suppress(RunEnded, InputError):  # the next process clears it
                lease.confirm()  # another holder's objects must stay
                _clear(target)
            if isinstance(error, (InputError, RunEnded)) or not isinstance(error, Exception):
                raise
            raise _not_written(target, error) from error


def _not_written(target: BucketPath, error: Exception) -> Exception:
    if isinstance(error, Changed):
        return InputError(f"{error} while {target} was written: give another target")
    return RunEnded(
        f"{target} could not be written ({first_line(error)}). It is no model; run the same "
        "command again",
        EXIT_CODE if is_outage(error) else 1,
    )


def _clear(target: BucketPath) -> None:
    """Deletes all objects of a target, first those that complete it."""
    names = sorted(target.objects(), key=lambda name: name not in _COMPLETE)
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for _ in pool.map(lambda name: (target / name).delete(), names):
            pass
