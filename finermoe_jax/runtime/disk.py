"""Full disks: detected before a write if possible, and distinguished from other errors after it."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from finermoe_jax.errors import InputError


def has_room(directory: Path, size: int, files: int = 0) -> bool:
    """True where the disk of a directory takes so many more bytes, and files."""
    found = os.statvfs(directory)
    # Some file systems have no limit of files, and state none.
    free = shutil.disk_usage(directory).free
    return size <= free and (not found.f_files or files <= found.f_favail)


def free_text(directory: Path) -> str:
    """Says how much is free on the disk of a directory: bytes, and files where they are limited."""
    found = os.statvfs(directory)
    more = f", room for {found.f_favail} more files" if found.f_files else ""
    return f"{text(shutil.disk_usage(directory).free)} free{more}"


def text(size: int) -> str:
    """Bytes as a reader likes them."""
    return tqdm.format_sizeof(size, "B")


def is_full(error: BaseException | None) -> bool:
    """True for an error that comes, or whose cause came, of a full disk or quota."""
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
    """Raises InputError with the message where the disk fills up; other errors stay as they are."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise InputError(message) from None
