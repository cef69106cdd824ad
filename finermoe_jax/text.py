"""Text of files and of Hugging Face datasets, a piece at a time; pieces of text to tokens.

A piece is at most a few hundred thousand characters, cut after a line end: memory stays small
whatever a file's size, and the tokens of a text do not depend on how it is read.
"""

import gzip
import importlib
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from finermoe_jax.errors import InputError
from finermoe_jax.paths import local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE_CHARS = 1 << 16  # a piece ends with the line that reaches it
LINE_CHARS = 1 << 18  # longer lines are cut
BATCH_CHARS = 1 << 19  # what is given to the tokenizer at once
BATCH_PIECES = 1024

_COMPRESSED = (".gz", ".xz", ".zst")
_KINDS = (".txt", ".jsonl", ".parquet")
KNOWN = ".txt or .jsonl, plain or with .gz, .xz or .zst, or .parquet"


class BlankError(InputError):
    """A file of text that holds none."""


class Piece(NamedTuple):
    """Some text of a document, and whether the document ends with it."""

    text: str
    ends_document: bool


def text_kind(path: Path) -> str:
    """ ".txt", ".jsonl" or ".parquet", looking through a compression's suffix; "" for others."""
    suffixes = [s.lower() for s in path.suffixes]
    kind = suffixes.pop() if suffixes else ""
    if kind in _COMPRESSED:
        kind = suffixes.pop() if suffixes else ""
        return kind if kind in _KINDS[:2] else ""
    return kind if kind in _KINDS else ""


class TextFile:
    """A .txt file (one document), a .jsonl or a .parquet file (a document a line or row).

    Attributes:
      size: bytes of the file, compressed as it is.
      position: how many of them `pieces` has read.
    """

    def __init__(self, path: Path, field: str = "text"):
        """Raises InputError: no such file, or of an unknown kind."""
        path = Path(local(path))
        if not path.is_file():
            raise InputError(f"text file {path} does not exist")
        if not text_kind(path):
            raise InputError(f"{path} must end in {KNOWN}")
        self.path, self.field = path, field
        self.size, self.position = path.stat().st_size, 0

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def pieces(self) -> Iterator[Piece]:
        """The text, from the beginning.

        Raises InputError: text that is not UTF-8, a line or row without a text, a damaged or cut
        file, a reader that is not installed. BlankError: nothing but white space; no piece of it
        has then been given.
        """
        blank: list[Piece] | None = []  # until there is text
        try:
            for piece in self._read():
                if blank is None:
                    yield piece
                    continue
                blank.append(piece)
                if piece.text.strip():
                    yield from blank
                    blank = None
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path} is not UTF-8 text: {error}") from None
        except _damages() as error:
            raise InputError(f"{self.path} cannot be read: {error}") from None
        if blank is not None:
            raise BlankError(f"{self.path} holds no text")

    def _read(self) -> Iterator[Piece]:
        kind = text_kind(self.path)
        if kind == ".parquet":
            yield from self._rows()
            return
        with self.path.open("rb") as raw, _decompressed(raw, self.path) as plain:
            # JSON strings may hold other line ends than \n; text keeps its own.
            newline = "" if kind == ".txt" else "\n"
            with io.TextIOWrapper(plain, encoding="utf-8", newline=newline) as stream:
                for piece in _cut(stream) if kind == ".txt" else self._json_lines(stream):
                    self.position = raw.tell()
                    yield piece

    def _json_lines(self, stream: Iterable[str]) -> Iterator[Piece]:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[self.field]
            except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise InputError(
                    f'{self.path}, line {number}: not a JSON object with a "{self.field}" string'
                )
            if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise InputError(
                    f"{self.path}, line {number}: half of a surrogate pair, which is no text"
                )
            yield from cut_document(text)

    def _rows(self) -> Iterator[Piece]:
        _need("pyarrow", self.name)
        from pyarrow import parquet

        with parquet.ParquetFile(self.path) as file:
            if self.field not in file.schema_arrow.names:
                raise InputError(
                    f"{self.path} has no column {self.field!r} (--text_field); its columns: "
                    + ", ".join(file.schema_arrow.names)
                )
            row, rows = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=64, columns=[self.field]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise InputError(f"{self.path}, row {row}: {self.field!r} is no text")
                    row += 1
                    self.position = self.size * row // rows
                    yield from cut_document(text)


