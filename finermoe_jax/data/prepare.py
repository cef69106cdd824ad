"""Turns text into memory-mapped token shards, once, for any number of runs (docs/data.md).

One process reads and writes, the others tokenize. The output depends only on the text, the
tokenizer and the settings, not on the number of processes or interruptions. A rerun with the same
arguments resumes after the last complete shard.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import glob
import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from finermoe_jax.data import text
from finermoe_jax.data.shard_writer import ShardWriter, partial_path, write_manifest
from finermoe_jax.data.token_files import (
    DTYPES,
    MANIFEST,
    PARTIAL,
    Manifest,
    Settings,
    Shard,
    read_manifest,
    shard_damage,
    shard_files,
    tokenizer_hash,
)
from finermoe_jax.data.tokenizers import (
    ANY_VOCABULARY,
    open_tokenizer,
    tokenizer_directory,
    vocabulary,
)
from finermoe_jax.errors import InputError, refuse_differences
from finermoe_jax.runtime import disk
from finermoe_jax.runtime.buckets import locate
from finermoe_jax.runtime.files import find, make_directory, sync
from finermoe_jax.runtime.locks import LOCK_FILE, Lock
from finermoe_jax.runtime.paths import local

_AHEAD = 4  # in-flight batches of text per process

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_OURS = re.compile(r"\d{5,}\.(bin|partial|documents\.npy)|\.\d{5,}\.documents\.npy\.partial")


def prepare(
    sources: list[str], target: Path, tokenizer_files: str | Path, processes: int = 1,
    text_field: str = "text", split: str = "train", shard_tokens: int = 1 << 27,
    say: Callable[[str], None] = print,
) -> Manifest:  # fmt: skip
    """Writes or completes a prepared directory.

    Files without text are omitted and reported.

    Args:
      sources: files, globs, directories (all text in them), ids of Hugging Face datasets.
      target: the directory; new, empty, or begun with the same arguments.
      tokenizer_files: a directory with a tokenizer, or a Hub id.
      processes: number of processes that tokenize; 1: this one.
      text_field: field of a JSON line, column of parquet or of a dataset that contains the text.
      split: split of Hugging Face datasets.
      shard_tokens: a shard ends with the piece of text that reaches this many tokens.
      say: called with each message.

    Returns:
      The manifest of the complete directory.

    Raises:
      InputError: no or unreadable sources; a target with other content or settings, or in use by
        another process; a full disk.
    """
    for name, value in (("processes", processes), ("shard_tokens", shard_tokens)):
        if value < 1:
            raise InputError(f"--{name}={value} must be at least 1")
    target, sources = Path(local(target)), [local(source) for source in sources]
    tokenizer_files = tokenizer_directory(locate(tokenizer_files))
    tokenizer = open_tokenizer(tokenizer_files, ANY_VOCABULARY)
    found = expand(sources, split, text_field)
    vocab_size = vocabulary(tokenizer)
    settings = Settings(
        tokenizer=tokenizer_hash(tokenizer_files),
        vocab_size=vocab_size,
        eos_id=tokenizer.eos_token_id,
        dtype="uint16" if vocab_size <= 1 << 16 else "uint32",
        text_field=text_field,
        split=split,
        shard_tokens=shard_tokens,
        sources=tuple(source.name for source in found),
        source_bytes=tuple(source.size for source in found),
    )
    with _locked(target):
        if (target / MANIFEST).is_file():
            manifest = read_manifest(target / MANIFEST)
            _refuse_other(target, manifest.settings, settings)
            say(f"{target} is complete: {summary(manifest)}")
            return manifest
        shards = _begun(target, settings)
        if shards:
            say(f"resuming after {len(shards)} complete shards")
        writer = ShardWriter(target, settings, shards)
        with contextlib.closing(writer), _encoder(tokenizer, tokenizer_files, processes) as encode:
            _write(found, writer, encode, _AHEAD * processes if processes > 1 else 1, say)
            manifest = writer.finish()
    say(f"{target}: {summary(manifest)}")
    return manifest


def summary(manifest: Manifest) -> str:
    """Summarizes a prepared directory in one line."""
    return (
        f"{manifest.tokens:,} tokens of {manifest.documents:,} documents in "
        f"{len(manifest.shards)} shards, {manifest.settings.dtype}"
    )


def expand(sources: list[str], split: str, field: str) -> list[text.TextFile | text.HubText]:
    """Expands sources into files and datasets; files of a directory or glob are sorted by name.

    Raises InputError if nothing is found, and for an empty file, an unknown kind of file, or a
    repeated one.
    """
    found: list[text.TextFile | text.HubText] = []
    for source in sources:
        path = find(source)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and text.text_kind(p))
            if not files:
                raise InputError(f"{path} contains no text ({text.KNOWN})")
        elif not path.exists() and glob.has_magic(source):
            files = sorted(Path(p) for p in glob.glob(source, recursive=True))
            if not files:
                raise InputError(f"no file matches {source}")
        elif not path.exists() and not text.text_kind(path) and _HUB_NAME.fullmatch(source):
            found.append(text.HubText(source, split, field))
            continue
        else:
            files = [path]
        found += [text.TextFile(file, field) for file in files]
    files_found = [source for source in found if isinstance(source, text.TextFile)]
    if empty := [source.name for source in files_found if not source.size]:
        raise InputError(f"--source names empty files, remove them: {', '.join(empty)}")
    names = collections.Counter(
        str(source.path.resolve()) if isinstance(source, text.TextFile) else source.name
        for source in found
    )
    if twice := [name for name, times in names.items() if times > 1]:
        raise InputError(f"--source names {', '.join(twice)} more than once")
    return found


# --- the target -----------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Creates the target and locks it against other writers.

    Raises InputError for a file, for a second writer, and if the disk fills up.
    """
    if target.exists() and not target.is_dir():
        raise InputError(f"--target={target} is a file; pass a directory")
    filled = (
        f"{target} cannot be written: No space is left on its disk; free some space and rerun the "
        "same command to resume after the last complete shard"
    )
    with disk.refusing_full(filled), contextlib.closing(Lock(target, "--target")) as lock:
        make_directory(target)
        lock.take()
        try:
            yield
        finally:
            if (target / MANIFEST).is_file():
                lock.path.unlink(missing_ok=True)
                sync(target)  # removed files stay removed after a power cut


