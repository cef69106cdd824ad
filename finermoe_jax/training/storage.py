"""The storage of a run's files: a directory or a bucket.

A run in a bucket works on a local scratch directory. Orbax writes checkpoints/ straight into the
bucket; all other files are written locally and uploaded whole, every UPLOAD_SECONDS and before each
checkpoint is committed. A lock in the bucket keeps other runs away (lease.py).
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from finermoe_jax.errors import InputError, RunEnded
from finermoe_jax.runtime import distributed, files
from finermoe_jax.runtime.buckets import (
    BucketPath,
    Changed,
    Place,
    Unreachable,
    crc32c,
    is_outage,
    place,
)
from finermoe_jax.runtime.downloads import cache, named_after
from finermoe_jax.runtime.lease import LEASE, Lease
from finermoe_jax.runtime.locks import LOCK_FILE, Lock

UPLOAD_SECONDS = 30.0
_PARTIAL = ".config.json.partial"  # temporary file of files.write
_OWNER = ".bucket"  # in a scratch directory: the URL whose files it holds
_NOT_UPLOADED = ("checkpoints", "wandb")
# What a run writes before its first checkpoint, except logs and pictures.
_FIRST = ("config.json", "data.json", "nonfinite", "profile", "tensorboard", "tokenizer",
          "wandb_run_id", LEASE)  # fmt: skip
_VISIBLE_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class BucketWorkdir:
    """A workdir in a bucket, and the local directory that holds its files except checkpoints."""

    bucket: BucketPath
    scratch: Path

    def __str__(self) -> str:
        return str(self.bucket)


Workdir = Path | BucketWorkdir


def files_of(workdir: Workdir) -> Path:
    """Returns the local directory of a workdir's logs, config.json and tokenizer/."""
    return workdir.scratch if isinstance(workdir, BucketWorkdir) else workdir


def checkpoints_of(workdir: Workdir) -> Place:
    """Returns a workdir's directory of numbered checkpoints."""
    return (workdir.bucket if isinstance(workdir, BucketWorkdir) else workdir) / "checkpoints"


def is_run(workdir: Workdir) -> bool:
    """Returns True if a workdir contains a run, False if it is new or was killed before its start.

    Raises InputError if it contains anything else; for a bucket, `fetch` has done so.
    """
    if isinstance(workdir, BucketWorkdir):
        return (workdir.scratch / "config.json").is_file()
    if not workdir.exists():
        return False
    if not workdir.is_dir():
        raise InputError(f"{workdir} is a file; give a directory as --workdir")
    if (workdir / "config.json").is_file() and (workdir / "checkpoints").is_dir():
        return True
    names = {path.name for path in workdir.iterdir()}
    checkpoints = workdir / "checkpoints"
    if not names <= {LOCK_FILE, _PARTIAL, "checkpoints"} or (
        checkpoints.exists() and any(checkpoints.iterdir())
    ):
        raise InputError(f"{workdir} is not empty and contains no run: give a new --workdir")
    return False


@contextlib.contextmanager
def readable_workdir(text: str | os.PathLike) -> Iterator[Workdir]:
    """Yields a workdir to read; the files of one in a bucket are downloaded until the block ends.

    Raises InputError if there are other things than a run in the bucket.
    """
    found = place(text)
    if isinstance(found, Path):
        yield found.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="finermoe-") as folder:
        workdir = BucketWorkdir(found, Path(folder) / found.bucket / found.key)
        workdir.scratch.mkdir(parents=True)
        with named_after(found, workdir.scratch):
            fetch(workdir)
            yield workdir


def fetch(workdir: BucketWorkdir) -> dict[str, int]:
    """Downloads a run's files except checkpoints, TensorBoard's and profiles.

    Returns their generations by name. Raises InputError if the bucket path holds anything but a
    run.
    """
    names = set(workdir.bucket.names())
    first = {name for name in names if name in _FIRST or name.endswith((".jsonl", ".png"))}
    begun = "config.json" in names and ({"checkpoints", "damaged"} & names or names == first)
    if names - {LEASE} and not begun:
        raise InputError(f"{workdir} is not empty and contains no run: give a new --workdir")
    found = workdir.bucket.objects(deep=False)
    found |= {
        f"tokenizer/{name}": each for name, each in (workdir.bucket / "tokenizer").objects().items()
    }
    generations = {}
    for name in found:
        if name == LEASE or name.startswith("."):
            continue
        target = workdir.scratch / name
        target.parent.mkdir(parents=True, exist_ok=True)
        generations[name] = (workdir.bucket / name).download(target)
    return generations


