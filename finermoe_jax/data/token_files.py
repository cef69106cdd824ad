"""Tokens in memory-mapped files: streams of them, and prepared directories.

A prepared directory (finermoe prepare) contains

    manifest.json          sources, settings and the list of shards: `Manifest`
    00000.bin              tokens, little-endian uint16 or uint32
    00000.documents.npy    int64: positions in the shard where documents begin

All shards form one stream; a document may continue in the next shard.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from finermoe_jax.config.parse import from_dict
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.files import refuse_pointer
from finermoe_jax.runtime.json_files import read_json, to_json
from finermoe_jax.runtime.paths import local

FORMAT = "finermoe-jax tokens 1"
MANIFEST, PARTIAL = "manifest.json", "manifest.partial.json"
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


# --- a stream of tokens ---------------------------------------------------------------------


class TokenStream:
    """Integer arrays read as one stream; memory-mapped ones stay on disk."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = list(arrays)
        self.starts = [0, *itertools.accumulate(len(a) for a in arrays)]

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, first: int, out: np.ndarray) -> None:
        """Fills `out`, int32 [N], with the tokens from `first` on, which must exist."""
        number = bisect.bisect_right(self.starts, first) - 1
        done = 0
        while done < len(out):
            begin = first + done - self.starts[number]
            part = self.arrays[number][begin : begin + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            number += 1

    def digest(self) -> str:
        """Returns the SHA-256 of the tokens as stored."""
        found = hashlib.sha256()
        for array in self.arrays:
            found.update(np.ascontiguousarray(array))
        return found.hexdigest()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training tokens and the positions where documents begin.

    Attributes:
      path: the user's name for it.
      tokens: all tokens.
      document_files: int64 arrays of the documents' first tokens, or .npy files of them, each with
        an offset to add.
      identity: distinguishes this data from other data, JSON.
    """

    path: str
    tokens: TokenStream
    document_files: tuple[tuple[np.ndarray | Path, int], ...]
    identity: dict[str, Any]

    def documents(self) -> np.ndarray:
        """Returns the first token of each document, int64 [D], ascending.

        Raises InputError if they do not ascend or are outside the stream.
        """
        starts = np.concatenate(
            [
                (_load(found) if isinstance(found, Path) else found) + shift
                for found, shift in self.document_files
            ]
        )
        if len(starts) and (starts[0] < 0 or starts[-1] > len(self.tokens)):
            raise InputError(
                f"{self.path}: its documents begin at tokens {starts[0]} … {starts[-1]}, but it "
                f"has {len(self.tokens)} tokens; the file is damaged: prepare it again"
            )
        if (np.diff(starts) < 0).any():
            raise InputError(f"{self.path}: its documents overlap; prepare it again")
        return starts


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """Returns a file's content as a memory-mapped read-only array.

    Raises InputError if the file is missing, unreadable or empty.
    """
    try:
        return np.memmap(path, dtype, "r").view(np.ndarray)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


# --- prepared directories -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shard:
    """One pair of files.

    `end` is the number of the source in which the shard ends, and how many of its pieces
    (data/text.py) precede the end. `open`: the last document continues in the next shard.
    """

    name: str
    tokens: int
    documents: int
    max_id: int
    sources: tuple[str, ...]
    sha256: str
    documents_sha256: str
    end: tuple[int, ...]
    open: bool


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that determines a prepared directory's content; source sizes in bytes."""

    tokenizer: str
    vocab_size: int
    eos_id: int | None
    dtype: str
    text_field: str
    split: str
    shard_tokens: int
    sources: tuple[str, ...]
    source_bytes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """manifest.json. It has another name until the directory is complete."""

    format: str
    tokens: int
    documents: int
    settings: Settings
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, settings: Settings, shards: Sequence[Shard]) -> "Manifest":
        """Returns the manifest of these shards."""
        tokens, documents = (sum(getattr(s, n) for s in shards) for n in ("tokens", "documents"))
        return cls(FORMAT, tokens, documents, settings, tuple(shards))


