"""Where named files are found, whether one has changed, and how the system forgets its content."""

import contextlib
import os
from pathlib import Path

from finermoe_jax.errors import InputError
from finermoe_jax.paths import local

_PACKAGE = Path(__file__).parent
# Inode, bytes, and time of the last write in nanoseconds.
State = tuple[int, int, int]
_POINTER = b"version https://git-lfs.github.com/spec/"


def find(path: str | os.PathLike) -> Path:
    """A relative path as it stands in the working directory or, failing that, in the package.

    So `demo/model` and `configs/demo.py` work from anywhere: configs/ lies beside the package in a
    clone and inside it in an installed wheel.

    Raises InputError for an address (paths.py).
    """
    here = Path(local(path))
    places = (here, _PACKAGE / here, _PACKAGE.parent / here)
    return next((place for place in places if place.exists()), here)


def state(path: Path) -> State:
    """What changes with a file's content. Raises OSError where there is none."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def refuse_pointer(path: Path) -> None:
    """Raises InputError where git-lfs has left its pointer in place of a file."""
    with contextlib.suppress(OSError), path.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise InputError(
                f"{path} is a git-lfs pointer, not the file itself: fetch it with `git lfs pull` "
                "in its repository"
            )


def forget(path: Path) -> None:
    """Lets what is on the disk already of a file leave the page cache, where the system has a way.

    Whoever streams more than the memory holds would otherwise push out all that others need.
    """
    if hasattr(os, "posix_fadvise"):
        with path.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