class LocalStorage:
    """A workdir on a file system; locked by a file in it."""

    def __init__(self, workdir: Path):
        self.workdir: Workdir = workdir
        self._path, self._lock = workdir, Lock(workdir, "--workdir")

    def open(self) -> None:
        """No-op: only a bucket is locked and read before `take`."""

    def take(self) -> None:
        """Locks the workdir, if it exists. Raises InputError if another run has locked it."""
        if jax.process_index() == 0 and self._path.exists():
            self._lock.take()

    def publish(self) -> None:
        """No-op: the processes share the directory."""

    def receive(self) -> None:
        """Waits until process 0's workdir is visible here; network file systems may be slow.

        Raises InputError if it is not visible after 60 s.
        """
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not (self._path / "config.json").is_file():
            if time.monotonic() > deadline:
                raise InputError(
                    f"process 0 has created {self._path}, but it is not visible here: --workdir "
                    "must be a directory shared by all processes"
                )
            time.sleep(0.5)

    def check(self) -> None:
        """Raises RunEnded if this run must not write any more."""

    def before_save(self) -> None:
        """No-op: the lock of a file system cannot be lost."""

    def before_commit(self) -> None:
        """Makes what a checkpoint refers to durable, and checks that it may be committed."""

    def close(self, error: BaseException | None = None) -> None:
        """Releases the lock. `error` is what ended the run."""
        self._lock.close()

    def is_outage(self, error: BaseException | None) -> bool:
        """Returns False: no error of a file system says that a server cannot be reached."""
        return False


class BucketStorage:
    """A workdir in a bucket, with the methods of LocalStorage. Process 0 has the lock."""

    def __init__(self, bucket: BucketPath, scratch: Path, say: Callable[[str], None]):
        self.workdir: Workdir = BucketWorkdir(bucket, scratch)
        self.bucket, self.scratch, self.say = bucket, scratch, say
        self._lease, self._lock = Lease(bucket, say), Lock(scratch, "--scratch")
        # Of uploaded files by name: the local state and the generation.
        self._states: dict[str, files.State] = {}
        self._generations: dict[str, int] = {}
        self._unanswered: dict[str, set[str]] = {}  # CRC-32C of writes without an answer
        self._publishing, self._over = threading.Lock(), threading.Event()
        self._uploader = threading.Thread(target=self._keep_uploading, name="upload", daemon=True)
        self._failure = ""

    def open(self) -> None:
        """Takes the lease, empties the scratch directory and downloads the run's files into it.

        Raises InputError if another run has the lease, or if access is denied.
        """
        if jax.process_index() == 0:
            self._lease.take()
        self._receive()

    def _receive(self) -> None:
        self._prepare_scratch()
        self._generations = fetch(BucketWorkdir(self.bucket, self.scratch))
        self._states = {name: files.state(self.scratch / name) for name in self._generations}

    def take(self) -> None:
        """Does nothing: `open` has taken the lease, before it read anything."""

    def publish(self) -> None:
        """Uploads changed files, and begins to do so regularly."""
        if jax.process_index() == 0:
            self._upload()
            for name in self._generations.keys() - set(self._local_names()):
                if name.startswith("tokenizer/"):  # of an earlier start
                    (self.bucket / name).delete()
                    del self._generations[name]
            if not self._uploader.is_alive():
                self._uploader.start()

    def receive(self) -> None:
        """Downloads what process 0 has published."""
        if jax.process_index() > 0:
            self._receive()

    def check(self) -> None:
        """Raises RunEnded if the lease is lost or the files cannot be uploaded."""
        self._lease.check()
        if self._failure:
            raise RunEnded(f"{self._failure}. This run ends and saves nothing more", alone=True)

    def close(self, error: BaseException | None = None) -> None:
        """Uploads the files a last time and releases the lease, which else expires by itself.

        `error` is what ended the run: after an outage nothing more is tried, and after another
        error a failure here is ignored. Without one raises Unreachable, RunEnded or InputError.
        """
        self._over.set()
        try:
            if self.is_outage(error):
                self._lease.abandon()
                return
            if self._uploader.is_alive():
                self._uploader.join()
            with contextlib.suppress(*(RunEnded, InputError) if error else ()):
                if self._generations and not (self._failure or self._lease.lost):
                    self._upload()
                self._lease.close()
        finally:
            self._lock.close()

    def is_outage(self, error: BaseException | None) -> bool:
        """Returns True if an error says that the bucket cannot be reached."""
        return is_outage(error)

    def before_save(self) -> None:
        """Confirms the lease before any process writes an object of a checkpoint.

        Raises RunEnded if the lease is lost, Unreachable, or InputError if access is denied.
        """
        if jax.process_index() == 0:
            self._lease.confirm()
        distributed.exchange("")  # if process 0 raises, its heartbeat ends the others

    def before_commit(self) -> None:
        """Uploads the logs, then confirms the lease. Orbax calls it in a thread of process 0.

        Raises RunEnded if the lease is lost or the run has ended.
        """
        if self._over.is_set():
            raise RunEnded(f"the run in {self.bucket} has ended")
        self._upload()
        self._lease.confirm()

    def _prepare_scratch(self) -> None:
        owner = self.scratch / _OWNER
        if self.scratch.exists() and not self.scratch.is_dir():
            raise InputError(f"--scratch={self.scratch} is a file: give a directory")
        if self.scratch.exists() and any(self.scratch.iterdir()):
            if not owner.is_file() or owner.read_text() != str(self.bucket):
                raise InputError(
                    f"--scratch={self.scratch} is not empty and is not the scratch directory of "
                    f"{self.bucket}: give a new one"
                )
        files.make_directory(self.scratch)
        self._lock.take()
        files.write(owner, str(self.bucket))
        for path in self.scratch.iterdir():
            if path.name == "wandb":  # of WANDB_MODE=offline, not synced yet
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path not in (owner, self._lock.path):
                path.unlink()

    def _local_names(self) -> list[str]:
        """Returns the names of files to upload; config.json first, as `fetch` expects."""
        names = [
            str(path.relative_to(self.scratch))
            for path in self.scratch.rglob("*")
            if path.is_file()
        ]
        kept = [
            name
            for name in names
            if not any(part.startswith(".") for part in Path(name).parts)
            and Path(name).parts[0] not in _NOT_UPLOADED
        ]
        return sorted(kept, key=lambda name: (name != "config.json", name))

    def _upload(self) -> None:
        """Uploads changed files whole. Raises RunEnded if another process has written one."""
        with self._publishing:
            for name in self._local_names():
                try:
                    state = files.state(self.scratch / name)
                    if self._states.get(name) == state:
                        continue
                    content = (self.scratch / name).read_bytes()
                except FileNotFoundError:
                    continue  # removed since it was listed
                try:
                    self._generations[name] = self._write(name, content)
                except Changed as error:
                    self._failure = f"{error}: another run writes to {self.bucket}"
                    self.check()
                self._states[name] = state

    def _write(self, name: str, content: bytes) -> int:
        """Writes an object that this run wrote last, or that is new; returns its generation.

        Raises Changed if another process has written it. A write whose answer got lost may have
        arrived: it was this run's.
        """
        target, lost = self.bucket / name, self._unanswered.setdefault(name, set())
        # An unknown object is new, except below prefixes that `fetch` does not list.
        known = self._generations.get(name, None if "/" in name else 0)
        try:
            try:
                generation = target.write(content, known)
            except Changed:
                found = target.stat() if lost and target.is_file() else None
                if found is None or found.crc32c not in lost:
                    raise
                generation = target.write(content, found.generation)
        except Unreachable:
            lost.add(crc32c(content))
            raise
        lost.clear()
        return generation

    def _keep_uploading(self) -> None:
        while not self._over.wait(UPLOAD_SECONDS):
            try:
                self._upload()
            except Unreachable:
                continue  # the next checkpoint needs it, and says so
            except (RunEnded, InputError, OSError) as error:
                self._failure = self._failure or str(error)
                return


