"""A training run's directory: checks before use, contents and JSON-lines logs."""

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax

from finermoe_jax.config.parse import run_config
from finermoe_jax.config.run import RunConfig
from finermoe_jax.data.tokenizers import kept_files, write_files
from finermoe_jax.errors import InputError, differences, flattened, near_misses
from finermoe_jax.runtime import files
from finermoe_jax.runtime.buckets import BucketPath
from finermoe_jax.runtime.json_files import read_json, read_lines, read_log, to_json
from finermoe_jax.training import goodput
from finermoe_jax.training.storage import (
    Workdir,
    checkpoints_of,
    files_of,
    is_run,
)
from finermoe_jax.weights.checkpoint import newest_checkpoint
from finermoe_jax.weights.integrity import saved_steps, set_aside

# Fields that determine a checkpoint's arrays and cannot change during a run, with reasons.
_FIXED = {
    "dense": "the weights in the checkpoint have these shapes",
    "moe.selection_bias": "balance.kind=bias adds biases to the model; start a new --workdir with "
    "init_from set to this run",
    "moe": "the experts in the checkpoint have these shapes and were trained with this routing",
    "optimizer.name": "the checkpoint contains the other optimizer's state",
    "optimizer.moment_dtype": "the checkpoint's moments have this dtype",
    "train.freeze": "the checkpoint contains moments of the trained parameters only",
    "train.param_dtype": "the checkpoint's weights have this dtype",
}

_PLACES = ("data.path", "data.eval_path")


def claim(workdir: Workdir, config: RunConfig, allow: Sequence[str] = ()) -> dict[str, list]:
    """Checks that a directory can be used for a run with this config. Writes nothing.

    The workdir may be new, contain a run that ended before its first checkpoint, or contain a run
    with the same config. These fields may differ: the mesh, paths of the data (claim_data compares
    the content) and the fields or groups in `allow`, except those in _FIXED.

    Returns {field: [value in the workdir, value in the config]} for the changed fields.

    Raises InputError if the directory contains anything else, a run with another config, or a run
    that has lost its checkpoints.
    """
    known = flattened(dataclasses.asdict(config))
    for name in allow:
        if not any(_within(field, name) for field in known):
            raise InputError(
                f"--allow_changes={name}: the config has no such field. "
                + near_misses(name, {*known, *(field.partition(".")[0] for field in known)})
            )
        for fixed, reason in _FIXED.items():
            if _within(name, fixed):
                raise InputError(f"--allow_changes={name}: this field cannot change: {reason}")
    if not is_run(workdir):
        return {}
    if _ended_before_saving(workdir):
        return {}
    # Through RunConfig, so that fields added since have their defaults.
    here = files_of(workdir)
    began = dataclasses.asdict(run_config(read_json(here / "config.json")))
    changed = {
        name: values
        for name, values in differences(began, dataclasses.asdict(config)).items()
        if not _within(name, "mesh")
    }
    free = _PLACES if (here / "data.json").is_file() else ()
    lines, missing = [], []
    for name, (old, new) in changed.items():
        line = f"{name}: {old!r} in the run, {new!r} in the config"
        if reasons := [why for what, why in _FIXED.items() if _within(name, what)]:
            lines.append(f"{line}; it cannot change: {reasons[0]}")
        elif not any(_within(name, group) for group in (*allow, *free)):
            lines.append(line)
            missing.append(name)
    if lines:
        fix = "Give a new --workdir, or the run's original config"
        if len(missing) == len(lines):
            fix += (
                f"; to resume with the change, add --allow_changes={','.join([*allow, *missing])}"
            )
        raise InputError(
            "\n  ".join([f"{workdir} contains a run with another config:", *lines]) + f"\n{fix}"
        )
    return changed


