"""Runs programs that a model wrote, for benchmarks that score code. Only where the user allows it.

A program runs in a process of its own with limits on time, memory and what it writes, in an empty
directory that is removed, and without this process's environment. That stops accidents, not
attacks: it has the user's rights and the network.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 3.0  # that a program may run; what the benchmarks' own metric allows
_LIMITED = """
import resource, runpy, sys
for limit, most in ((resource.RLIMIT_AS, 2 << 30), (resource.RLIMIT_FSIZE, 16 << 20),
                    (resource.RLIMIT_CPU, 10), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (most, most))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a Python program ends within the time and without an error."""
    with tempfile.TemporaryDirectory(prefix="finermoe-code-") as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _LIMITED, str(path)],
            cwd=folder,
            env={"PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            # Whatever the program has started goes with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class CodeEval:
    """The hub's metric `code_eval`, as far as the harness calls it."""

    def compute(
        self, references: list[str], predictions: list[list[str]], k: list[int]
    ) -> tuple[dict[str, float], dict]:
        """pass@k: the chance that one of k programs, drawn from a task's predictions, passes the
        test that stands in references; the mean over the tasks."""
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
    """
    import evaluate

    real = evaluate.load

    def load(name: str, *arguments: Any, **settings: Any) -> Any:
        return CodeEval() if name == "code_eval" else real(name, *arguments, **settings)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = real
