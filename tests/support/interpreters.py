"""Interpreters that can compile for what is not here."""

import importlib.util
import os
import sys

import pytest


def interpreter(variable: str, package: str, extra: str) -> str:
    """A python with the compiler's package: the one that `variable` names, or this one.

    Skips the test where neither is: compilers of half a gigabyte are no dependency of the tests,
    and what they bring along changes what the command line prints. CI names one, so nothing is
    skipped there.
    """
    if python := os.environ.get(variable):
        return python
    if importlib.util.find_spec(package) is None:
        pytest.skip(
            f"needs the extra {extra}, in an environment of its own: name its python in "
            f"{variable}, as .ci/nightly does"
        )
    return sys.executable