def read_manifest(path: Path) -> Manifest:
    """Reads a manifest. Raises InputError if it is not one or has another format."""
    return manifest_of(read_json(path), str(path))


def manifest_of(values: Any, path: str) -> Manifest:
    """Returns the manifest with this JSON content. Raises as `read_manifest`, naming `path`."""
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise InputError(f"{path} has format {found!r}; this version reads {FORMAT!r}")
    manifest: Manifest = from_dict(Manifest, values, path)
    for shard in manifest.shards:
        if len(shard.end) != 2 or min(*shard.end, shard.tokens, shard.documents) < 0:
            raise InputError(
                f"{path}: shard {shard.name!r} has {shard.tokens} tokens, {shard.documents} "
                f"documents and end={shard.end}, which must be two non-negative numbers: prepare "
                "the text again"
            )
    return manifest


def shard_name(number: int) -> str:
    """Returns the name of a shard's files, without suffix."""
    return f"{number:05d}"


def shard_files(directory: Path, name: str) -> tuple[Path, Path]:
    """Returns the paths of a shard's tokens and documents."""
    return directory / f"{name}.bin", directory / f"{name}.documents.npy"


def shard_damage(directory: Path, shard: Shard, dtype: np.dtype) -> str:
    """Describes a shard's damage that its file sizes reveal; empty if none."""
    tokens, documents = shard_files(directory, shard.name)
    for path, least, exact in (
        (tokens, shard.tokens * dtype.itemsize, True),
        (documents, shard.documents * 8, False),
    ):
        try:
            size = path.stat().st_size
        except OSError as error:
            return f"{path} cannot be read: {error}"
        if size != least if exact else size < least:
            refuse_pointer(path)
            return f"{path} has {size} bytes, but the manifest says {least}"
    return ""


def open_prepared(
    directory: Path, tokenizer: str, eos_id: int | None, show_progress: bool = False
) -> Corpus:
    """Opens a prepared directory; compares sizes and largest tokens with its manifest.

    tokenizer is `tokenizer_hash` of the run's tokenizer, eos_id its end-of-text token.

    Raises InputError for another tokenizer, and for shards that are missing, unreadable, empty, or
    differ from the manifest in size or largest token.
    """
    manifest = read_manifest(directory / MANIFEST)
    for what, theirs, ours in (
        ("tokenizer", manifest.settings.tokenizer, tokenizer),
        ("end-of-text token", manifest.settings.eos_id, eos_id),
    ):
        if theirs != ours:
            raise InputError(
                f"{directory} was prepared with {what} {theirs}, but the run's is {ours}: set "
                "data.tokenizer to the one it was prepared with, or prepare the text again"
            )
    _check_manifest(directory, manifest)
    dtype = DTYPES[manifest.settings.dtype]
    _allow_files(len(manifest.shards))
    arrays: list[np.ndarray] = []
    documents: list[tuple[Path, int]] = []
    shift = 0
    for number, shard in enumerate(manifest.shards):
        if shard.name != shard_name(number):
            raise InputError(f"{directory}: shard {shard_name(number)} is named {shard.name!r}")
        if damage := shard_damage(directory, shard, dtype):
            raise InputError(f"{damage}: copy it again, or prepare the text again")
        path, starts = shard_files(directory, shard.name)
        arrays.append(map_file(path, dtype))
        documents.append((starts, shift))
        if (shape := _load(starts).shape) != (shard.documents,):
            raise InputError(
                f"{starts} has shape {shape}, but the manifest says "
                f"{shard.documents} documents: copy it again, or prepare the text again"
            )
        shift += shard.tokens
    _check_ids(directory, manifest, arrays, show_progress)
    identity = {
        "kind": "prepared",
        "manifest_sha256": hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest(),
        "tokens": manifest.tokens,
        "max_id": max(shard.max_id for shard in manifest.shards),
    }
    return Corpus(str(directory), TokenStream(arrays), tuple(documents), identity)


