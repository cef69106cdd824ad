"""Reads and writes JSON files, JSON lines and logs. Only this module imports json."""

import codecs
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.buckets import Place
from finermoe_jax.runtime.files import refuse_pointer

_FILE_BYTES = 256 << 20  # far above the index of any model
LINE_BYTES = 64 << 20  # parsing needs several times a line's size in memory
_LEVELS = 64  # of nesting: far above real files, below Python's recursion limit


# --- reading --------------------------------------------------------------------------------


def parse_json(text: str | bytes, where: str) -> Any:
    """Parses JSON text (bytes: UTF-8), with or without a byte order mark.

    Raises InputError, naming `where`, for invalid JSON or UTF-8, nesting that is too deep, or an
    integer with more digits than Python converts.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded.removeprefix("\ufeff"))
        if _too_deep(decoded, value):
            raise RecursionError
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 text: {error}"
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if "\n" in decoded.strip() else ""
        reason = f"{error.msg} at {place}column {error.colno}"
    except RecursionError:
        reason = f"it is nested more than {_LEVELS} levels deep"
    except ValueError:  # Python's limit on integer digits
        reason = f"it contains an integer of more than {sys.get_int_max_str_digits()} digits"
    else:
        return value
    raise InputError(f"{where} is not readable as JSON: {reason}")


def _too_deep(text: str, value: Any) -> bool:
    if text.count("[") + text.count("{") <= _LEVELS:
        return False
    level = [value]
    for _ in range(_LEVELS):
        inner = [list(each.values()) if isinstance(each, dict) else each for each in level]
        level = [one for each in inner if isinstance(each, list) for one in each]
        if not level:
            return False
    return True


def read_json(path: Place) -> dict[str, Any]:
    """Reads a JSON object from a file or a bucket. Raises InputError naming the path."""
    try:
        # Reading a pipe may block, and a device may never end.
        if isinstance(path, Path) and not path.is_file() and path.exists():
            raise InputError(f"{path} is not a file")
        if (size := path.stat().st_size) > _FILE_BYTES:
            raise InputError(f"{path} has {size} bytes; JSON files may have {_FILE_BYTES}")
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    try:
        value = parse_json(content, str(path))
    except InputError:
        if isinstance(path, Path):
            refuse_pointer(path)
        raise
    if not isinstance(value, dict):
        raise InputError(f"{path} contains a {type(value).__name__}, not a JSON object")
    return value


def json_rows(stream: io.BufferedReader, path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number from 1, value) for JSON lines; skips blank lines.

    Raises InputError, naming `path` and line, for invalid JSON or a line above LINE_BYTES.
    """
    number = 0
    while line := stream.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise InputError(
                f"{path}, line {number} has more than {LINE_BYTES:,} bytes, the maximum: split its "
                "document, or give it as a .txt file"
            )
        if line.removeprefix(codecs.BOM_UTF8).strip():
            yield number, parse_json(line, f"{path}, line {number}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a run's log (`read_log`)."""
    return [value for _, value in read_log(path)]


def read_log(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Returns a run's log records, raw and parsed: each line that is a JSON object with a step.

    Skips other lines, which a crash may leave, and a last line without a newline. A missing file
    has no records.
    """
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            value = parse_json(line, str(path))
        except InputError:
            continue
        if isinstance(value, dict) and type(value.get("step")) is int:
            found.append((line, value))
    return found


# --- writing --------------------------------------------------------------------------------


def to_json(value: Any, **layout: Any) -> str:
    """Converts a value to JSON. NaN and infinity become null. `layout`: keywords of json.dumps."""
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **layout)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
