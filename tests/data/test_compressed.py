"""Compressed text: every format by one rule, and no damage that is taken for the end."""

import gzip
import io
import lzma
import tracemalloc
from pathlib import Path

import pytest

from finermoe_jax.data.compressed import decompressed, zstd_module
from finermoe_jax.data.text import TextFile
from finermoe_jax.errors import InputError
from finermoe_jax.runtime import json_files

zstd = zstd_module(Path("the tests"))
COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd.compress}
MAGIC = {".gz": 2, ".xz": 12, ".zst": 4}  # bytes of a header in which no bit is free
FIRST, SECOND = b'{"text": "one"}\n' * 50, b'{"text": "two"}\n' * 50


def _documents(path, content):
    path.write_bytes(content)
    return [piece.text for piece in TextFile(path).pieces()]


@pytest.fixture(params=COMPRESS)
def suffix(request):
    return request.param


@pytest.fixture
def streams(suffix):
    return [COMPRESS[suffix](part) for part in (FIRST, SECOND)]


def test_streams_in_a_row_are_one_text(tmp_path, suffix, streams):
    path = tmp_path / f"a.jsonl{suffix}"
    assert _documents(path, b"".join(streams)) == ["one"] * 50 + ["two"] * 50
    empty = COMPRESS[suffix](b"")
    assert _documents(path, empty.join([b"", *streams, b""])) == ["one"] * 50 + ["two"] * 50


@pytest.mark.parametrize("size", [1, 1 << 16, 3_000_000])
def test_the_bytes_are_those_of_the_standard_library(tmp_path, suffix, size):
    content = bytes(range(256)) * (size // 256 + 1)
    packed = COMPRESS[suffix](content[:size]) + COMPRESS[suffix](content)
    with decompressed(io.BufferedReader(io.BytesIO(packed)), tmp_path / f"a{suffix}") as stream:
        assert stream.read() == content[:size] + content and stream.read(1) == b""


@pytest.mark.slow
def test_a_damaged_header_of_a_later_stream_is_no_end(tmp_path, suffix, streams):
    """One bit of it, each in turn."""
    first, second = streams
    for bit in range(8 * MAGIC[suffix]):
        damaged = bytearray(second)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InputError, match=r"a\.jsonl.* cannot be read: it is damaged"):
            _documents(tmp_path / f"a.jsonl{suffix}", first + damaged)


@pytest.mark.parametrize("behind", [b"{", b"garbage" * 99, b"\0" * 8 + b"x"])
def test_garbage_behind_a_stream_is_refused(tmp_path, suffix, streams, behind):
    with pytest.raises(InputError, match="cannot be read"):
        _documents(tmp_path / f"a.jsonl{suffix}", streams[0] + behind)


@pytest.mark.slow
def test_a_file_cut_anywhere_is_refused(tmp_path, suffix, streams):
    first, second = streams
    for size in (0, *range(len(first) + 1, len(first) + len(second))):
        with pytest.raises(InputError, match=r"cannot be read: it is (truncated|damaged)"):
            _documents(tmp_path / f"a.jsonl{suffix}", (first + second)[:size])


@pytest.mark.parametrize(
    ("suffix", "zeros", "allowed"),
    [(".gz", 1, True), (".gz", 512, True), (".xz", 4, True), (".xz", 200_000, True),
     (".xz", 3, False), (".xz", 200_002, False), (".zst", 4, False)],
)  # fmt: skip
def test_padding_as_each_format_allows_it(tmp_path, suffix, zeros, allowed):
    first, second = (COMPRESS[suffix](part) for part in (FIRST, SECOND))
    path, padding = tmp_path / f"a.jsonl{suffix}", b"\0" * zeros
    for content in (first + padding + second, first + second + padding):
        if allowed:
            assert _documents(path, content) == ["one"] * 50 + ["two"] * 50
        else:
            with pytest.raises(InputError, match=rf"{zeros} zero bytes follow"):
                _documents(path, content)
    with pytest.raises(InputError, match="cannot be read"):  # before a stream: none
        _documents(path, padding + first)


@pytest.mark.slow
def test_a_line_of_json_is_bounded_in_memory(tmp_path, suffix, monkeypatch):
    """However much a small file becomes."""
    monkeypatch.setattr(json_files, "LINE_BYTES", 1 << 20)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](b'{"text": "good"}\n{"text": "' + b"a" * (64 << 20)))
    assert path.stat().st_size < 1 << 17
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"line 2 has more than 1,048,576 bytes"):
            list(TextFile(path).pieces())
        # The dictionary of an .xz decoder has 8 MiB.
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_the_longest_line_that_is_read(tmp_path, monkeypatch):
    line = b'{"text": "a"}'
    monkeypatch.setattr(json_files, "LINE_BYTES", len(line))
    assert _documents(tmp_path / "a.jsonl", line) == ["a"]
    with pytest.raises(InputError, match="line 1 has more than 13 bytes"):
        _documents(tmp_path / "a.jsonl", line + b"\n" + line)
