"""Sweeps: runs of several configs with several seeds each, in one folder.

DIR/sweep.json           the config of every variant
DIR/VARIANT/seedN/       the workdir of a run
DIR/summary.json         the final figures of the runs that are done
DIR/comparison.png
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finermoe_jax.config.parse import run_config
from finermoe_jax.config.run import RunConfig
from finermoe_jax.errors import InputError, refuse_differences
from finermoe_jax.runtime import files
from finermoe_jax.runtime.json_files import read_json, read_lines, to_json
from finermoe_jax.runtime.locks import Lock
from finermoe_jax.training.goodput import step_seconds
from finermoe_jax.training.history import HELD_OUT, History, read_history
from finermoe_jax.training.workdir import Log
from finermoe_jax.weights.checkpoint import newest_checkpoint


class SweepRun(NamedTuple):
    """One run of a sweep; `steps` is its number of steps."""

    variant: str
    seed: int
    workdir: Path
    steps: int

    @property
    def step(self) -> int:
        """Step of the newest checkpoint; 0 without one."""
        newest = newest_checkpoint(self.workdir / "checkpoints")
        return int(newest.name) if newest else 0

    @property
    def done(self) -> bool:
        """True if the last step is saved and evaluated."""
        return self.step == self.steps and Log(self.workdir).has_evaluation(self.steps)


def variant_names(configs: Sequence[tuple[str, str]]) -> list[str]:
    """Returns a name for each (config as given, its variant): the variant, or "base" without one.

    Raises InputError if two have one name.
    """
    names: dict[str, str] = {}
    for given, variant in configs:
        name = variant.replace("/", "-") or "base"
        if name in names:
            raise InputError(
                f"--config={names[name]} and --config={given} are both called {name}: give each "
                "variant once, and sweep different files into different folders"
            )
        names[name] = given
    return list(names)


def plan(folder: Path, variants: Mapping[str, RunConfig], seeds: int) -> list[SweepRun]:
    """Returns the runs of a sweep, seed by seed, so that every variant has an early result."""
    return [
        SweepRun(name, seed, folder / name / f"seed{seed}", config.train.steps)
        for seed in range(seeds)
        for name, config in variants.items()
    ]


def every_run(folder: Path, variants: Mapping[str, RunConfig], seeds: int = 0) -> list[SweepRun]:
    """Returns the runs of a sweep, with those of further seeds that the folder holds already."""
    there = [int(path.name.removeprefix("seed")) + 1 for path in folder.glob("*/seed*")]
    return plan(folder, variants, max([seeds, *there]))


@contextlib.contextmanager
def claimed(folder: Path, variants: Mapping[str, RunConfig]) -> Iterator[None]:
    """Locks the folder and records the configs of its variants.

    A sweep can be resumed with more seeds or variants. Raises InputError for variants whose losses
    could not be compared, and if the folder contains another sweep, other files, or a running
    sweep.
    """
    _refuse_other_rows(variants)
    _check(folder, variants)
    files.make_directory(folder)
    with contextlib.closing(Lock(folder, "--workdir")) as lock:
        lock.take()
        configs = {name: dataclasses.asdict(config) for name, config in variants.items()}
        files.write(folder / "sweep.json", to_json(configs, indent=2) + "\n")
        yield


def _refuse_other_rows(variants: Mapping[str, RunConfig]) -> None:
    """Raises InputError if a variant holds out no rows, or other rows than the first one does."""
    first = next(iter(variants), "")
    for name, config in variants.items():
        if not (config.data.eval_fraction or config.data.eval_path):
            raise InputError(
                f"{name} holds out no text, and a sweep compares held-out losses: raise "
                "data.eval_fraction=0, or set data.eval_path"
            )
        share = () if config.data.eval_path else ("eval_fraction",)
        for field in (*HELD_OUT, "eval_path", *share):
            ours, theirs = getattr(config.data, field), getattr(variants[first].data, field)
            if ours != theirs:
                raise InputError(
                    f"held-out losses of {first} and {name} could not be compared: data.{field} is "
                    f"{theirs!r} and {ours!r}. Give both the same value, or sweep them apart"
                )


def _check(folder: Path, variants: Mapping[str, RunConfig]) -> None:
    """Raises InputError unless the folder is new or contains this sweep."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give a directory as --workdir")
    if not (folder / "sweep.json").is_file():
        if any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no sweep; give a new --workdir")
        return
    recorded = read_json(folder / "sweep.json")
    if missing := sorted(recorded.keys() - variants.keys()):
        raise InputError(
            f"{folder} holds a sweep over {', '.join(sorted(recorded))}, and {', '.join(missing)} "
            "is not given: add it, or give a new --workdir"
        )
    for name, values in recorded.items():
        # Through RunConfig, so that fields added since have their defaults.
        refuse_differences(
            f"{folder} holds a sweep with another config of {name}",
            dataclasses.asdict(run_config(values)),
            dataclasses.asdict(variants[name]),
            "give a new --workdir, or the config that the sweep began with",
        )


def finished(runs: Sequence[SweepRun]) -> dict[SweepRun, History]:
    """Returns the histories of the finished runs."""
    return {run: read_history(run.workdir) for run in runs if run.done}


def write_summary(folder: Path, histories: Mapping[SweepRun, History]) -> None:
    """Writes summary.json: {variant: {seed: {held_out_loss, tokens, flops, seconds}}}."""
    summary: dict[str, dict[str, Any]] = {}
    for run, history in histories.items():
        summary.setdefault(run.variant, {})[str(run.seed)] = history.final
    files.write(folder / "summary.json", to_json(summary, indent=2) + "\n")


def status(runs: Sequence[SweepRun]) -> str:
    """Returns one line per run with its step and its hours, taken or remaining, and their sum."""
    rates = {run: rate for run in runs if (rate := _seconds_per_step(run)) is not None}
    lines, left = [], 0.0
    for run in runs:
        step, name = run.step, f"{run.variant} seed {run.seed}".ljust(28)
        if run.done:
            lines.append(f"{name} done in {step * rates[run] / 3600:.2f} h")
            continue
        # The run's own speed, or else its variant's, or else the average.
        like = [r for other, r in rates.items() if other.variant == run.variant]
        rate = rates.get(run) or float(np.mean(like or [*rates.values()] or [np.nan]))
        hours = (run.steps - step) * rate / 3600
        left += hours
        lines.append(f"{name} step {step} of {run.steps}, {_hours(hours)} left")
    took = sum(run.step * rate for run, rate in rates.items()) / 3600
    done = sum(run.done for run in runs)
    lines.append(f"{done} of {len(runs)} runs done in {took:.2f} h, {_hours(left)} left")
    return "\n".join(lines)


def _hours(hours: float) -> str:
    return "unknown time" if np.isnan(hours) else f"{hours:.2f} h"


def _seconds_per_step(run: SweepRun) -> float | None:
    """Returns a run's seconds per step including evaluations and saves; None before the first."""
    lines = read_lines(run.workdir / "metrics.jsonl")
    if not lines:
        return None
    paused = sum(line["pause_seconds"] for line in lines)
    return (sum(step_seconds(lines)) + paused) / lines[-1]["step"]
