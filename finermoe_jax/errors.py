"""The exceptions whose messages users read, and the parts that such messages have in common."""

import difflib
import io
import sys
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Bad input: a config, a file or an argument that cannot be what the user meant.

    The commands print its message alone and end with exit code 2. The message names both
    values that contradict each other and the way out.
    """


class RunEnded(Exception):
    """A run that ends before its work is done, through no mistake in its input.

    The commands print its message and exit with its code. All processes of a run raise it
    together; with `alone`, the others have to be notified.
    """

    def __init__(self, message: str, code: int = 1, alone: bool = False):
        super().__init__(message)
        self.code, self.alone = code, alone


def print_anything() -> None:
    """Lets print write what stdout's encoding does not know: `\\u2192` in place of an arrow."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def first_line(error: BaseException) -> str:
    """Returns the first line of what another library says, without TensorStore's specification."""
    text = str(error).strip() or repr(error)
    return text.splitlines()[0].partition(" [tensorstore_spec")[0]


def near_misses(name: str, known: Iterable[str]) -> str:
    """A `Did you mean …?` sentence for `name`, or all of `known` when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(close) + "?"
    return "Known: " + ", ".join(known) + "."


def refuse_differences(
    what: str, found: dict, stated: dict, way_out: str, here: str = "in the config"
) -> None:
    """Raises InputError with every field that differs between two nested mappings."""
    lines = [
        f"{name}: {old!r} there, {new!r} {here}"
        for name, (old, new) in differences(found, stated).items()
    ]
    if lines:
        raise InputError("\n  ".join([what, *lines]) + f"\n{way_out}")


def differences(found: dict, stated: dict) -> dict[str, list]:
    """Every dotted field that differs between two nested mappings, as [found, stated]."""
    old, new = flattened(found), flattened(stated)
    return {
        name: [old.get(name), new.get(name)]
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }


def flattened(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names; tuples as lists, as JSON has them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
