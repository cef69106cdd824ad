"""Tests every kernel on this GPU, then times kernels, training step, prefill and decoding.

    python benchmarks/kernels/gpu_first_hour.py --minutes=8 [--output=gpu_first_hour.json]
    python benchmarks/kernels/gpu_first_hour.py --smallest     # tiny shapes, on a CPU too

Needs a Hopper GPU (H100, H200) and `pip install -e '.[cuda]'`. The most important jobs run first;
jobs that do not fit in --minutes are listed as omitted. The file has all samples, the device's name
and the versions. Times are medians. Compared programs take turns in one
process.

The jobs run in a second process. After an error, a crash or a hang, a new process does the rest,
without the jobs of a kernel that crashed or hung. Exit codes: 1, a kernel is wrong; 2, another
job failed, or there is no such GPU.
"""

import argparse
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

# Marks a result among the lines that libraries print.
MARK = "first-hour-result "
_ENDED = "the process ended"


def main() -> None:
    """Runs the jobs, prints the tables and writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8, help="time for all jobs together")
    parser.add_argument("--output", default="gpu_first_hour.json", help="file for all figures")
    parser.add_argument("--smallest", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--jobs", nargs="*", help="internal")
    options = parser.parse_args()
    if options.jobs is not None:
        work(options.jobs, options.smallest)
        return
    command = [sys.executable, __file__, *["--smallest"] * options.smallest, "--jobs"]
    deadline = time.monotonic() + 60 * options.minutes
    found, planned = plan(command)
    if not options.smallest and (problem := not_hopper(found)):
        print(problem, file=sys.stderr)
        sys.exit(2)
    print(f"{found['device']}, JAX {found['jax']}, {found['nvidia-smi'] or 'no nvidia-smi'}\n")
    results = {"device": found} | Supervisor(command, deadline).run(planned)
    report(results)
    Path(options.output).write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nAll samples: {options.output}")
    sys.exit(exit_code(results))


def not_hopper(found: dict[str, Any]) -> str:
    """Returns the reason why this device cannot run the kernels; empty if it can."""
    if found["platform"] not in ("gpu", "cuda"):
        advice = "use --smallest to try this script, or install -e '.[cuda]' on a machine with one"
        return f"no GPU: JAX finds {found['device']!r} (platform {found['platform']}): {advice}"
    if not found["compute_capability"].startswith("9."):
        return (
            f"{found['device']} has compute capability {found['compute_capability']}, but the "
            "kernels need 9.0 (H100, H200)"
        )
    return ""


def exit_code(results: dict[str, dict[str, Any]]) -> int:
    """Returns 1 if a kernel is wrong or fails its check, 2 if another job failed, otherwise 0."""
    checks = [figures for name, figures in results.items() if name.startswith("check")]
    if any("error" in figures or figures.get("wrong") for figures in checks):
        return 1
    return 2 if any("error" in figures for figures in results.values()) else 0


# --- the process that computes --------------------------------------------------------------


def work(names: Sequence[str], smallest: bool) -> None:
    """Runs the named jobs and prints a line for each; without names, device and plan."""
    from benchmarks.kernels.gpu_jobs import device, jobs

    every = {job.name: job for job in jobs(smallest)}
    if not names:
        planned = [(job.name, job.kernel, job.minutes) for job in every.values()]
        print(MARK + json.dumps([device(), planned]), flush=True)
    for name in names:
        began = time.monotonic()
        try:
            figures = every[name].run()
        except Exception as error:  # the other jobs go on
            lines = str(error).strip().splitlines() or [""]
            figures = {"error": f"{type(error).__name__}: {lines[0][:300]}"}
        figures["seconds"] = round(time.monotonic() - began, 1)
        print(MARK + json.dumps([name, figures]), flush=True)


def plan(command: Sequence[str]) -> tuple[dict[str, Any], list[tuple[str, str, float]]]:
    """Returns the device, and name, kernel and most minutes of every job."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            found, planned = json.loads(line.removeprefix(MARK))
            return found, [tuple(job) for job in planned]
    sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


# --- the process that waits -----------------------------------------------------------------


