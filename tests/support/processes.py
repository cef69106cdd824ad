"""Processes that begin as forks of one that has imported everything.

A new interpreter spends five seconds on imports before its first line of ours. A test whose subject
is not the start of a process takes `Process` where it would take subprocess.Popen.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.support.preloaded"])
# JAX reads these when it is imported, which a fork did with the settings of the tests.
_READ_EARLY = {
    "JAX_PLATFORMS": str,
    "JAX_COMPILATION_CACHE_DIR": str,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": float,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": int,
}


class Process:
    """`python SCRIPT …` or `python -m MODULE …` as a fork, by the methods of subprocess.Popen.

    stdout and stderr: open files, or None for texts that `communicate` returns.
    """

    def __init__(self, command, cwd=None, env=None, stdout=None, stderr=None):
        python, *arguments = map(str, command)
        assert python == sys.executable, python
        own = [
            None if given else tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
            for given in (stdout, stderr)
        ]
        out = stdout or own[0]
        err = out if stderr == subprocess.STDOUT else stderr or own[1]
        self._own, self._said = own, None
        # The numbers of open files mean nothing in the process that forks: it opens them again.
        files = [os.path.realpath(f"/proc/self/fd/{file.fileno()}") for file in (out, err)]
        settings = dict(os.environ if env is None else env)
        self._process = _forks.Process(
            target=_run, args=(arguments, str(cwd or os.getcwd()), settings, *files)
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        """As subprocess.Popen's: -N after signal N, None while it runs."""
        return self._process.exitcode

    def poll(self):
        """The exit code, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout=None):
        """The exit code, when it has ended; subprocess.TimeoutExpired where it has not."""
        if not wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired("fork", timeout)
        self._process.join()
        return self._process.exitcode

    def communicate(self, timeout=None):
        """Waits for the end, and returns what it wrote to stdout and stderr."""
        self.wait(timeout)
        if self._said is None:
            self._said = [file and Path(file.name).read_text() for file in self._own]
            for file in filter(None, self._own):
                file.close()
        return tuple(self._said)

    def send_signal(self, number):
        """Nothing happens to a process that has ended."""
        if self._process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self):
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run(command, timeout=600, **settings):
    """Returns for a fork what subprocess.run returns."""
    process = Process(command, **settings)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _run(arguments, cwd, environment, out, err):
    for number, path in enumerate((out, err), start=1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    import jax

    for name, kind in _READ_EARLY.items():
        if name in environment:
            jax.config.update(name.lower(), kind(environment[name]))
    try:
        if arguments[0] == "-m":
            sys.argv = ["-m", *arguments[2:]]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = str(Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out; JAX and Orbax count on them
