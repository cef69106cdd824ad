"""New directories and bucket prefixes: they count as models only when they are complete.

A local directory is renamed when it is complete (`files.new_directory`). A bucket has no renames,
so the object that makes a model readable is written last: commit_success.txt of a checkpoint,
config.json of a Hugging Face directory.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from finermoe_jax.errors import InputError
from finermoe_jax.runtime import files
from finermoe_jax.runtime.buckets import BucketPath, Place, place

_COMPLETE = ("commit_success.txt", "config.json")
_AT_A_TIME = 16


def _claim(target: BucketPath) -> BucketPath:
    """Returns the object that marks a target which is being written, next to it."""
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
def new_target(path: str | os.PathLike) -> Iterator[Place]:
    """Yields a path to write to; `path` is complete when the block succeeds, else empty.

    Of a local path it is a temporary one (`files.new_directory`), of a bucket path the path itself.
    Objects that a killed process left there are deleted first.

    Raises InputError if there is content already, or while another process writes there.
    """
    target = place(path)
    if not isinstance(target, BucketPath):
        with files.new_directory(target) as directory:
            yield directory
        return
    refuse_occupied(target)
    with claimed(_claim(target), target) as check:
        refuse_occupied(target)  # again: the previous holder may have completed it
        _clear(target)
        try:
            yield target
        except BaseException:
            _clear(target)
            raise


def _clear(target: BucketPath) -> None:
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for _ in pool.map(lambda name: (target / name).delete(), target.objects()):
            pass
