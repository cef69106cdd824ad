"""Runs programs that a model wrote, for benchmarks that score code. Only where the user allows it.

A program runs in a process of its own, in a directory that holds it alone and is removed, without
this process's environment. Limits on memory, processor time and the size of a file hold for each
process that it starts, not for all of them together.

Where the kernel allows it (Linux, mostly outside of containers), it runs in user and process
namespaces of its own. Then it can neither read another process's environment and memory nor send
it a signal, and all that it has started ends with it. Elsewhere it can do the one, and what has
left its session survives. All this stops accidents, not attacks: a program has the user's files
and the network.
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

SECONDS = 3.0  # that a program may run; what the benchmarks' own metric allows
_LIMITED = """
import contextlib, os, resource, runpy, sys
path, done, token = sys.argv[1:]
del sys.argv[1:]
with contextlib.suppress(AttributeError, OSError):
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWPID)
# The first child is process 1 of the namespace, with which all others end; the second goes on.
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
    """Returns whether a Python program reaches its end in time and without an error.

    Its name is not "__main__", so what a script would do besides its tests is left out.
    """
    folder = Path(tempfile.mkdtemp(prefix="finermoe-code-"))
    # Opened now: the program may revoke its own rights, or put a link in place of its folder.
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
    # The exit code alone is no proof: a program may leave before its tests.
    token = secrets.token_hex()
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _LIMITED, str(path), str(done), token],
        cwd=folder,
        env={"PATH": os.defpath},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        # A pipe of that name would be waited for.
        ended = process.wait(seconds) == 0 and done.is_file()
        return ended and done.read_bytes() == token.encode()
    except (subprocess.TimeoutExpired, OSError):
        return False
    finally:
        # What the program has started goes with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _empty(folder: int) -> None:
    """Removes what an open directory holds; what cannot be removed stays.

    Directories inside move up, one by one. A recursion would end at Python's limit, a long path at
    the system's.
    """
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
    """The hub's metric `code_eval`, as far as the harness calls it."""

    def compute(
        self, references: list[str], predictions: list[list[str]], k: list[int]
    ) -> tuple[dict[str, float], dict]:
        """pass@k: the chance that one of k programs, drawn from a task's predictions, passes the
        test in references; the mean over the tasks."""
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
def own_code_eval() -> Iterator[None]:
    """While tasks are loaded: `evaluate.load("code_eval")` gives `CodeEval`.

    The harness's tasks would fetch that metric's source from the hub and run it.

    Raises InputError: a program that does nothing fails, so that all would.
    """
    import evaluate

    if not passes("pass"):
        raise InputError(
            "code cannot be run apart here: a program that does nothing failed "
            f"({sys.executable}, {SECONDS:g} s, a directory in {tempfile.gettempdir()}); leave out "
            "the tasks that run code"
        )

    if passes(f"open('/proc/{os.getpid()}/environ').read()"):
        print(
            "WARNING: this system gives programs no namespaces of their own: those that the model "
            "writes can read the environment of this process and signal it. Leave secrets out of "
            "the environment",
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