def _begun(target: Path, settings: Settings) -> list[Shard]:
    """Returns the complete shards of an interrupted run, and removes its other files."""
    begins = partial_path(target / PARTIAL)  # a run's very first file
    shards: list[Shard] = []
    if (target / PARTIAL).is_file():
        manifest = read_manifest(target / PARTIAL)
        _refuse_other(target, manifest.settings, settings)
        for shard in manifest.shards:
            if shard_damage(target, shard, DTYPES[settings.dtype]):
                break
            shards.append(shard)
    elif others := [p.name for p in target.iterdir() if p not in (target / LOCK_FILE, begins)]:
        raise InputError(
            f"--target={target} contains {others[0]} and no prepared data: pass a new directory"
        )
    # This file marks an interrupted run.
    write_manifest(target / PARTIAL, Manifest.of(settings, shards))
    kept = {path for shard in shards for path in shard_files(target, shard.name)}
    for path in target.iterdir():
        ours = _OURS.fullmatch(path.name) or path == partial_path(target / MANIFEST)
        if ours and path not in kept and not path.is_dir():
            path.unlink()
    return shards


def _refuse_other(target: Path, begun: Settings, settings: Settings) -> None:
    refuse_differences(
        f"{target} was prepared with other settings",
        dataclasses.asdict(begun),
        dataclasses.asdict(settings),
        "pass a new --target, or the settings that it was prepared with",
        here="now",
    )


# --- the work -------------------------------------------------------------------------------


def _write(
    sources: list[text.TextFile | text.HubText], writer: ShardWriter, encode: Any, ahead: int,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Sends batches of text to `encode`, and their tokens, in order, to the writer."""
    first, skipped = writer.end
    sizes = [source.size for source in sources]
    bar = tqdm(
        total=sum(sizes) if all(sizes) else None, unit="B", unit_scale=True, desc="preparing",
        mininterval=0.5 if sys.stderr.isatty() else 20, dynamic_ncols=True, file=sys.stderr,
    )  # fmt: skip
    in_flight: collections.deque[tuple[list[text.Piece], int, int, int, Any]] = collections.deque()
    began, tokens = time.monotonic(), 0

    def take() -> None:
        nonlocal tokens
        batch, number, done, position, future = in_flight.popleft()
        for piece, ids in zip(batch, future.result(), strict=True):
            done += 1
            tokens += len(ids)
            writer.add(ids, piece.ends_document, number, done)
        speed = tokens / (time.monotonic() - began)
        bar.set_postfix_str(f"{tokens:,} tokens, {speed:,.0f} tokens/s", refresh=False)
        bar.update(sum(sizes[:number]) + position - bar.n)

    with bar:
        for number in range(first, len(sources)):
            pieces, done = _filled(sources[number], say), 0
            if number == first:
                done = sum(1 for _ in itertools.islice(pieces, skipped))
                bar.update(sum(sizes[:number]) + sources[number].position - bar.n)
                bar.initial = bar.n  # earlier work does not count for the speed
            for batch in text.batches(pieces):
                future = encode(batch)
                in_flight.append((batch, number, done, sources[number].position, future))
                done += len(batch)
                while len(in_flight) >= ahead:
                    take()
        while in_flight:
            take()


def _filled(
    source: text.TextFile | text.HubText, say: Callable[[str], None]
) -> Iterator[text.Piece]:
    """Yields the pieces of a source; if it is blank, warns and yields none."""
    try:
        yield from source.pieces()
    except text.BlankError as error:
        say(f"WARNING: {error}; it is omitted")


@contextlib.contextmanager
def _encoder(tokenizer: Any, files: Path, processes: int) -> Iterator[Any]:
    """Yields a function from a batch of pieces to the future of their tokens."""
    if processes == 1:

        def encode(batch: list[text.Piece]) -> concurrent.futures.Future:
            done: concurrent.futures.Future = concurrent.futures.Future()
            done.set_result(text.encode(batch, tokenizer))
            return done

        yield encode
        return
    # Spawn: a fork would copy locks held by threads.
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _begin_worker, (str(files),)
    )
    try:
        yield lambda batch: pool.submit(_work, batch)
    except BrokenProcessPool:
        raise InputError(
            "a tokenizing process died (killed, or out of memory): rerun the command with fewer "
            "--processes to resume after the last complete shard"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: Any = None


def _begin_worker(files: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = open_tokenizer(Path(files), ANY_VOCABULARY)


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed; it would otherwise wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(batch: list[text.Piece]) -> list[np.ndarray]:
    return text.encode(batch, _worker_tokenizer)
