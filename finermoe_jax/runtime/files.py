"""Path lookup, change detection, page-cache hints, and writes that survive a power cut.

A new directory is there whole or not at all, and is never written over (`new_directory`).

Without an fsync a file, its name or its new name may be missing or empty after a power cut, in any
combination. So a file that has to last is written by `write`, or made beside its place and moved
there by `commit`. Both return when everything is on the disk.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.locks import locked
from finermoe_jax.runtime.paths import local

_PACKAGE = Path(__file__).parent.parent
# Inode, bytes, and time of the last write in nanoseconds.
State = tuple[int, int, int]
_POINTER = b"version https://git-lfs.github.com/spec/"


def find(path: str | os.PathLike) -> Path:
    """A relative path as it stands in the working directory or, failing that, in the package.

    So `demo/model` and `configs/demo.py` work from anywhere: configs/ is beside the package in a
    clone and inside it in an installed wheel.

    Raises InputError for an address (paths.py).
    """
    here = Path(local(path))
    places = (here, _PACKAGE / here, _PACKAGE.parent / here)
    return next((place for place in places if place.exists()), here)


def state(path: Path) -> State:
    """Returns values that change with a file's content. Raises OSError if there is no file."""
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
    """Drops a file's written pages from the page cache, on systems that can.

    Streaming more than the memory holds would otherwise evict the pages that others need.
    """
    if hasattr(os, "posix_fadvise"):
        with path.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- writes that last -----------------------------------------------------------------------


def sync(path: Path) -> None:
    """Returns when a file's content, or a directory's names, are on the disk.

    Raises OSError naming the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some network file systems cannot do this for directories, and need not. A directory that
        # may be written to and not be read cannot be opened for it.
        if error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES) and path.is_dir():
            return
        error.filename = str(path)
        raise


def sync_tree(directory: Path) -> None:
    """`sync` of a directory and of everything in it, links excepted."""
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            sync_tree(entry)
        elif entry.is_file() and not entry.is_symlink():
            sync(entry)
    sync(directory)


def rename(source: Path, target: Path) -> None:
    """Renames a file or directory, replacing a file of that name, and makes the name last."""
    source.replace(target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def commit(source: Path, target: Path) -> None:
    """Moves a finished directory to its place: after a power cut it is there whole or not at all.

    target is absent or an empty directory.
    """
    sync_tree(source)
    rename(source, target)


def write(path: Path, content: str | bytes) -> None:
    """Replaces a file's content: after a power cut the file holds the old or the new one, whole.

    A link stays one. What is no ordinary file (a pipe, /dev/stdout) is written to as it is.
    """
    data = content.encode() if isinstance(content, str) else content
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        if path.exists():
            partial.chmod(stat.S_IMODE(path.stat().st_mode))
        sync(partial)
        rename(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def make_directory(path: Path) -> None:
    """Makes a directory and its parents, where they are missing, and makes their names last."""
    path = path.absolute()
    made = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in made:
        sync(each.parent)


# --- directories that are there whole or not at all --------------------------------------------


def refuse_occupied(target: Path) -> None:
    """Raises InputError when target is a file or a directory that holds anything."""
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target} is not empty; nothing is overwritten: give a new directory")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a new directory")


@contextlib.contextmanager
def new_directory(target: str | os.PathLike) -> Iterator[Path]:
    """A path at which to make a directory, which becomes `target` once the block has ended well.

    After that, a power cut cannot take it away, or a part of it (`commit`).

    The path is in a hidden directory beside target. The next process that writes the same target
    removes what a killed one left there.

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
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
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
        if not locked(lock):
            os.close(lock)
            raise InputError(
                f"another process is writing {target} (into {partial}): wait for it, or give "
                "another directory"
            )
        # Its previous owner may have removed it after the open and before the lock.
        if partial.exists() and os.fstat(lock).st_ino == partial.stat().st_ino:
            return lock
        os.close(lock)
