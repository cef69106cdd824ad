"""Detection of full disks, before a write and in its errors."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from finermoe_jax.errors import InputError


def has_room(directory: Path, size: int, files: int = 0) -> bool:
    """Returns True if the disk of a directory has room for `size` more bytes and `files` files."""
    found = os.statvfs(directory)
    # f_files is 0 on file systems that do not limit the number of files.
    free = shutil.disk_usage(directory).free
    return size <= free and (not found.f_files or files <= found.f_favail)


def existing(path: Path) -> Path:
    """Returns the path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def free_text(directory: Path) -> str:
    """Describes the free space of a directory's disk: bytes, and files if they are limited."""
    found = os.statvfs(directory)
    more = f", room for {found.f_favail} more files" if found.f_files else ""
    return f"{format_bytes(shutil.disk_usage(directory).free)} free{more}"


def format_bytes(size: int) -> str:
    """Formats a number of bytes for humans."""
    return tqdm.format_sizeof(size, "B")


def is_full(error: BaseException | None) -> bool:
    """Returns True if an error, or one in its cause chain, is due to a full disk or quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        message = str(error)
        if "No space left on device" in message or "Disk quota exceeded" in message:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def refusing_full(message: str) -> Iterator[None]:
    """Raises InputError with `message` if the disk is full; other errors pass through."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise InputError(message) from None
