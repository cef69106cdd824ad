"""User-facing exceptions and helpers for their messages."""

import difflib
import io
import sys
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Bad input: a config, file or argument that cannot be what the user meant.

    The message names the values that contradict each other and says what to do. Commands print only
    this message and exit with code 2.

    Examples:
      >>> import finermoe_jax as fm
      >>> try:
      ...     fm.MoEConfig(intermediate_granularity=0)
      ... except fm.InputError as error:
      ...     print(error)
      intermediate_granularity=0 must be at least 1...
    """


class RunEnded(Exception):
    """Ends a run early for a reason other than invalid input.

    The commands print the message and exit with `code`. All processes of the run raise it
    together, unless `alone` is set: then the other processes must be notified.
    """

    def __init__(self, message: str, code: int = 1, alone: bool = False):
        super().__init__(message)
        self.code, self.alone = code, alone


def escape_unencodable() -> None:
    """Makes print escape characters that stdout cannot encode: `\\u2192` for an arrow."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def first_line(error: BaseException) -> str:
    """Returns the first line of a library's error, without TensorStore's spec."""
    text = str(error).strip() or repr(error)
    return text.splitlines()[0].partition(" [tensorstore_spec")[0]


def near_misses(name: str, known: Iterable[str]) -> str:
    """Returns a `Did you mean …?` sentence for `name`, or lists `known` if nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(close) + "?"
    return "Known: " + ", ".join(known) + "."


def refuse_differences(
    what: str, found: dict, stated: dict, way_out: str, here: str = "in the config"
) -> None:
    """Raises InputError listing every field that differs between two nested mappings."""
    lines = [
        f"{name}: {old!r} there, {new!r} {here}"
        for name, (old, new) in differences(found, stated).items()
    ]
    if lines:
        raise InputError("\n  ".join([what, *lines]) + f"\n{way_out}")


def differences(found: dict, stated: dict) -> dict[str, list]:
    """Returns every dotted field that differs between two nested mappings: [found, stated]."""
    old, new = flattened(found), flattened(stated)
    return {
        name: [old.get(name), new.get(name)]
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }


def flattened(values: dict, prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted names; tuples become lists, as in JSON."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
