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
# `xz -9` asks for 65 MiB.
_XZ_MEMORY = 512 << 20


def decompressed(raw: io.BufferedReader, path: Path) -> io.BufferedReader:
    """The plain bytes of the open file `raw`, which `path` names; a file of another kind as it is.

    Reading raises InputError where the file is damaged or cut off, and where anything but a further
    stream, or the padding that its format allows, follows a compressed stream.

    Raises InputError when .zst cannot be read for want of a package.
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
    """The standard library's module, or its backport before Python 3.14."""
    if sys.version_info >= (3, 14):
        return importlib.import_module("compression.zstd")
    require("backports.zstd", "data", str(path))
    return importlib.import_module("backports.zstd")


class _Format(NamedTuple):
    """`new` makes a decompressor of one stream, which raises `error`. Zero bytes may follow a
    stream in multiples of `padding`; 0: none may."""

    new: Callable[[], Any]
    error: type[Exception]
    padding: int


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
    """The plain bytes of compressed streams in a row, one rule for all formats.

    The standard library's own files differ: lzma's ends without an error at the first stream after
    another that it cannot read.
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
            self.given = self._behind()
            self.ended = not self.given
            self.stream = self.form.new()
        elif not self.ended and self.stream.needs_input:
            self.given = self.raw.read(_READ_BYTES)
            if not self.given:
                raise InputError(f"{self.path} cannot be read: it is cut off in the middle")
        return not self.ended

    def _behind(self) -> bytes:
        """The first bytes after a stream and its padding; empty at the end of the file."""
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
