"""Checksums of checkpoints: written as part of each, compared before one is used."""

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import xxhash

from finermoe_jax.errors import InputError
from finermoe_jax.runtime import distributed
from finermoe_jax.runtime.files import State, forget, rename, state
from finermoe_jax.runtime.json_files import parse_json, read_json, to_json

CHECKSUMS = "checksums.json"
_ALGORITHM = "xxh3_128"
_THREADS = 4
# Checkpoints that are begun to be read while a run in training removes them, one after the other.
TRIES = 10
# Seconds between looks at a directory that is being written, and for which a file must have rested.
_PAUSE, _RESTED = 0.1, 0.5
# Errors of a file that is missing, or something else.
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Hashes of files.
Known = dict[State, str]


def write_checksums(directory: Path, known: Known | None = None) -> None:
    """Writes checksums.json: size in bytes and hash of every file of a checkpoint's directory.

    Files in `known` (`hashed_along`) are not read again.
    """
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
def hashed_along(directory: Path) -> Iterator[Known]:
    """Hashes the files of a directory in a thread while more are written into it.

    Each is read soon after it was written, when it need not come from the disk, and then leaves the
    page cache: a target larger than memory would push out everything else, and its last files
    would be read from the disk all the same. A file that is written to later is not in `known` with
    the state it then has.
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
            # Directories are renamed, and files removed, while they are looked at.
            with contextlib.suppress(OSError):
                look(str(directory))

    thread = threading.Thread(target=follow, name="checksums", daemon=True)
    thread.start()
    try:
        yield known
    finally:
        stop.set()
        thread.join()


def damage(directory: Path, skip: tuple[str, ...] = (), part: int = 0, parts: int = 1) -> list[str]:
    """Lists the differences of a checkpoint from its checksums; empty if there are none.

    Items (directories in it) of `skip` are not read; of the files, part, part + parts, … are. A
    checkpoint older than checksums has nothing to differ from.

    Raises InputError if it cannot be read: permissions, a failing disk, too many open files.
    """
    try:
        with _unreadable(directory):
            for path in directory.rglob("*"):
                if not (path.is_file() or path.is_dir()):  # a pipe would be waited for
                    return [f"{path.relative_to(directory)} is neither a file nor a directory"]
            for name in ("config/metadata", CHECKSUMS):
                if (directory / name).exists():
                    (directory / name).open("rb").close()
    except _GONE as error:
        return [f"{error.filename} is missing or no file"]
    try:
        described = read_json(directory / "config" / "metadata")
        if "checksums" not in described and not (directory / CHECKSUMS).exists():
            return []
        values = read_json(directory / CHECKSUMS)
        if values["algorithm"] != _ALGORITHM:
            return [f"{CHECKSUMS} names another algorithm: {values['algorithm']}"]
        stated = {
            name: (int(size), str(digest)) for name, (size, digest) in values["files"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        return [f"{error}"]
    names = sorted(name for name in stated if name.partition("/")[0] not in skip)[part::parts]

    def compare(name: str) -> str | None:
        size, digest = stated[name]
        path = directory / name
        with _unreadable(directory):
            try:
                length = path.stat().st_size
                found = _hash(path) if length == size else ""
            except _GONE:
                return f"{name} is missing ({size} bytes when saved)"
        if length != size:
            return f"{name} has {length} bytes, {size} when saved"
        return f"{name} has checksum {found}, {digest} when saved" if found != digest else None

    with ThreadPoolExecutor(_THREADS) as pool:
        return [message for message in pool.map(compare, names) if message]


@contextlib.contextmanager
def _unreadable(checkpoint: Path) -> Iterator[None]:
    """Tells what cannot be read now from what is damaged."""
    try:
        yield
    except _GONE:
        raise
    except OSError as error:
        raise unreadable(checkpoint, f"{error.filename}: {error.strerror}") from None


def unreadable(checkpoint: Path, reason: str) -> InputError:
    """The error of a checkpoint that may be whole, but cannot be read as things are."""
    return InputError(
        f"checkpoint {checkpoint} cannot be read ({reason}). Nothing was changed. Make it readable "
        "and start the same command again; or move this checkpoint elsewhere to use an older one"
    )


def refuse_renamed(checkpoint: Path) -> None:
    """Raises InputError for a numbered checkpoint that holds another step than its name says."""
    step = read_json(checkpoint / "config" / "metadata").get("step")
    # Older and converted ones say none.
    if isinstance(step, int) and str(step) != checkpoint.name:
        raise InputError(
            f"{checkpoint} holds step {step}: it was renamed, or another one was put in its place. "
            f"Rename it to {checkpoint.with_name(str(step))}"
        )


def _hash(path: Path) -> str:
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def _describe(step: Path, found: list[str]) -> str:
    more = f" (and {len(found) - 3} more files)" if len(found) > 3 else ""
    return f"WARNING: checkpoint {step} is damaged: {'; '.join(found[:3])}{more}."


def saved_steps(steps: Path) -> list[int]:
    """The committed steps of a directory of numbered checkpoints, ascending."""
    while steps.is_dir():
        # Orbax looks at each directory, of which a run in training may remove one meanwhile.
        with contextlib.suppress(FileNotFoundError):
            return sorted(ocp.utils.checkpoint_steps(steps))
    return []


def set_aside_damaged(steps: Path, say: Callable[[str], None]) -> None:
    """Renames the newest checkpoints of a run to damaged-N until one is whole, and says so.

    Every process of the run calls this, and reads a share of the files.

    Raises InputError, on all processes: none is whole though there have been some; the newest
    cannot be read; it holds another step than its name says. Nothing is renamed then.
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
                name = f"damaged-{newest.name}"
                names = (name, *(f"{name}-{again}" for again in range(2, 1000)))
                aside = next(steps / each for each in names if not (steps / each).exists())
                rename(newest, aside)
                instead = f"step {known[-2]} is used" if len(known) > 1 else "there is no other"
                say(f"{_describe(newest, found)} It is now {aside}; {instead} instead.")
    if steps.is_dir() and (lost := sorted(steps.glob("damaged-*"))):
        raise InputError(
            f"{steps} holds no whole checkpoint: {', '.join(path.name for path in lost)} "
            f"{'is' if len(lost) == 1 else 'are'} damaged. Put back a copy of one under its "
            "number, or give a new --workdir"
        )


