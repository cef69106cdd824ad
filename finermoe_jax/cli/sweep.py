"""`finermoe sweep`."""

import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from finermoe_jax.cli.flags import Command, Flags
from finermoe_jax.config.parse import find_config
from finermoe_jax.errors import InputError, RunEnded
from finermoe_jax.runtime.preemption import EXIT_CODE, handled
from finermoe_jax.training import sweep
from finermoe_jax.training.compare import compare, draw, table


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_configs()
    flags.add_path("workdir", "new directory; rerun the same command to resume", required=True)
    flags.add("seeds", 3, "runs per config; run n, from 0, sets train.seed and data.seed to n")
    flags.add("list", False, "print which runs are done and which remain, and exit")


def main(flags: Flags) -> None:
    """Runs the command."""
    folder = Path(flags.need("workdir")).absolute()
    if not flags.configs:
        raise InputError("--config is needed, once for each config of the sweep")
    if flags.seeds < 1:
        raise InputError(f"--seeds={flags.seeds} must be at least 1")
    if seeded := [
        each for each in flags.overrides if re.match(r"--?config\.(train|data)\.seed\b", each)
    ]:
        raise InputError(
            f"{seeded[0]}: a sweep sets the seeds itself, 0 to {flags.seeds - 1}; use --seeds"
        )
    found = [(name, find_config(name)[1] or "") for name in flags.configs]
    names = sweep.variant_names(found)
    variants = {
        name: flags.config_of(given) for name, given in zip(names, flags.configs, strict=True)
    }
    runs = sweep.plan(folder, variants, flags.seeds)
    if flags.list:
        print(sweep.status(runs))
        return
    given = dict(zip(names, flags.configs, strict=True))
    known = sweep.every_run(folder, variants, flags.seeds)
    with sweep.claimed(folder, variants):
        for number, run in enumerate(runs, 1):
            if run.done:
                continue
            print(f"run {number} of {len(runs)}: {run.variant}, seed {run.seed}", flush=True)
            seeds = [f"--config.{name}={run.seed}" for name in ("train.seed", "data.seed")]
            _train([f"--config={given[run.variant]}", *flags.overrides, *seeds,
                    f"--workdir={run.workdir}"], run)  # fmt: skip
            sweep.write_summary(folder, sweep.finished(known))
        histories = sweep.finished(known)
        sweep.write_summary(folder, histories)
        groups = compare([run.workdir for run in histories])
        print(table(groups))
        print(draw(groups, folder / "comparison.png"))


def _train(arguments: Sequence[str], run: sweep.SweepRun) -> None:
    """Trains one run in a separate process, which frees its memory at the end."""
    command = [sys.executable, "-m", "finermoe_jax", "train", *arguments]
    # In a separate session, so that Ctrl-C reaches it only through this process.
    with (
        subprocess.Popen(command, start_new_session=True) as child,
        handled((signal.SIGTERM, signal.SIGINT), lambda number, _: child.send_signal(number)),
    ):
        code = child.wait()
    if code == EXIT_CODE:
        raise RunEnded("stopped on request. The same command resumes the sweep.", EXIT_CODE)
    if code or not run.done:
        raise RunEnded(
            f"{run.variant}, seed {run.seed} ended with exit code {code} before its end. "
            f"Mend the cause, and the same command resumes the sweep. Its workdir: {run.workdir}",
            code if code > 0 else 1,
        )


COMMAND = Command("--config=FILE:a --config=FILE:b … [--seeds=N] --workdir=DIR", define, main)
