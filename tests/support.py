"""What several tests use."""

import contextlib
import io
import os
import subprocess
import sys

import pytest

from finermoe_jax.cli.main import run


def invoke(name, *arguments):
    """Runs `finermoe NAME …` in this process; returns the exit code."""
    environment = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*sys.argv])  # the command changes it
        try:
            run(name, [str(each) for each in arguments])
        except SystemExit as end:
            return end.code
        finally:
            os.environ.clear()
            os.environ.update(environment)
    return 0


def command(name, *arguments, cwd=None):
    """`invoke`, in a directory, with what it wrote: as subprocess.run would return it."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd or os.getcwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = invoke(name, *arguments)
    return subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), err.getvalue())


def assert_refused(result, *words):
    """Exit code 2 and one message, on stderr alone."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("error: ") == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert [word for word in words if word not in result.stderr] == [], result.stderr