def newest_whole(steps: Path, skip: tuple[str, ...]) -> Path | None:
    """The newest checkpoint without damage, for a reader who changes nothing; or None.

    Each damaged one that is passed over is reported on stderr. One that a run in training removes
    meanwhile is not damaged: the newer one is taken.

    Raises InputError when the newest one cannot be read, or holds another step than its name says.
    """

    def choose() -> tuple[Path | None, list[str]]:
        known = saved_steps(steps)
        told: list[str] = []
        for step in reversed(known):
            checkpoint = steps / str(step)
            found = damage(checkpoint, skip)
            if not found:
                refuse_renamed(checkpoint)
                return checkpoint, told
            told.append(_describe(checkpoint, found) + " An older one is used.")
            if saved_steps(steps)[-1:] != known[-1:]:
                raise InputError(f"{checkpoint} is not the newest any more")  # in_training repeats
        return None, told

    chosen, told = in_training(steps, choose)
    for message in told:
        print(message, file=sys.stderr)
    return chosen


def in_training[T](steps: Path, read: Callable[[], T]) -> T:
    """Returns read(), which reads the newest checkpoint; repeats it if there is a newer one now.

    A run in training removes old checkpoints from `steps` when it has saved newer ones, also while
    they are read: `read` then raises InputError. Other errors of `read` are raised.
    """
    for _ in range(TRIES):
        newest = saved_steps(steps)[-1:]
        try:
            return read()
        except InputError:
            if saved_steps(steps)[-1:] == newest:
                raise
    raise InputError(
        f"{steps}: {TRIES} times a run in training has removed the checkpoint that was being read. "
        "Read a copy of one, or let the run keep more: --config.train.keep_checkpoints"
    )
