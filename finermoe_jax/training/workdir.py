"""A training run's directory: whose it is, what it holds, its JSON-lines logs."""

import contextlib
import dataclasses
import shutil
import time
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
from finermoe_jax.runtime.json_files import read_json, read_log, to_json
from finermoe_jax.runtime.locks import LOCK_FILE
from finermoe_jax.training import plot
from finermoe_jax.weights.checkpoint import newest_checkpoint
from finermoe_jax.weights.integrity import saved_steps

_PARTIAL = ".config.json.partial"  # of files.write

# What a checkpoint's arrays are: no flag changes it in the middle of a run.
_FIXED = {
    "dense": "the weights in the checkpoint have these shapes",
    "moe": "the experts in the checkpoint have these shapes and were trained with this routing",
    "optimizer.name": "the checkpoint holds the other optimizer's state",
    "optimizer.moment_dtype": "the checkpoint's moments are stored so",
    "optimizer.freeze_backbone": "the checkpoint holds moments of what trains alone",
    "train.param_dtype": "the checkpoint's weights are stored so",
}

_PLACES = ("data.path", "data.eval_path")


def claim(workdir: Path, config: RunConfig, allow: Sequence[str] = ()) -> dict[str, list]:
    """Refuses a directory that holds something else, or a run with another config.

    A run that ended before its first checkpoint holds nothing: any config may take its place. A run
    that has lost its checkpoints is refused.

    The mesh may differ: a run may resume on more devices, or fewer. So may the paths of the data,
    whose content is compared (claim_data), and the fields named in `allow` (dotted, or a whole
    group of them), except those that a checkpoint is made of. Nothing is written.

    Returns the changed fields, each with its value there and in the config.

    Raises InputError.
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
                raise InputError(f"--allow_changes={name}: it cannot change, since {reason}")
    if not workdir.exists():
        return {}
    if not workdir.is_dir():
        raise InputError(f"{workdir} is a file; give a directory as --workdir")
    if not (workdir / "config.json").is_file() or not (workdir / "checkpoints").is_dir():
        if not _unfinished(workdir):
            raise InputError(f"{workdir} is not empty and holds no run; give a new --workdir")
        return {}
    if _ended_before_saving(workdir):
        return {}
    # Through RunConfig, so that a field that is newer than the run has its default.
    began = dataclasses.asdict(run_config(read_json(workdir / "config.json")))
    changed = {
        name: values
        for name, values in differences(began, dataclasses.asdict(config)).items()
        if not _within(name, "mesh")
    }
    free = _PLACES if (workdir / "data.json").is_file() else ()
    lines, missing = [], []
    for name, (old, new) in changed.items():
        line = f"{name}: {old!r} there, {new!r} in the config"
        if reasons := [why for what, why in _FIXED.items() if _within(name, what)]:
            lines.append(f"{line}; it cannot change: {reasons[0]}")
        elif not any(_within(name, group) for group in (*allow, *free)):
            lines.append(line)
            missing.append(name)
    if lines:
        way_out = "give a new --workdir, or the config that the run began with"
        if len(missing) == len(lines):
            way_out += f"; or go on with the change: --allow_changes={','.join([*allow, *missing])}"
        raise InputError(
            "\n  ".join([f"{workdir} holds a run with another config", *lines]) + f"\n{way_out}"
        )
    return changed


def _within(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")


def _unfinished(workdir: Path) -> bool:
    """Returns whether the workdir holds only what a run killed at its very beginning leaves."""
    names = {path.name for path in workdir.iterdir()}
    checkpoints = workdir / "checkpoints"
    return names <= {LOCK_FILE, _PARTIAL, "checkpoints"} and not (
        checkpoints.exists() and any(checkpoints.iterdir())
    )


def _ended_before_saving(workdir: Path) -> bool:
    """Returns whether a run has no checkpoint yet; raises InputError if it has lost those it had.

    No step is logged before the first checkpoint is saved.
    """
    steps = workdir / "checkpoints"
    if saved_steps(steps) or any(steps.glob("damaged-*")):
        return False
    if last := Log(workdir).last_step():
        raise InputError(
            f"{workdir} has logged {last} steps, and {steps} holds no checkpoint. Put the "
            "checkpoints back, or give a new --workdir; to start again at step 0 here, remove "
            f"{', '.join(file for file in Log.CUT if (workdir / file).exists())}"
        )
    return True


def fill_workdir(
    workdir: Path, config: RunConfig, tokenizer_files: Path, ends_files: Path | None = None
) -> None:
    """Fills the workdir: config.json, checkpoints/, and tokenizer/, which a resumed run uses.

    ends_files is the directory that names the ends of text if tokenizer_files does not.
    """
    if jax.process_index() != 0:
        return
    # In this order: after a kill in between, the same command still works (_unfinished).
    files.make_directory(workdir / "checkpoints")
    files.write(workdir / "config.json", to_json(dataclasses.asdict(config), indent=2) + "\n")
    if tokenizer_files != workdir / "tokenizer":
        # Whole, and without files of another tokenizer that a run before this one had.
        partial = workdir / ".tokenizer.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write_files(kept_files(tokenizer_files, ends_files), partial)
        shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
        files.commit(partial, workdir / "tokenizer")


def claim_data(workdir: Path, identity: dict[str, Any], allow: Sequence[str] = ()) -> None:
    """Refuses to resume with other data than the run began with.

    The data may be stored elsewhere. data.path in `allow` lets the training data differ,
    data.eval_path the held-out data. Raises InputError that names the differences between
    `identity` (data.open_data) and data.json.
    """
    changed = {
        name: values
        for name, values in _data_changes(workdir, identity).items()
        if not any(_within(_flag(name), group) for group in allow)
    }
    if changed:
        flags = dict.fromkeys([*allow, *map(_flag, changed)])
        lines = [f"{name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items()]
        raise InputError(
            "\n  ".join([f"{workdir} holds a run with other data", *lines])
            + "\ngive the data that the run began with, or a new --workdir; or go on with the "
            f"change: --allow_changes={','.join(flags)}"
        )


def record_data(workdir: Path, identity: dict[str, Any]) -> None:
    """Writes data.json and logs how a resumed run's data differ; only the first process does."""
    if jax.process_index() != 0:
        return
    newest = newest_checkpoint(workdir.absolute() / "checkpoints")
    changed = _data_changes(workdir, identity)
    if newest is not None and changed:
        Log(workdir).config_changes(
            int(newest.name), {f"data.{name}": values for name, values in changed.items()}
        )
        print(f"from step {newest.name} on, the data is other data: {', '.join(changed)}")
    files.write(workdir / "data.json", to_json(identity, indent=2) + "\n")


