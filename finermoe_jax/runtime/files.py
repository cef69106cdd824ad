"""Path lookup, change detection, page-cache hints, and atomic, durable writes.

After a power cut, content and names that were not fsynced may be missing. `write` (a file) and
`commit` (a directory) therefore return only when everything is on disk. `new_directory` creates a
directory completely or not at all, and never overwrites one.
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
# Inode, size in bytes, and modification time in nanoseconds.
State = tuple[int, int, int]
_POINTER = b"version https://git-lfs.github.com/spec/"


def find(path: str | os.PathLike) -> Path:
    """Resolves a relative path against the working directory, then against the package.

    So `demo/model` and `configs/demo.py` work in any directory: configs/ is next to the package in
    a clone and inside it in an installed wheel.

    Raises InputError for a URL (paths.py).
    """
    here = Path(local(path))
    places = (here, _PACKAGE / here, _PACKAGE.parent / here)
    return next((place for place in places if place.exists()), here)


def state(path: Path) -> State:
    """Returns values that change when the file changes. Raises OSError if it does not exist."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def refuse_pointer(path: Path) -> None:
    """Raises InputError if the file is a git-lfs pointer."""
    with contextlib.suppress(OSError), path.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise InputError(
                f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its "
                "repository"
            )


def forget(path: Path) -> None:
    """Drops a file's clean pages from the page cache, so that streaming does not evict others.

    A no-op on systems without posix_fadvise.
    """
    if hasattr(os, "posix_fadvise"):
        with path.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- durable writes -------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Fsyncs a file or a directory. Raises OSError naming the path."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some network file systems cannot fsync directories and need not; a directory without
        # read permission cannot be opened.
        if error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES) and path.is_dir():
            return
        error.filename = str(path)
        raise


def sync_tree(directory: Path) -> None:
    """Fsyncs a directory and everything in it, except links."""
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            sync_tree(entry)
        elif entry.is_file() and not entry.is_symlink():
            sync(entry)
    sync(directory)


def rename(source: Path, target: Path) -> None:
    """Renames a file or directory durably; replaces an existing file."""
    source.replace(target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def commit(source: Path, target: Path) -> None:
    """Moves a finished directory to `target`, atomically and durably.

    `target` must be absent or an empty directory.
    """
    sync_tree(source)
    rename(source, target)


def write(path: Path, content: str | bytes) -> None:
    """Replaces a file's content, atomically and durably.

    Follows links. Writes directly to what is not a regular file (a pipe, /dev/stdout).
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
    """Creates a directory and its missing parents durably."""
    path = path.absolute()
    created = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in created:
        sync(each.parent)


# --- atomic directories ---------------------------------------------------------------------


def refuse_occupied(target: Path) -> None:
    """Raises InputError if target is a file or a non-empty directory."""
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target} is not empty; nothing is overwritten: give a new directory")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a new directory")


@contextlib.contextmanager
def new_directory(target: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path, and moves it to `target` if the block succeeds (`commit`).

    The path is in a hidden directory next to target. Leftovers of a killed process are removed by
    the next one that writes the same target.

    Raises InputError if target is not empty, or while another process is writing it.
    """
    target = Path(os.path.realpath(local(target)))
    refuse_occupied(target)
    if os.path.ismount(target):
        raise InputError(
            f"{target} is a mount point and cannot be replaced: give a directory in it"
        )
    partial = target.with_name(f".{target.name}.partial")
    try:
        make_directory(target.parent)
        lock = _claim(partial, target)
    except OSError as error:
        raise InputError(
            f"{target} cannot be created ({error.filename}: {error.strerror}): give a directory "
            "that you can write to"
        ) from None
    try:
        refuse_occupied(target)  # again: the previous lock holder may have created it
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
    """Returns an open, locked descriptor of the hidden directory; creates it if missing."""
    while True:
        partial.mkdir(exist_ok=True)
        try:
            # O_NOFOLLOW: the content of a link's target would be deleted.
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # its owner has just removed it
        if not locked(lock):
            os.close(lock)
            raise InputError(
                f"another process is writing {target} (in {partial}): wait for it, or give "
                "another directory"
            )
        # The previous owner may have removed it between open and lock.
        if partial.exists() and os.fstat(lock).st_ino == partial.stat().st_ino:
            return lock
        os.close(lock)