class HubText:
    """The rows of a Hugging Face dataset, streamed: `owner/name` or `owner/name:configuration`."""

    size = position = 0  # not known

    def __init__(self, name: str, split: str, field: str):
        """Raises InputError when the library `datasets` is not installed."""
        _need("datasets", f"{name} is no file here; as a Hugging Face dataset it")
        self.name, self.split, self.field = name, split, field

    def pieces(self) -> Iterator[Piece]:
        """The text, from the beginning.

        Raises InputError: the dataset cannot be had, or a row without a text.
        """
        import datasets

        path, _, configuration = self.name.partition(":")
        number = -1
        try:
            rows = datasets.load_dataset(
                path, configuration or None, split=self.split, streaming=True
            )
            for number, row in enumerate(rows):
                if not isinstance(row.get(self.field), str):
                    raise InputError(
                        f"row {number} has no text in {self.field!r} (--text_field); its fields: "
                        + ", ".join(row)
                    )
                yield from cut_document(row[self.field])
        except Exception as error:  # the library raises many unrelated types
            first = (str(error).strip() or repr(error)).splitlines()[0]
            raise InputError(f"the dataset {self.name} cannot be read: {first}") from None
        if number < 0:
            raise InputError(f"{self.name} holds no text")


def is_hub_name(name: str) -> bool:
    """Whether a name that is no path here may be that of a Hugging Face dataset."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name)) and not text_kind(Path(name))


def _need(package: str, who: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        raise InputError(
            f"{who} needs the package {package}: pip install 'finermoe-jax[data]'"
        ) from None


def _decompressed(raw: Any, path: Path) -> Any:
    """The plain bytes of an open file."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(raw)
        case ".xz":
            return lzma.open(raw)
        case ".zst":
            return _zstd(str(path)).open(raw)
    return raw


def _zstd(who: str) -> Any:
    """The standard library's module, or what it was before Python 3.14."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        _need("backports.zstd", who)
        from backports import zstd
    return zstd


def _damages() -> tuple[type[Exception], ...]:
    """What the readers in use raise at a damaged file."""
    found: list[type[Exception]] = [OSError, EOFError, lzma.LZMAError, zlib.error]
    for module, name in (
        ("backports.zstd", "ZstdError"),
        ("compression.zstd", "ZstdError"),
        ("pyarrow", "ArrowException"),
    ):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def cut_document(text: str) -> Iterator[Piece]:
    """The pieces of one document."""
    if len(text) < PIECE_CHARS:
        yield Piece(text, True)
    else:
        yield from _cut(io.StringIO(text, newline=""))


def _cut(stream: Any) -> Iterator[Piece]:
    """The pieces of a stream that holds one document."""
    lines: list[str] = []
    length = 0
    while line := stream.readline(LINE_CHARS):
        if length >= PIECE_CHARS:
            yield Piece("".join(lines), False)
            lines, length = [], 0
        lines.append(line)
        length += len(line)
    yield Piece("".join(lines), True)


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists of a size that keeps a tokenizer busy."""
    batch: list[Piece] = []
    length = 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece.text)
        if length >= BATCH_CHARS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def encode(batch: Sequence[Piece], tokenizer: "PreTrainedTokenizerBase") -> list[np.ndarray]:
    """Each piece's tokens, int32; a document's last piece ends with the end-of-text token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer([p.text for p in batch], add_special_tokens=False, verbose=False)
    return [
        np.asarray(ids + (end if piece.ends_document else []), np.int32)
        for ids, piece in zip(encoded["input_ids"], batch, strict=True)
    ]


class Tokens(NamedTuple):
    """ids, int32 [N], of all documents in a row; starts, int64 [D], the first of each."""

    ids: np.ndarray
    starts: np.ndarray


def tokenize(
    pieces: Sequence[Piece], tokenizer: "PreTrainedTokenizerBase", show_progress: bool = False
) -> Tokens:
    """The tokens of documents, each followed by the tokenizer's end-of-text token."""
    arrays: list[np.ndarray] = []
    starts: list[int] = []
    count, begins = 0, True
    total = sum(len(piece.text) for piece in pieces)
    with tqdm(
        total=total, desc="tokenizing", unit="char", unit_scale=True, disable=not show_progress
    ) as bar:
        for batch in batches(pieces):
            for ids, piece in zip(encode(batch, tokenizer), batch, strict=True):
                if begins:
                    starts.append(count)
                arrays.append(ids)
                count, begins = count + len(ids), piece.ends_document
            bar.update(sum(len(piece.text) for piece in batch))
    ids = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    return Tokens(ids, np.asarray(starts, np.int64))
