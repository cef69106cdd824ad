"""Checksums of checkpoints: written with each checkpoint, verified before it is used."""

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import xxhash

from finermoe_jax.errors import InputError
from finermoe_jax.runtime import distributed
from finermoe_jax.runtime.buckets import BucketPath, Place, crc32c
from finermoe_jax.runtime.files import State, forget, rename, state
from finermoe_jax.runtime.json_files import parse_json, read_json, to_json

CHECKSUMS = "checksums.json"
_ALGORITHM = "xxh3_128"
_SERVERS = "crc32c"  # in buckets
COMMITTED = "commit_success.txt"  # Orbax's mark of a complete checkpoint in a bucket
_ASIDE = "damaged"  # where damaged checkpoints are moved
# Written after the checksums.
_UNHASHED = (CHECKSUMS, COMMITTED, "_CHECKPOINT_METADATA")
_THREADS = 4
# Retries when a running training removes the checkpoint being read.
TRIES = 10
# Seconds between scans of a directory being written, and that a file must be unchanged for.
_PAUSE, _RESTED = 0.1, 0.5
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Hashes by file state.
Known = dict[State, str]


def write_checksums(directory: Place, known: Known | None = None) -> None:
    """Writes checksums.json: size in bytes and hash of every file in a checkpoint.

    Files in `known` (`hash_while_written`) are not read again. In a bucket the hashes are those
    that the server computed of what it received: one LIST, no download.
    """
    if isinstance(directory, BucketPath):
        stored = directory.objects()
        objects = {
            name: (found.st_size, found.crc32c)
            for name, found in sorted(stored.items())
            if name not in _UNHASHED
        }
        text = to_json({"algorithm": _SERVERS, "files": objects}, indent=1)
        (directory / CHECKSUMS).write(text + "\n")
        return
    known = known or {}
    paths = (path for path in directory.rglob("*") if path.is_file())
    names = sorted({str(path.relative_to(directory)) for path in paths} - {CHECKSUMS})

    def entry(name: str) -> tuple[int, str]:
        found = state(directory / name)
        return found[1], known[found] if found in known else _hash(directory / name)

    with ThreadPoolExecutor(_THREADS) as pool:
        files = dict(zip(names, pool.map(entry, names), strict=True))
    text = to_json({"algorithm": _ALGORITHM, "files": files}, indent=1)
    (directory / CHECKSUMS).write_text(text + "\n")


@contextlib.contextmanager
def hash_while_written(directory: Path) -> Iterator[Known]:
    """Hashes the files of a directory in a thread while the caller writes more.

    Each file is read soon after it was written, while it is still in the page cache, and is then
    dropped from the cache. Otherwise a target larger than memory would evict everything else, and
    its last files would be read from disk. If a file changes after it was hashed, its new state is
    not in `known`.
    """
    known: Known = {}
    seen: set[int] = set()
    stop = threading.Event()

    def look(folder: str) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    look(entry.path)
                elif entry.inode() not in seen and not stop.is_set():
                    path = Path(entry.path)
                    found = state(path)
                    if time.time_ns() - found[2] > _RESTED * 1e9:
                        known[found] = _hash(path)
                        seen.add(found[0])
                        forget(path)

    def follow() -> None:
        while not stop.wait(_PAUSE):
            # Orbax renames directories and removes files during the scan.
            with contextlib.suppress(OSError):
                look(str(directory))

    thread = threading.Thread(target=follow, name="checksums", daemon=True)
    thread.start()
    try:
        yield known
    finally:
        stop.set()
        thread.join()