def _within(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")


def _ended_before_saving(workdir: Workdir) -> bool:
    """Returns True if a run has no checkpoint yet. Raises InputError if it has lost them."""
    steps, here = checkpoints_of(workdir), files_of(workdir)
    if saved_steps(steps) or set_aside(steps):
        return False
    # Steps are logged only after the first save.
    if last := Log(here).last_step():
        raise InputError(
            f"{workdir} has logged {last} steps, but {steps} contains no checkpoint. Restore the "
            "checkpoints, or give a new --workdir; to restart at step 0 here, remove "
            f"{', '.join(file for file in Log.CUT if (here / file).exists())}"
        )
    return True


def fill_workdir(
    workdir: Path, config: RunConfig, tokenizer_files: Path, ends_files: Path | None = None
) -> None:
    """Writes config.json, checkpoints/ and tokenizer/ to the workdir.

    `ends_files` is the directory that defines the end-of-text tokens if tokenizer_files does not.
    """
    if jax.process_index() != 0:
        return
    # In this order: if killed in between, the same command still works (is_run).
    files.make_directory(workdir / "checkpoints")
    files.write(workdir / "config.json", to_json(dataclasses.asdict(config), indent=2) + "\n")
    if tokenizer_files != workdir / "tokenizer":
        # Atomically, and without files of a previous run's tokenizer.
        partial = workdir / ".tokenizer.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write_files(kept_files(tokenizer_files, ends_files), partial)
        shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
        files.commit(partial, workdir / "tokenizer")


def claim_data(workdir: Workdir, identity: dict[str, Any], allow: Sequence[str] = ()) -> None:
    """Checks that a resumed run uses the same data; its path may differ.

    data.path in `allow` lets the training data differ, data.eval_path the held-out data. Raises
    InputError listing the differences between `identity` (data.open_data) and data.json.
    """
    changed = {
        name: values
        for name, values in _data_changes(files_of(workdir), identity).items()
        if not any(_within(_flag(name), group) for group in allow)
    }
    if changed:
        flags = dict.fromkeys([*allow, *map(_flag, changed)])
        lines = [f"{name}: {old!r} in the run, {new!r} now" for name, (old, new) in changed.items()]
        raise InputError(
            "\n  ".join([f"{workdir} contains a run with other data:", *lines])
            + "\nGive the run's original data, or a new --workdir; to resume with the change, add "
            f"--allow_changes={','.join(flags)}"
        )


def record_data(workdir: Workdir, identity: dict[str, Any]) -> None:
    """Writes data.json and logs changes of a resumed run's data, in the first process only."""
    if jax.process_index() != 0:
        return
    newest, here = newest_checkpoint(checkpoints_of(workdir)), files_of(workdir)
    changed = _data_changes(here, identity)
    if newest is not None and changed:
        Log(here).config_changes(
            int(newest.name), {f"data.{name}": values for name, values in changed.items()}
        )
        print(f"the data changes after step {newest.name}: {', '.join(changed)}")
    files.write(here / "data.json", to_json(identity, indent=2) + "\n")


def _data_changes(workdir: Path, identity: dict[str, Any]) -> dict[str, list]:
    """Returns the differences of the data, ignoring paths; empty if no data is recorded."""
    if not (workdir / "data.json").is_file():
        return {}
    try:
        recorded = _content(read_json(workdir / "data.json"))
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(
            f"{workdir / 'data.json'} is damaged ({error!r}): restore it, or remove it to resume "
            "without checking that the data is unchanged"
        ) from None
    return differences(recorded, _content(identity))


def _content(identity: dict[str, Any]) -> dict[str, Any]:
    """Normalises: no paths, sources by number, weights as shares."""
    total = sum(Fraction(source["weight"]) for source in identity["sources"])
    found: dict[str, Any] = {
        f"source {n}": s | {"path": None, "weight": str(Fraction(s["weight"]) / total)}
        for n, s in enumerate(identity["sources"], 1)
    }
    if identity["eval"]:
        found["eval"] = identity["eval"] | {"path": None}
    return found | {"tokenizer_sha256": identity["tokenizer_sha256"]}


def _flag(name: str) -> str:
    """Returns the config field that a part of the data belongs to."""
    return "data.eval_path" if _within(name, "eval") else "data.path"


def resume_hint(workdir: Workdir | BucketPath) -> str:
    """Returns a one-line hint on how to resume this run.

    Of a bucket it reads nothing, since the server may be what ended the run.
    """
    if not isinstance(workdir, Path):
        return f"Resume from the newest complete checkpoint with --workdir={workdir}."
    steps = workdir.absolute() / "checkpoints"
    with contextlib.suppress(OSError):
        files.sync(steps)  # the newest checkpoint may just have been renamed
    newest = newest_checkpoint(steps)
    if newest is None:
        return f"{workdir} contains no complete checkpoint: the run must start again."
    return f"Resume from step {newest.name} with --workdir={workdir}."


class Log:
    """The workdir's JSON-lines files; only the first process writes them."""

    # Files that are truncated to the checkpoint from which a run resumes.
    CUT = ("metrics.jsonl", "expert_load.jsonl", "evals.jsonl", "samples.jsonl")

    def __init__(self, workdir: Path):
        self.workdir = workdir

    def append(self, file: str, values: dict) -> None:
        """Appends a record to one of the files."""
        if jax.process_index() == 0:
            with (self.workdir / file).open("a") as stream:
                stream.write(to_json(values) + "\n")

    def has_evaluation(self, step: int) -> bool:
        """Returns True if the model after this step has been evaluated."""
        evals = read_lines(self.workdir / "evals.jsonl")
        return any(each.get("name") == f"step {step}" for each in evals)

    def config_changes(self, step: int, changes: dict[str, list]) -> None:
        """Records changed fields, {name: [before, after]}, in config_changes.jsonl."""
        if jax.process_index() == 0:
            path = self.workdir / "config_changes.jsonl"
            lines = [*read_lines(path), {"step": step, "changes": changes}]
            files.write(path, "".join(to_json(line) + "\n" for line in lines))

    def cut(self, step: int) -> None:
        """Removes records after `step`, from which the run resumes."""
        if jax.process_index() != 0:
            return
        self._record_lost(step)
        for file in self.CUT:
            path = self.workdir / file
            if path.is_file():
                lines = [line + b"\n" for line, values in read_log(path) if values["step"] <= step]
                files.write(path, b"".join(lines))

    def _record_lost(self, step: int) -> None:
        """Adds the seconds of logged steps after `step` to time.jsonl: they are repeated."""
        lines = read_lines(self.workdir / "metrics.jsonl")
        if lost := [line for line in lines if line["step"] > step]:
            since = max([0, *(line["step"] for line in lines if line["step"] <= step)])
            seconds = sum(goodput.step_seconds(lost, since))
            self.append(goodput.LOG, {"step": step, "kind": goodput.LOST, "seconds": seconds})

    def last_step(self) -> int:
        """Returns the last step in any of the files; 0 without one."""
        logs = [read_lines(self.workdir / file) for file in self.CUT]
        return max((line["step"] for log in logs for line in log), default=0)

    def sync(self) -> dict[str, int]:
        """Fsyncs the files and returns their sizes in bytes."""
        if jax.process_index() != 0:
            return {}
        paths = [self.workdir / file for file in self.CUT if (self.workdir / file).is_file()]
        for path in (*paths, self.workdir):
            files.sync(path)
        return {path.name: path.stat().st_size for path in paths}

    def lost(self, logged: dict[str, int]) -> str:
        """Returns a warning if files are shorter than at the checkpoint's save; else "".

        Call it after `cut`.
        """
        short = []
        for file, size in logged.items() if jax.process_index() == 0 else ():
            path = self.workdir / file
            found = path.stat().st_size if path.is_file() else 0
            if found < size:
                short.append(f"{file} has {found} of {size} bytes")
        return f"WARNING: logs have lost records: {', '.join(short)}" if short else ""
