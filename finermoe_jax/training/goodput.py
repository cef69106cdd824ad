"""Goodput: the share of a run's wall time that was spent in steps that count.

metrics.jsonl has the time of the steps, and of waiting for their input. time.jsonl has the rest, of
every process that worked on the run: it is never cut.
"""

from pathlib import Path

import numpy as np

from finermoe_jax.runtime.json_files import read_lines

LOG = "time.jsonl"
STEPS, INPUT, LOST = "steps", "input", "lost"
# In the order of the report. "starting": reading, upcycling, restoring. "lost": steps after the
# checkpoint from which the run was resumed.
KINDS = (STEPS, INPUT, "starting", "compiling", "evaluating", "saving", "profiling", LOST)


def step_seconds(lines: list[dict], since: int = 0) -> tuple[float, float]:
    """Returns the seconds of all steps without their input, and those of the input.

    `lines` are of metrics.jsonl: means over the steps since the line before, the first one's since
    step `since`.
    """
    steps = np.diff([since, *(line["step"] for line in lines)])
    whole, waited = (
        float(steps @ np.array([line.get(name) or 0.0 for line in lines], float))
        for name in ("step_seconds", "input_seconds")
    )
    return whole - waited, waited


def wall_seconds(workdir: Path) -> dict[str, float]:
    """Returns the seconds of a run by kind, over all restarts; empty if it did not record them.

    It lacks what a killed process did after its last record, and the time between processes.
    """
    records, lines = (read_lines(workdir / name) for name in (LOG, "metrics.jsonl"))
    if not records or not lines:
        return {}
    seconds = dict.fromkeys(KINDS, 0.0)
    seconds[STEPS], seconds[INPUT] = step_seconds(lines)
    for record in records:
        if record.get("kind") in KINDS:
            seconds[record["kind"]] += float(record.get("seconds") or 0.0)
    return seconds


def report(workdir: Path) -> str:
    """Returns one line with the goodput and the share of each kind; empty if it is not known."""
    seconds = wall_seconds(workdir)
    total = sum(seconds.values())
    if not total:
        return ""
    shares = [f"{kind} {value / total:.1%}" for kind, value in seconds.items() if value]
    return f"goodput {seconds[STEPS] / total:.1%} of {total:,.0f} s: {', '.join(shares)}"