def _data_changes(workdir: Path, identity: dict[str, Any]) -> dict[str, list]:
    """The differences of the data, except in its path; empty if no data is recorded."""
    if not (workdir / "data.json").is_file():
        return {}
    try:
        recorded = _content(read_json(workdir / "data.json"))
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(
            f"{workdir / 'data.json'} is damaged ({error!r}): put back a copy of it, or remove it "
            "to resume without comparing the data with what the run began with"
        ) from None
    return differences(recorded, _content(identity))


def _content(identity: dict[str, Any]) -> dict[str, Any]:
    """Without places, sources under their numbers, weights as shares."""
    total = sum(Fraction(source["weight"]) for source in identity["sources"])
    found: dict[str, Any] = {
        f"source {n}": s | {"path": None, "weight": str(Fraction(s["weight"]) / total)}
        for n, s in enumerate(identity["sources"], 1)
    }
    if identity["eval"]:
        found["eval"] = identity["eval"] | {"path": None}
    return found | {"tokenizer_sha256": identity["tokenizer_sha256"]}


def _flag(name: str) -> str:
    """The field of the config that a part of the data belongs to."""
    return "data.eval_path" if _within(name, "eval") else "data.path"


def find_shared(workdir: Path) -> None:
    """Waits until the prepared workdir is seen here too; network file systems may take a while.

    Raises InputError when it is not, since only the first process has prepared it.
    """
    deadline = time.monotonic() + 60
    while not (workdir / "config.json").is_file():
        if time.monotonic() > deadline:
            raise InputError(
                f"process 0 has made {workdir}, but it is not there: --workdir must be one "
                "directory that all processes share"
            )
        time.sleep(0.5)


def way_on(workdir: Path) -> str:
    """One-line hint on how to resume this run."""
    steps = workdir.absolute() / "checkpoints"
    with contextlib.suppress(OSError):
        files.sync(steps)  # the newest one may have got its name just now
    newest = newest_checkpoint(steps)
    if newest is None:
        return f"{workdir} holds no complete checkpoint: the run must begin anew."
    return f"The run can go on from step {newest.name}: --workdir={workdir}."


class Log:
    """The workdir's JSON-lines files; only the first process writes them."""

    # Those that are cut to the checkpoint from which a run resumes.
    CUT = ("metrics.jsonl", "expert_load.jsonl", "evals.jsonl", "samples.jsonl")

    def __init__(self, workdir: Path):
        self.workdir = workdir

    def append(self, file: str, values: dict) -> None:
        """Adds a record to one of the files."""
        if jax.process_index() == 0:
            with (self.workdir / file).open("a") as stream:
                stream.write(to_json(values) + "\n")

    def has_evaluation(self, step: int) -> bool:
        """Returns whether the model after this step has been scored."""
        return any(
            e.get("name") == f"step {step}" for e in plot.read_lines(self.workdir / "evals.jsonl")
        )

    def config_changes(self, step: int, changes: dict[str, list]) -> None:
        """Fields that differ from here on, each as [before, after], into config_changes.jsonl."""
        if jax.process_index() == 0:
            path = self.workdir / "config_changes.jsonl"
            lines = [*plot.read_lines(path), {"step": step, "changes": changes}]
            files.write(path, "".join(to_json(line) + "\n" for line in lines))

    def cut(self, step: int) -> None:
        """Drops what an interrupted run logged after the step that is resumed from."""
        if jax.process_index() != 0:
            return
        for file in self.CUT:
            path = self.workdir / file
            if path.is_file():
                lines = [line + b"\n" for line, values in read_log(path) if values["step"] <= step]
                files.write(path, b"".join(lines))

    def last_step(self) -> int:
        """The last step that any of the files records; 0 if there is none."""
        logs = [read_log(self.workdir / file) for file in self.CUT]
        return max((values["step"] for log in logs for _, values in log), default=0)

    def sync(self) -> dict[str, int]:
        """Returns the bytes of each file, when they are on the disk."""
        if jax.process_index() != 0:
            return {}
        paths = [self.workdir / file for file in self.CUT if (self.workdir / file).is_file()]
        for path in (*paths, self.workdir):
            files.sync(path)
        return {path.name: path.stat().st_size for path in paths}

    def lost(self, logged: dict[str, int]) -> str:
        """A warning where files have fewer bytes than a checkpoint was saved with; else empty.

        To be asked after `cut`.
        """
        short = []
        for file, size in logged.items() if jax.process_index() == 0 else ():
            path = self.workdir / file
            found = path.stat().st_size if path.is_file() else 0
            if found < size:
                short.append(f"{file} has {found} of {size} bytes")
        return f"WARNING: logs were shortened after the save: {', '.join(short)}" if short else ""