def _check_manifest(directory: Path, manifest: Manifest) -> None:
    empty = [shard.name for shard in manifest.shards if shard.tokens < 1]
    if empty or not manifest.shards:
        what = f"shard {empty[0]}" if empty else "the list of shards"
        raise InputError(f"{directory}: {what} is empty; prepare it again")
    if manifest != Manifest.of(manifest.settings, manifest.shards):
        raise InputError(
            f"{directory / MANIFEST} states {manifest.tokens} tokens in {manifest.documents} "
            "documents, which is not the sum of its shards; prepare it again"
        )
    if (dtype := manifest.settings.dtype) not in DTYPES:
        raise InputError(
            f"{directory}: dtype {dtype!r} must be one of {', '.join(DTYPES)}; prepare it again"
        )


def _allow_files(count: int) -> None:
    """Raises this process's limit of open files if `count` more may exceed it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0
    if soft != resource.RLIM_INFINITY and opened + count > soft // 2:
        with contextlib.suppress(OSError, ValueError):  # opening will fail and name the file
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_ids(directory: Path, manifest: Manifest, arrays: list[np.ndarray], bar: bool) -> None:
    with scan_bar(manifest.tokens, directory.name if bar else "") as progress:
        for shard, tokens in zip(manifest.shards, arrays, strict=True):
            largest = id_range(tokens, progress)[1]
            if largest != shard.max_id:
                raise InputError(
                    f"{shard_files(directory, shard.name)[0]}: its largest token is {largest}, but "
                    f"the manifest says {shard.max_id}; verify the files: finermoe prepare "
                    f"--verify={directory}"
                )


def _load(path: Path) -> np.ndarray:
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except Exception:  # a damaged header may raise anything
        raise InputError(
            f"{path} is damaged: it is not a .npy file of int64; copy it again, or prepare the "
            "text again"
        ) from None
    if found.dtype != np.dtype("<i8") or found.ndim != 1:
        raise InputError(f"{path} contains {found.dtype} {found.shape}, not a row of int64")
    return found


def verify(directory: Path) -> Manifest:
    """Compares every shard with its checksums. Raises InputError naming those that differ."""
    directory = Path(local(directory))
    manifest = read_manifest(directory / MANIFEST)
    bad = []
    with tqdm(manifest.shards, desc="verifying", unit="shard") as bar:
        for shard in bar:
            stated = (shard.sha256, shard.documents_sha256)
            for path, expected in zip(shard_files(directory, shard.name), stated, strict=True):
                try:
                    with path.open("rb") as file:
                        found = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError as error:
                    found = str(error)
                if found != expected:
                    bad.append(f"{path}: {found}, but the manifest says {expected}")
    if bad:
        raise InputError("damaged files:\n  " + "\n  ".join(bad))
    return manifest


def tokenizer_hash(directory: Path) -> str:
    """Returns the SHA-256 of the tokenizer files that define text and ids.

    Hashes the content of tokenizer.json, not its formatting; without it, the files it replaces.
    """
    found = hashlib.sha256()
    whole = directory / "tokenizer.json"
    if whole.is_file():
        content = read_json(whole)
        for setting in ("truncation", "padding"):  # state of its last call
            content.pop(setting, None)
        found.update(to_json(content, sort_keys=True).encode())
    else:
        for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model"):
            if (directory / name).is_file():
                found.update(name.encode() + b"\0" + (directory / name).read_bytes())
    return found.hexdigest()


def scan_bar(total: int, name: str) -> tqdm:
    """Returns a progress bar of a token scan; hidden without a name."""
    return tqdm(
        total=total, desc=f"scanning {name}", unit="token", unit_scale=True, disable=not name,
        mininterval=1,
    )  # fmt: skip


def id_range(tokens: np.ndarray, bar: tqdm, digest: Any = None) -> tuple[int, int]:
    """Returns the smallest and largest of at least one token; feeds all to `digest`."""
    low, high, block = int(tokens[0]), int(tokens[0]), 1 << 20
    for first in range(0, len(tokens), block):
        part = tokens[first : first + block]
        low, high = min(low, int(part.min())), max(high, int(part.max()))
        if digest is not None:
            digest.update(part)
        bar.update(len(part))
    return low, high
