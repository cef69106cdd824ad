"""Safetensors directories: read through a memory map, written tensor by tensor.

Nothing is unpickled or executed.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from safetensors import SafetensorError, safe_open

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.files import forget, refuse_pointer
from finermoe_jax.runtime.json_files import read_json, to_json

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
# Supported dtypes by their safetensors name.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_SHARD_BYTES = 4 << 30
# Bytes written between flushes to disk.
_FLUSH_BYTES = 128 << 20


def indexed_files(directory: Path) -> list[str] | None:
    """Returns the files in the index of a HF directory; None without an index.

    Raises InputError if the index cannot be read or points outside its directory.
    """
    index = directory / INDEX_FILE
    if not index.exists():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or {type(file) for file in weight_map.values()} - {str}:
        raise InputError(f"{index} has no usable weight_map")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise InputError(f"{index} points outside its directory: {name!r}")
    return names


class TensorFiles:
    """The safetensors of a HF directory, memory-mapped.

    Raises InputError for a directory without safetensors, an index that names missing files or
    files outside the directory, and files with a broken header.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.files: dict[str, Any] = {}
        self.sizes: dict[str, int] = {}
        self.where: dict[str, str] = {}
        for file in self._file_names():
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118  (not a mapping)
                if name in self.where:
                    raise InputError(f"{name} is in both {self.where[name]} and {file}")
                self.where[name] = file
        self._check_index()

    def _file_names(self) -> list[str]:
        names = indexed_files(self.directory)
        for name in names or ():
            if not os.path.isfile(self.directory / name):  # also False for invalid names
                raise InputError(
                    f"{self.directory / INDEX_FILE} names {name!r}, which is missing or not a file"
                )
        if names is not None:
            return names
        if (self.directory / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        found = self.directory.iterdir()
        hint = ""
        if pickles := sorted(p.name for p in found if p.suffix in (".bin", ".pt", ".pth")):
            hint = (
                f"; {', '.join(pickles)} cannot be read safely, since unpickling can execute code: "
                "convert to safetensors first"
            )
        raise InputError(f"{self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")

    def _open(self, file: str) -> Any:
        path = self.directory / file
        try:
            self.files[file] = safe_open(path, framework="numpy")
            self.sizes[file] = path.stat().st_size
        except (OSError, MemoryError, SafetensorError) as error:
            if _first_bytes(path) in (b"PK", b"\x80\x02", b"\x80\x04"):
                raise InputError(
                    f"{path} is a pickle, and unpickling can execute code: convert it to "
                    "safetensors first"
                ) from None
            refuse_pointer(path)
            raise InputError(f"{path} is truncated or not a safetensors file: {error}") from None
        return self.files[file]

    def _check_index(self) -> None:
        if not (self.directory / INDEX_FILE).exists():
            return
        stated = read_json(self.directory / INDEX_FILE)["weight_map"]
        wrong = sorted(
            f"{name} ({stated.get(name)} in the index, {self.where.get(name)} in the files)"
            for name in stated.keys() | self.where.keys()
            if stated.get(name) != self.where.get(name)
        )
        if wrong:
            raise InputError(
                f"{self.directory / INDEX_FILE} contradicts the files: {listing(wrong)}"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return tuple(self.files[self.where[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Returns a tensor's dtype by its safetensors name."""
        return self.files[self.where[name]].get_slice(name).get_dtype()

    def tensor(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns a tensor's values, or part of them.

        Raises InputError if its file changed size since it was opened.
        """
        path = self.directory / self.where[name]
        # Reading a mapped file beyond its end would kill the process.
        size = path.stat().st_size if path.exists() else 0
        if size != self.sizes[path.name]:
            raise InputError(
                f"{path} has {size} bytes, but had {self.sizes[path.name]} when it was opened: "
                "do not change the source while it is read"
            )
        file = self.files[path.name]
        return file.get_slice(name)[index] if index else file.get_tensor(name)


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(2)
    except OSError:
        return b""


def listing(items: list[str], limit: int = 200) -> str:
    """Formats items as indented lines, at most `limit`."""
    more = f"\n  … and {len(items) - limit} more" if len(items) > limit else ""
    return "\n  " + "\n  ".join(items[:limit]) + more


class Entry(NamedTuple):
    """A tensor's entry in a file's header."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def largest_file(sizes: Sequence[int]) -> int:
    """Returns the most bytes that a file of `write_tensors` has for tensors of these sizes."""
    return min(sum(sizes), max(_SHARD_BYTES, *sizes))


def write_tensors(
    directory: Path,
    entries: Sequence[Entry],
    pieces: Iterable[tuple[str, np.ndarray]],
    finished: Callable[[Path], None] = lambda file: None,
) -> Iterator[int]:
    """Writes safetensors, sharded and indexed if large; yields bytes as written.

    safetensors' own writer needs a whole shard in memory; this one does not.

    Args:
      directory: target directory.
      entries: every tensor, in the order of `pieces`.
      pieces: (name, values); a tensor may come in several pieces, row by row.
      finished: called with each complete file of tensors; may move it elsewhere.
    """
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if size and size + entry.nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    count, files = len(shards), [SINGLE_FILE]
    if count > 1:
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    coming = iter(pieces)
    for file, shard in zip(files, shards, strict=True):
        with (directory / file).open("wb") as stream, _flushed(stream) as flush:
            stream.write(_header(shard))
            for entry in shard:
                left = entry.nbytes
                while left:
                    name, values = next(coming)
                    assert name == entry.name and values.dtype == entry.dtype, (name, entry)
                    left -= stream.write(np.ascontiguousarray(values).view(np.uint8).data)
                    yield values.nbytes
                    flush()
        finished(directory / file)
    assert next(coming, None) is None
    if count > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
            "weight_map": {e.name: file for file, s in zip(files, shards, strict=True) for e in s},
        }
        (directory / INDEX_FILE).write_text(to_json(index, indent=2) + "\n")


@contextlib.contextmanager
def _flushed(stream: BinaryIO) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each write, which syncs the file to disk in a thread.

    Synced pages leave the page cache (`files.forget`). The rest is synced at the end.
    """
    path, pending, done = Path(stream.name), None, 0

    def sync() -> None:
        getattr(os, "fdatasync", os.fsync)(stream.fileno())  # macOS has no fdatasync
        forget(path)

    with ThreadPoolExecutor(1) as pool:

        def flush() -> None:
            nonlocal pending, done
            if stream.tell() - done >= _FLUSH_BYTES:
                if pending is not None:
                    pending.result()
                stream.flush()
                done, pending = stream.tell(), pool.submit(sync)

        yield flush
        if pending is not None:
            pending.result()
    stream.flush()
    os.fsync(stream.fileno())
    forget(path)


def _header(shard: Sequence[Entry]) -> bytes:
    """Length, then JSON padded to a multiple of 8, as the format requires."""
    names = {value: key for key, value in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        header[entry.name] = {
            "dtype": names[str(entry.dtype)],
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = to_json(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