def damage(
    directory: Place, skip: tuple[str, ...] = (), part: int = 0, parts: int = 1
) -> list[str]:
    """Returns a checkpoint's differences from its checksums; an empty list if it is intact.

    Items (subdirectories) in `skip` are not read. Checks only files part, part + parts, …
    Checkpoints older than checksums.json count as intact. In a bucket the first part compares the
    server's own sizes and hashes, without a download.

    Raises InputError if files cannot be read: permissions, a failing disk, too many open files.
    """
    local = isinstance(directory, Path)
    if not local and part:
        return []
    if isinstance(directory, Path):
        if found := _not_openable(directory):
            return found
    else:
        (directory / CHECKSUMS).is_file()  # raises if the bucket cannot be read now
    try:
        if local:
            described = read_json(directory / "config" / "metadata")
            if "checksums" not in described and not (directory / CHECKSUMS).exists():
                return []
        values = read_json(directory / CHECKSUMS)
        algorithm = values["algorithm"]
        if algorithm not in (_ALGORITHM, _SERVERS):
            return [f"{CHECKSUMS} uses algorithm {algorithm}, not {_ALGORITHM} or {_SERVERS}"]
        stated = {
            name: (int(size), str(digest)) for name, (size, digest) in values["files"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        return [f"{error}"]
    names = sorted(name for name in stated if name.partition("/")[0] not in skip)
    if isinstance(directory, BucketPath):
        return _damage_in_bucket(directory, {name: stated[name] for name in names}, algorithm)
    path_of, hash_of = directory.joinpath, _hash if algorithm == _ALGORITHM else crc32c

    def compare(name: str) -> str | None:
        size, digest = stated[name]
        path = path_of(name)
        with _unreadable(path_of()):
            try:
                length = path.stat().st_size
                found = hash_of(path) if length == size else ""
            except _MISSING:
                return f"{name} is missing ({size} bytes when saved)"
        return _difference(name, (size, digest), (length, found))

    with ThreadPoolExecutor(_THREADS) as pool:
        return [message for message in pool.map(compare, names[part::parts]) if message]


def _not_openable(directory: Path) -> list[str]:
    """Returns what in a local checkpoint is no file or cannot be opened, as `damage` does."""
    try:
        with _unreadable(directory):
            for path in directory.rglob("*"):
                if not (path.is_file() or path.is_dir()):  # reading a pipe would block
                    return [f"{path.relative_to(directory)} is neither a file nor a directory"]
            for name in ("config/metadata", CHECKSUMS):
                if (directory / name).exists():
                    (directory / name).open("rb").close()
    except _MISSING as error:
        return [f"{error.filename} is missing or not a file"]
    return []


def _damage_in_bucket(
    directory: BucketPath, stated: dict[str, tuple[int, str]], algorithm: str
) -> list[str]:
    """Compares objects in one LIST; of a copied local checkpoint only the sizes."""
    found = directory.objects()
    if COMMITTED not in found:
        return [f"{COMMITTED} is missing: the upload was not completed"]
    messages = []
    for name, entry in stated.items():
        if name not in found:
            messages.append(f"{name} is missing ({entry[0]} bytes when saved)")
            continue
        here = (found[name].st_size, found[name].crc32c if algorithm == _SERVERS else entry[1])
        if message := _difference(name, entry, here):
            messages.append(message)
    return messages


def _difference(name: str, stated: tuple[int, str], found: tuple[int, str]) -> str | None:
    """Describes how a file's size and hash differ from those when it was saved; None if equal."""
    if found[0] != stated[0]:
        return f"{name} has {found[0]} bytes, {stated[0]} when saved"
    if found[1] != stated[1]:
        return f"{name} has checksum {found[1]}, {stated[1]} when saved"
    return None


@contextlib.contextmanager
def _unreadable(checkpoint: Path) -> Iterator[None]:
    """Raises InputError for files that exist but cannot be read now; they are not damaged."""
    try:
        yield
    except _MISSING:
        raise
    except OSError as error:
        raise unreadable(checkpoint, f"{error.filename}: {error.strerror}") from None


def unreadable(checkpoint: Place, reason: str) -> InputError:
    """Returns the error for a checkpoint that may be intact but cannot be read now."""
    return InputError(
        f"checkpoint {checkpoint} cannot be read ({reason}). Nothing was changed. Make it readable "
        "and rerun the same command, or move it elsewhere to use an older checkpoint"
    )


def refuse_renamed(checkpoint: Place) -> None:
    """Raises InputError if a numbered checkpoint holds another step than its name says."""
    step = read_json(checkpoint / "config" / "metadata").get("step")
    # Older and converted checkpoints state no step.
    if isinstance(step, int) and str(step) != checkpoint.name:
        raise InputError(
            f"{checkpoint} holds step {step}: it was renamed or replaced by another checkpoint. "
            f"Rename it to {checkpoint.with_name(str(step))}"
        )


def _hash(path: Path) -> str:
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def _describe(step: Place, found: list[str]) -> str:
    more = f" (and {len(found) - 3} more files)" if len(found) > 3 else ""
    return f"WARNING: checkpoint {step} is damaged: {'; '.join(found[:3])}{more}."


def saved_steps(steps: Place) -> list[int]:
    """Returns the committed steps in a directory of numbered checkpoints, ascending."""
    if isinstance(steps, BucketPath):
        numbers = sorted(int(name) for name in steps.names() if name.isdecimal())
        return [number for number in numbers if (steps / str(number) / COMMITTED).is_file()]
    while steps.is_dir():
        # A running training may remove a directory while Orbax lists them.
        with contextlib.suppress(FileNotFoundError):
            return sorted(ocp.utils.checkpoint_steps(steps))
    return []


def set_aside(steps: Place) -> Sequence[Place]:
    """Returns the damaged checkpoints of a run that `set_aside_damaged` has moved away."""
    if isinstance(steps, BucketPath):
        aside = steps.with_name(_ASIDE)
        return [aside / name for name in aside.names()]
    return sorted(steps.glob(f"{_ASIDE}-*"))


def _move_aside(checkpoint: Place) -> Place:
    """Moves a damaged checkpoint to a new name, which it returns.

    In a bucket the name is outside of checkpoints/, where Orbax deletes what has no commit mark.
    """
    taken = {path.name for path in set_aside(checkpoint.parent)}
    local = isinstance(checkpoint, Path)
    name = f"{_ASIDE}-{checkpoint.name}" if local else checkpoint.name
    names = (name, *(f"{name}-{again}" for again in range(2, 1000)))
    free = next(each for each in names if each not in taken)
    if isinstance(checkpoint, Path):
        rename(checkpoint, checkpoint.with_name(free))
        return checkpoint.with_name(free)
    aside = checkpoint.parent.with_name(_ASIDE) / free
    # First the mark: a move that is interrupted leaves no checkpoint.
    for name in sorted(checkpoint.objects(), key=lambda name: name != COMMITTED):
        if name != COMMITTED:
            (checkpoint / name).copy(aside / name)
        (checkpoint / name).delete()
    return aside


def set_aside_damaged(steps: Place, say: Callable[[str], None]) -> None:
    """Renames a run's newest checkpoints to damaged-N until the newest is intact; reports each.

    In a bucket their new name is damaged/N, next to checkpoints/.

    Collective: every process of the run must call it, and each checks a share of the files.

    Raises:
      InputError: on all processes, if no checkpoint is intact, if the newest cannot be read, or if
        it holds another step than its name says. Nothing is renamed in the last two cases.
    """
    while True:
        known = parse_json(distributed.exchange(to_json(saved_steps(steps)))[0], "steps")
        if not known:
            break
        newest = steps / str(known[-1])
        with distributed.together():
            mine = damage(newest, part=jax.process_index(), parts=jax.process_count())
        found = [
            message
            for each in distributed.exchange(to_json(mine))
            for message in parse_json(each, "damage")
        ]
        if not found:
            with distributed.together():
                refuse_renamed(newest)
            return
        with distributed.together():
            if jax.process_index() == 0:
                aside = _move_aside(newest)
                instead = (
                    f"Step {known[-2]} is used instead." if len(known) > 1 else "There is no other."
                )
                say(f"{_describe(newest, found)} It was renamed to {aside}. {instead}")
    if lost := set_aside(steps):
        raise InputError(
            f"{steps} holds no intact checkpoint: {', '.join(path.name for path in lost)} "
            f"{'is' if len(lost) == 1 else 'are'} damaged. Restore a copy of one under its step "
            "number, or pass a new --workdir"
        )


def newest_whole(steps: Place, skip: tuple[str, ...]) -> Place | None:
    """Returns the newest intact checkpoint, or None; read-only, for commands other than training.

    Reports every damaged checkpoint it skips on stderr.

    Raises:
      InputError: the newest cannot be read, holds another step than its name says, or was removed
        by a running training. Call it inside `in_training`, which then retries.
    """
    known, chosen = saved_steps(steps), None
    warnings: list[str] = []
    for step in reversed(known):
        checkpoint = steps / str(step)
        found = damage(checkpoint, skip)
        if not found:
            refuse_renamed(checkpoint)
            chosen = checkpoint
            break
        warnings.append(_describe(checkpoint, found) + " An older one is used.")
        if saved_steps(steps)[-1:] != known[-1:]:
            raise InputError(f"{checkpoint} is no longer the newest")
    for message in warnings:
        print(message, file=sys.stderr)
    return chosen


def in_training[T](steps: Place, read: Callable[[], T]) -> T:
    """Returns read(), which reads the newest checkpoint; retries if a newer one appeared meanwhile.

    A running training removes old checkpoints from `steps` even while they are read; `read` then
    raises InputError. Other errors are not caught.
    """
    for _ in range(TRIES):
        newest = saved_steps(steps)[-1:]
        try:
            return read()
        except InputError:
            if saved_steps(steps)[-1:] == newest:
                raise
    raise InputError(
        f"{steps}: a running training removed the checkpoint while it was read, {TRIES} times. "
        "Read a copy, or have the run keep more: --config.train.keep_checkpoints"
    )
