"""Text of files and Hugging Face datasets in pieces, and pieces of text to tokens.

A piece is at most a few hundred thousand characters, cut after a line end. So memory stays small
for files of any size, and the tokens of a text do not depend on how it is read.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from finermoe_jax.data.compressed import SUFFIXES, decompressed
from finermoe_jax.errors import InputError, first_line
from finermoe_jax.runtime.files import refuse_pointer
from finermoe_jax.runtime.install import require
from finermoe_jax.runtime.json_files import json_rows
from finermoe_jax.runtime.paths import local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE_CHARS = 1 << 16  # a piece ends with the line that reaches it
LINE_CHARS = 1 << 18  # longer lines are cut
BATCH_CHARS = 1 << 19  # per call of the tokenizer
BATCH_PIECES = 1024

HALF_PAIR = "half of a surrogate pair, which is not valid text"
_KINDS = (".txt", ".jsonl", ".parquet")
KNOWN = ".txt or .jsonl, plain or with .gz, .xz or .zst, or .parquet"


class BlankError(InputError):
    """A text file that contains only white space."""


class Piece(NamedTuple):
    """Some text of a document; ends_document marks its last piece."""

    text: str
    ends_document: bool


def text_kind(path: Path) -> str:
    """Returns ".txt", ".jsonl" or ".parquet", ignoring compression suffixes; "" for others."""
    suffixes = [s.lower() for s in path.suffixes]
    kind = suffixes.pop() if suffixes else ""
    if kind in SUFFIXES:
        kind = suffixes.pop() if suffixes else ""
        return kind if kind in _KINDS[:2] else ""
    return kind if kind in _KINDS else ""


class TextFile:
    """A .txt file (one document), or a .jsonl or .parquet file (one document per line or row).

    Attributes:
      size: bytes of the file, as stored.
      position: bytes that `pieces` has read.
    """

    def __init__(self, path: Path, field: str = "text"):
        """Raises InputError for a missing file, an unknown kind, or a git-lfs pointer."""
        path = Path(local(path))
        if not path.is_file():
            raise InputError(f"text file {path} does not exist")
        if not text_kind(path):
            raise InputError(f"{path} must end in {KNOWN}")
        refuse_pointer(path)
        self.path, self.name, self.field = path, str(path), field
        self.size, self.position = path.stat().st_size, 0

    def pieces(self) -> Iterator[Piece]:
        """Yields the text from the beginning.

        Raises InputError for text that is not UTF-8, a line or row without text, a line of JSON
        that is too long, a damaged or truncated file, or a missing package. Raises BlankError,
        before any piece, if there is only white space.
        """
        blank: list[Piece] | None = []  # held back until there is text
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
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error}") from None
        if blank is not None:
            raise BlankError(f"{self.path} contains no text")

    def _read(self) -> Iterator[Piece]:
        kind = text_kind(self.path)
        if kind == ".parquet":
            yield from self._rows()
            return
        with self.path.open("rb") as raw, decompressed(raw, self.path) as plain:
            pieces = self._document(plain) if kind == ".txt" else self._json_lines(plain)
            for piece in pieces:
                self.position = raw.tell()
                yield piece

    def _document(self, stream: io.BufferedReader) -> Iterator[Piece]:
        # Drops a byte order mark; keeps line ends.
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
            yield from _cut(text)

    def _json_lines(self, stream: io.BufferedReader) -> Iterator[Piece]:
        for number, row in json_rows(stream, self.path):
            text = row.get(self.field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise InputError(
                    f'{self.path}, line {number}: not a JSON object with a "{self.field}" string'
                )
            if not is_text(text):
                raise InputError(f"{self.path}, line {number}: {HALF_PAIR}")
            yield from cut_document(text)

    def _rows(self) -> Iterator[Piece]:
        require("pyarrow", "data", self.name)
        import pyarrow
        from pyarrow import parquet

        try:
            yield from self._columns(parquet)
        except pyarrow.ArrowException as error:
            raise InputError(f"{self.path} cannot be read: {error}") from None

    def _columns(self, parquet: Any) -> Iterator[Piece]:
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
                        raise InputError(f"{self.path}, row {row}: {self.field!r} is not text")
                    row += 1
                    self.position = self.size * row // rows
                    yield from cut_document(text)


class HubText:
    """The rows of a Hugging Face dataset, streamed: `owner/name` or `owner/name:configuration`."""

    size = position = 0  # unknown

    def __init__(self, name: str, split: str, field: str):
        """Raises InputError if the package `datasets` is not installed."""
        require("datasets", "data", f"{name} is not a file here; as a Hugging Face dataset it")
        self.name, self.split, self.field = name, split, field

    def pieces(self) -> Iterator[Piece]:
        """Yields the text from the beginning.

        Raises InputError if the dataset cannot be loaded, or for a row without text.
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
            raise InputError(
                f"the dataset {self.name} cannot be read: {first_line(error)}"
            ) from None
        if number < 0:
            raise InputError(f"{self.name} contains no text")


def is_text(text: str) -> bool:
    """True if a string can be encoded in UTF-8; halves of surrogate pairs in JSON cannot."""
    try:
        return text.isascii() or text.encode() is not None
    except UnicodeEncodeError:
        return False


def cut_document(text: str) -> Iterator[Piece]:
    """Yields the pieces of one document."""
    if len(text) < PIECE_CHARS:
        yield Piece(text, True)
    else:
        yield from _cut(io.StringIO(text, newline=""))


def _cut(stream: Any) -> Iterator[Piece]:
    """Yields the pieces of a stream that contains one document."""
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
    """Groups pieces into batches for the tokenizer."""
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
    """Returns each piece's tokens, int32; the end-of-text token follows a document's last piece."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer([p.text for p in batch], add_special_tokens=False, verbose=False)
    return [
        np.asarray(ids + (end if piece.ends_document else []), np.int32)
        for ids, piece in zip(encoded["input_ids"], batch, strict=True)
    ]


class Tokens(NamedTuple):
    """ids, int32 [N], of all documents in sequence; starts, int64 [D], the first of each."""

    ids: np.ndarray
    starts: np.ndarray


def tokenize(
    pieces: Sequence[Piece], tokenizer: "PreTrainedTokenizerBase", show_progress: bool = False
) -> Tokens:
    """Tokenizes documents; the end-of-text token follows each of them."""
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
