"""Local copies of objects in buckets, which are downloaded once and shared by all processes.

Weights and tokens are read through memory maps, which need local files. The copies are kept in
$XDG_CACHE_HOME/finermoe-jax (default: ~/.cache/finermoe-jax), and can be deleted at any time.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from finermoe_jax.errors import InputError
from finermoe_jax.runtime import disk
from finermoe_jax.runtime.buckets import BucketPath, Place, Stored, crc32c
from finermoe_jax.runtime.files import commit, make_directory
from finermoe_jax.runtime.json_files import to_json
from finermoe_jax.runtime.locks import locked

_AT_A_TIME = 8


def cache() -> Path:
    """Returns the directory of all local copies."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finermoe-jax"


def identity(prefix: BucketPath, objects: Mapping[str, Stored]) -> str:
    """Returns a name for these objects of a prefix, which changes when one is written again."""
    generations = sorted((name, each.generation) for name, each in objects.items())
    return hashlib.sha256(to_json([str(prefix), generations]).encode()).hexdigest()


def local_copy(
    prefix: BucketPath,
    objects: Mapping[str, Stored],
    name: str,
    check: Callable[[Path], object] = lambda directory: None,
) -> Path:
    """Returns a directory with these objects of a prefix; downloads those that it lacks.

    One process at a time downloads, the others wait for it. An interrupted download resumes.

    Args:
      prefix: the objects' common prefix.
      objects: by relative name, as `BucketPath.objects` lists them.
      name: the directory's name in the cache. It must stand for the content.
      check: called with the complete copy before other processes can see it.

    Raises InputError if the disk is too small, if an object was changed or deleted meanwhile, and
    whatever `check` raises.
    """
    target = cache() / name
    if _is_whole(target, objects):
        return target
    try:
        make_directory(target.parent)
        with target.with_name(f".{target.name}.lock").open("w") as lock:
            if not locked(lock.fileno()):
                print(f"waiting for another process that downloads {prefix} …", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(target, objects):
                _download(prefix, objects, target, check)
    except OSError as error:
        if not disk.is_full(error):
            raise InputError(
                f"{target} cannot be written ({error.filename}: {error.strerror}), but {prefix} "
                "needs a local copy: set XDG_CACHE_HOME to a directory that you can write to"
            ) from None
        raise InputError(
            f"the disk filled up while {prefix} was downloaded to {target}: free some space, or "
            "set XDG_CACHE_HOME to a directory on another disk"
        ) from None
    return target


@contextlib.contextmanager
def named_after(source: Place, copy: Path) -> Iterator[None]:
    """Names `source` instead of its local copy in the messages of InputErrors."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(copy), str(source))) from None


def _is_whole(directory: Path, objects: Mapping[str, Stored]) -> bool:
    return directory.is_dir() and all(
        (directory / name).is_file() and (directory / name).stat().st_size == each.st_size
        for name, each in objects.items()
    )


def _download(
    prefix: BucketPath,
    objects: Mapping[str, Stored],
    target: Path,
    check: Callable[[Path], object],
) -> None:
    partial = target.with_name(f".{target.name}.partial")
    missing = {
        name: each
        for name, each in objects.items()
        if not _is_whole(partial, {name: each}) or crc32c(partial / name) != each.crc32c
    }
    size = sum(each.st_size for each in missing.values())
    make_directory(partial)
    if not disk.has_room(partial, size):
        raise InputError(
            f"{prefix} needs {disk.format_bytes(size)} for a local copy in {target.parent}, but "
            f"its disk has {disk.format_bytes(shutil.disk_usage(partial).free)} free: free some "
            "space, or set XDG_CACHE_HOME to a directory on another disk"
        )
    with (
        ThreadPoolExecutor(_AT_A_TIME) as pool,
        tqdm(total=size, desc=f"downloading {prefix.name}", unit="B", unit_scale=True) as bar,
    ):

        def one(name: str) -> None:
            _download_one(prefix / name, missing[name], partial / name)
            bar.update(missing[name].st_size)

        for _ in pool.map(one, missing):
            pass
    check(partial)
    shutil.rmtree(target, ignore_errors=True)  # a copy that lost files
    commit(partial, target)


def _download_one(source: BucketPath, stated: Stored, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        generation = source.download(target)
    except FileNotFoundError:
        generation = None
    if generation != stated.generation:
        what = "deleted" if generation is None else "replaced"
        raise InputError(
            f"{source} was {what} while it was downloaded: run the same command again when nothing "
            "writes there"
        )
    if target.stat().st_size != stated.st_size or crc32c(target) != stated.crc32c:
        raise InputError(
            f"{source} arrived with another checksum than the bucket states: run the same command "
            "again"
        )
