"""Directories that are there whole or not at all, and are never written over."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.files import commit, make_directory
from finermoe_jax.runtime.paths import local


def refuse_occupied(target: Path) -> None:
    """Raises InputError when target is a file or a directory that holds anything."""
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target} is not empty; nothing is overwritten: give a new directory")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a new directory")


@contextlib.contextmanager
def new_directory(target: str | os.PathLike) -> Iterator[Path]:
    """A path at which to make a directory, which becomes `target` once the block has ended well.

    After that, a power cut cannot take it away, or a part of it (`files.commit`).

    It lies in a hidden directory beside target. What a killed process has left in that one is
    removed by the next that writes the same target.

    Raises InputError when target is occupied, or while another process is writing it.
    """
    target = Path(os.path.realpath(local(target)))
    refuse_occupied(target)
    if os.path.ismount(target):
        raise InputError(f"{target} is a mount point, and is not replaced: give a directory in it")
    partial = target.with_name(f".{target.name}.partial")
    try:
        make_directory(target.parent)
        lock = _claim(partial, target)
    except OSError as error:
        raise InputError(
            f"{target} cannot be made ({error.filename}: {error.strerror}); give a directory "
            "where you may write"
        ) from None
    try:
        refuse_occupied(target)  # again: the one that had the lock may have made it
        _empty(partial)
        yield partial / target.name
        if target.exists():
            target.rmdir()
        commit(partial / target.name, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _claim(partial: Path, target: Path) -> int:
    """An open, locked descriptor of the hidden directory, made where it is missing."""
    while True:
        partial.mkdir(exist_ok=True)
        try:
            # A link would have what it points to emptied; it is refused as no directory.
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # its owner has just finished
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise InputError(
                f"another process is writing {target} (into {partial}): wait for it, or give "
                "another directory"
            ) from None
        # The one that had it may have removed it between our opening and locking it.
        if partial.exists() and os.fstat(lock).st_ino == partial.stat().st_ino:
            return lock
        os.close(lock)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
