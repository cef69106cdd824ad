"""Compressed files (.gz, .xz, .zst) as streams of plain bytes."""

import functools
import importlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.install import require

SUFFIXES = (".gz", ".xz", ".zst")
_READ_BYTES, _BUFFER_BYTES = 1 << 16, 1 << 17
# Memory limit; `xz -9` needs 65 MiB.
_XZ_MEMORY = 512 << 20


def decompressed(raw: io.BufferedReader, path: Path) -> io.BufferedReader:
    """Returns the plain bytes of the open file `raw` named `path`; other kinds of files unchanged.

    Reading raises InputError if the file is damaged or truncated, or if a compressed stream is
    followed by anything but another stream or the padding that its format allows.

    Raises InputError if .zst needs a package that is not installed.
    """
    match path.suffix.lower():
        case ".gz":
            form = _Format(_Gzip, zlib.error, 1)
        case ".xz":
            new = functools.partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, _XZ_MEMORY)
            form = _Format(new, lzma.LZMAError, 4)
        case ".zst":
            zstd = zstd_module(path)
            form = _Format(zstd.ZstdDecompressor, zstd.ZstdError, 0)
        case _:
            return raw
    return io.BufferedReader(_Streams(raw, path, form), _BUFFER_BYTES)


def zstd_module(path: Path) -> Any:
    """Returns the standard library's module, or its backport before Python 3.14."""
    if sys.version_info >= (3, 14):
        return importlib.import_module("compression.zstd")
    require("backports.zstd", "data", str(path))
    return importlib.import_module("backports.zstd")


class _Format(NamedTuple):
    """A compression format."""

    new: Callable[[], Any]  # makes a decompressor of one stream
    error: type[Exception]  # that it raises
    padding: int  # zero bytes may follow a stream in multiples of it; 0: none


class _Gzip:
    """zlib's decompressor with the interface of lzma's and zstd's."""

    def __init__(self) -> None:
        self.stream = zlib.decompressobj(wbits=31)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @property
    def needs_input(self) -> bool:
        return not self.stream.unconsumed_tail

    def decompress(self, data: bytes, most: int) -> bytes:
        return self.stream.decompress(self.stream.unconsumed_tail + data, most)


class _Streams(io.RawIOBase):
    """The plain bytes of concatenated compressed streams, with one rule for all formats.

    The standard library's file classes differ: lzma's stops without an error at the first further
    stream that it cannot read.
    """

    def __init__(self, raw: io.BufferedReader, path: Path, form: _Format):
        self.raw, self.path, self.form = raw, path, form
        self.stream, self.given, self.ended = form.new(), b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        try:
            while not data and self._more():
                data = self.stream.decompress(self.given, len(buffer))
        except self.form.error as error:
            raise InputError(f"{self.path} cannot be read: it is damaged: {error}") from None
        buffer[: len(data)] = data
        return len(data)

    def _more(self) -> bool:
        """Prepares the next call of decompress; False at the end of the file."""
        self.given = b""
        if self.stream.eof and not self.ended:
            self.given = self._next_stream()
            self.ended = not self.given
            self.stream = self.form.new()
        elif not self.ended and self.stream.needs_input:
            self.given = self.raw.read(_READ_BYTES)
            if not self.given:
                raise InputError(f"{self.path} cannot be read: it is truncated")
        return not self.ended

    def _next_stream(self) -> bytes:
        """Returns the first bytes after a stream and its padding; empty at the end of the file."""
        zeros, rest = 0, self.stream.unused_data or self.raw.read(_READ_BYTES)
        while rest:
            begin = rest.lstrip(b"\0")
            zeros += len(rest) - len(begin)
            if begin:
                break
            rest = self.raw.read(_READ_BYTES)
        if zeros and (not self.form.padding or zeros % self.form.padding):
            raise InputError(
                f"{self.path} cannot be read: {zeros} zero bytes follow a compressed stream, which "
                f"{self.path.suffix} does not allow"
            )
        return rest.lstrip(b"\0")