Storage = LocalStorage | BucketStorage


def default_scratch(bucket: BucketPath) -> Path:
    """Returns the scratch directory of a workdir in a bucket, in the user's cache.

    Its name is the workdir's, which pictures and W&B show.
    """
    key = hashlib.sha256(str(bucket).encode()).hexdigest()[:16]
    return cache() / key / bucket.name


@contextlib.contextmanager
def opened(
    workdir: str | os.PathLike, scratch: str | os.PathLike | None, say: Callable[[str], None]
) -> Iterator[Storage]:
    """Yields the storage of a workdir, neither locked nor read yet; closes it at the end.

    Raises InputError for `scratch` without a workdir in a bucket, and for a scratch in a bucket.
    """
    found = place(workdir, "--workdir")
    storage: Storage
    if isinstance(found, BucketPath):
        local = place(scratch, "--scratch") if scratch else default_scratch(found)
        if isinstance(local, BucketPath):
            raise InputError(f"--scratch={local} must be a local directory")
        local = local.absolute()
        # Processes of one machine must not share it.
        number = jax.process_index()
        own = local.with_name(f"{local.name}-process-{number}") if number else local
        storage = BucketStorage(found, own, say)
    elif scratch:
        raise InputError(
            f"--scratch={scratch} is only used with a --workdir in a bucket, but --workdir={found}"
        )
    else:
        storage = LocalStorage(found.absolute())
    try:
        yield storage
    except BaseException as error:
        storage.close(error)
        raise
    storage.close()
