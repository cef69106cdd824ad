"""The one exception for mistakes that a user can mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: a config, a file or an argument that cannot be what the user meant.

    The commands print its message alone and end with exit code 2. The message names both
    values that contradict each other and the way out.
    """


class RunEnded(Exception):
    """A run that ends before its work is done, through no mistake in its input.

    The commands print its message and exit with its code. All processes of a run raise it
    together; where `alone`, the others have to be told.
    """

    def __init__(self, message: str, code: int = 1, alone: bool = False):
        super().__init__(message)
        self.code, self.alone = code, alone


def near_misses(name: str, known: Iterable[str]) -> str:
    """A `Did you mean …?` sentence for `name`, or all of `known` when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(close) + "?"
    return "Known: " + ", ".join(known) + "."