class Supervisor:
    """Runs jobs in a second process, which may crash or hang.

    Args:
      command: prints a line of MARK and JSON [name, figures] for each job among its arguments.
      deadline: of time.monotonic(); later jobs are omitted.
    """

    def __init__(self, command: Sequence[str], deadline: float):
        self._command, self._deadline = list(command), deadline
        self._broken: set[str] = set()

    def run(self, planned: Sequence[tuple[str, str, float]]) -> dict[str, dict[str, Any]]:
        """Returns the figures of every job; those of a failed or omitted job say why."""
        results: dict[str, dict[str, Any]] = {}
        rest = list(planned)
        while rest:
            for name, kernel, _ in [job for job in rest if job[1] in self._broken]:
                results[name] = {"omitted": f"{kernel} crashed or hung before"}
            rest = [job for job in rest if job[0] not in results]
            if rest and time.monotonic() >= self._deadline:
                results |= {name: {"omitted": "no time left"} for name, *_ in rest}
            elif rest:
                results |= self._one_process(rest)
            rest = [job for job in rest if job[0] not in results]
        return results

    def _one_process(self, rest: Sequence[tuple[str, str, float]]) -> dict[str, dict[str, Any]]:
        """Returns the figures of the jobs until the process ends, hangs or has no time left."""
        with tempfile.TemporaryFile("w+") as errors:
            command = [*self._command, *(name for name, *_ in rest)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as run:
                lines: queue.Queue[str | None] = queue.Queue()
                pump = threading.Thread(target=_pump, args=(run.stdout, lines))
                pump.start()
                try:
                    results = self._collect(rest, lines)
                finally:
                    run.kill()
                    pump.join()
            errors.seek(0)
            last = "".join(errors.readlines()[-3:]).strip()[-500:]
        for name, figures in results.items():
            if figures.get("error") == _ENDED:
                figures["error"] = f"{_ENDED}: {last}"
            if "seconds" not in figures:
                print(f"{name}: {_outcome(figures)}", flush=True)
        return results

    def _collect(
        self, rest: Sequence[tuple[str, str, float]], lines: "queue.Queue[str | None]"
    ) -> dict[str, dict[str, Any]]:
        results: dict[str, dict[str, Any]] = {}
        for name, kernel, minutes in rest:
            left = self._deadline - time.monotonic()
            try:
                line = lines.get(timeout=max(0.0, min(60 * minutes, left)))
            except queue.Empty:
                results[name] = {"omitted": "no time left"}
                if left > 60 * minutes:
                    results[name] = {"error": f"no result after {minutes:g} minutes"}
            else:
                if line is None:
                    results[name] = {"error": _ENDED}
                else:
                    done, results[name] = json.loads(line)
                    assert done == name, (done, name)
                    print(f"{name}: {_outcome(results[name])}", flush=True)
                    if "error" in results[name]:
                        break  # after a CUDA error, everything in the process fails
                    continue
            if kernel and "error" in results[name]:
                self._broken.add(kernel)
            break
        return results


def _pump(stream: Any, lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        if line.startswith(MARK):
            lines.put(line.removeprefix(MARK))
    lines.put(None)


def _outcome(figures: dict[str, Any]) -> str:
    if reason := figures.get("error") or figures.get("omitted"):
        return f"{'failed' if 'error' in figures else 'omitted'}: {reason}"
    if figures.get("wrong"):
        return f"WRONG: {', '.join(figures['wrong'])}"
    return f"done in {figures['seconds']} s"


# --- tables ---------------------------------------------------------------------------------


def report(results: dict[str, dict[str, Any]]) -> None:
    """Prints the results as Markdown tables."""
    print("\n| check | worst error | limit | |\n|---|---|---|---|")
    for name, figures in results.items():
        if name.startswith("check") and "errors" in figures:
            worst = max(figures["errors"].values())
            verdict = "WRONG" if figures["wrong"] else "right"
            print(f"| {name[6:]} | {worst:.1e} | {figures['tolerance']:.0e} | {verdict} |")
    print(
        "\n| expert_ffn, rows per expert | pass | ms | bound, ms | share of the bound | bound by "
        "| lax.ragged_dot, ms | ratio |\n|---|---|---|---|---|---|---|---|"
    )
    for name, figures in results.items():
        if "passes" in figures:
            for which, limits in figures["passes"].items():
                print(_kernel_row(name, which, limits, figures))
    print(
        "\n| program | tokens | ms | tokens/s | MFU | share of HBM bandwidth |\n"
        "|---|---|---|---|---|---|"
    )
    for name, figures in results.items():
        for program, limits in figures.get("programs", {}).items():
            seconds = statistics.median(figures["samples"][program])
            print(
                f"| {name[5:]}: {program} | {limits['tokens']} | {seconds * 1e3:.2f} "
                f"| {limits['tokens'] / seconds:.0f} | {_share(limits['flops_bound_s'], seconds)} "
                f"| {_share(limits['bytes_bound_s'], seconds)} |"
            )
    for name, figures in results.items():
        if "error" in figures or "omitted" in figures:
            print(f"\n{name}: {_outcome(figures)}")


def _kernel_row(name: str, which: str, limits: dict[str, Any], figures: dict[str, Any]) -> str:
    seconds = statistics.median(figures["samples"][f"expert_ffn {which}"])
    by = {"HBM": limits["bytes_bound_s"], "FLOPs": limits["flops_bound_s"]}
    bound, reason = max((value or 0, key) for key, value in by.items())
    row = [name.removeprefix("time expert_ffn, "), which, f"{seconds * 1e3:.3f}"]
    row += [f"{bound * 1e3:.3f}", _share(bound, seconds), reason] if bound else ["–"] * 3
    rival = figures["samples"].get(f"lax.ragged_dot {which}")
    if rival:
        other = statistics.median(rival)
        row += [f"{other * 1e3:.3f}", f"{other / seconds:.1f}"]
    else:
        row += [figures["failed"].get(f"lax.ragged_dot {which}", ""), "–"]
    return f"| {' | '.join(row)} |"


def _share(bound: float | None, seconds: float) -> str:
    return f"{bound / seconds:.0%}" if bound else "–"


if __name__ == "__main__":
    main()
