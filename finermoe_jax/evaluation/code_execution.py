"""Runs model-written programs for benchmarks that score code, if the user allows it.

A program runs in a separate process, in a temporary directory, without this process's environment.
Memory, CPU time and file size are limited for each process that it starts.

If the kernel allows it (Linux, mostly outside containers), the program runs in its own user and
process namespaces: it cannot read other processes' environment or memory, nor signal them, and its
children end with it. Otherwise it can, and children that leave its session survive. This prevents
accidents, not attacks: the program can access the user's files and the network.
"""

import contextlib
import math
import os
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finermoe_jax.errors import InputError

SECONDS = 3.0  # time limit of a program, as in the benchmarks' own metric
_RUNNER = """
import contextlib, os, resource, runpy, sys
path, done, token = sys.argv[1:]
del sys.argv[1:]
with contextlib.suppress(AttributeError, OSError):
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWPID)
# The first child is process 1 of the namespace: all others end with it. The second one continues.
for _ in range(2):
    if child := os.fork():
        os._exit(os.waitpid(child, 0)[1] != 0)
for limit, most in ((resource.RLIMIT_AS, 2 << 30), (resource.RLIMIT_FSIZE, 16 << 20),
                    (resource.RLIMIT_CPU, 10), (resource.RLIMIT_CORE, 0)):
    hard = resource.getrlimit(limit)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(limit, (most, most))
runpy.run_path(path, run_name="program")
with open(done, "w") as file:
    file.write(token)
"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Returns True if a Python program ends in time and without an error.

    Its __name__ is not "__main__", so that code under that condition does not run.
    """
    folder = Path(tempfile.mkdtemp(prefix="finermoe-code-"))
    # Opened now: the program may remove permissions or replace its folder by a link.
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return _run(folder, program, seconds)
    finally:
        _empty(opened)
        os.close(opened)
        with contextlib.suppress(OSError):
            folder.rmdir()


def _run(folder: Path, program: str, seconds: float) -> bool:
    path, done = folder / "program.py", folder / "done"
    path.write_text(program, encoding="utf-8", errors="replace")
    # The exit code is not enough: a program may exit before its tests.
    token = secrets.token_hex()
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _RUNNER, str(path), str(done), token],
        cwd=folder,
        env={"PATH": os.defpath},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        # is_file: reading a pipe would block.
        ended = process.wait(seconds) == 0 and done.is_file()
        return ended and done.read_bytes() == token.encode()
    except (subprocess.TimeoutExpired, OSError):
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _empty(folder: int) -> None:
    """Deletes an open directory's content; moves nested directories up to avoid path limits."""
    moved: list[str] = []

    def clear(directory: int) -> None:
        os.fchmod(directory, stat.S_IRWXU)
        for name in os.listdir(directory):
            with contextlib.suppress(OSError):
                if not stat.S_ISDIR(os.lstat(name, dir_fd=directory).st_mode):
                    os.unlink(name, dir_fd=directory)
                    continue
                os.chmod(name, stat.S_IRWXU, dir_fd=directory)
                up = secrets.token_hex()
                os.rename(name, up, src_dir_fd=directory, dst_dir_fd=folder)
                moved.append(up)

    with contextlib.suppress(OSError):
        clear(folder)
    while moved:
        with contextlib.suppress(OSError):
            name = moved.pop()
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            try:
                clear(inner)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=folder)


class CodeEval:
    """The Hub's metric `code_eval`, as far as the harness uses it."""

    def compute(
        self, references: list[str], predictions: list[list[str]], k: list[int]
    ) -> tuple[dict[str, float], dict]:
        """Returns pass@k, averaged over tasks.

        pass@k is the probability that at least one of k programs, drawn from a task's predictions,
        passes its test in references.
        """
        chances: dict[str, list[float]] = {f"pass@{count}": [] for count in k}
        for test, programs in zip(references, predictions, strict=True):
            passed = sum(passes(f"{program}\n{test}\n") for program in programs)
            failed, drawn = len(programs) - passed, len(programs)
            for count in k:
                if count <= drawn:
                    all_fail = math.comb(failed, count) / math.comb(drawn, count)
                    chances[f"pass@{count}"].append(1 - all_fail)
        return {name: sum(all_) / len(all_) for name, all_ in chances.items() if all_}, {}


@contextlib.contextmanager
def local_code_eval() -> Iterator[None]:
    """Makes `evaluate.load("code_eval")` return `CodeEval` while tasks are loaded.

    The original would download the metric's source from the Hub and run it.

    Raises InputError if programs cannot be run here at all.
    """
    import evaluate

    if not passes("pass"):
        raise InputError(
            "programs cannot be run here: an empty one failed "
            f"({sys.executable}, {SECONDS:g} s, a directory in {tempfile.gettempdir()}); omit the "
            "tasks that run code"
        )

    if passes(f"open('/proc/{os.getpid()}/environ').read()"):
        print(
            "WARNING: this system does not allow namespaces, so model-written programs can read "
            "this process's environment and signal it: keep secrets out of the environment",
            file=sys.stderr,
        )
    real = evaluate.load

    def load(name: str, *arguments: Any, **settings: Any) -> Any:
        return CodeEval() if name == "code_eval" else real(name, *arguments, **settings)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = real
