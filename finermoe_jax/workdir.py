"""A training run's directory: whose it is, what it holds, its JSON-lines logs."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax

from finermoe_jax import plot
from finermoe_jax.checkpoint import newest_checkpoint
from finermoe_jax.config import RunConfig
from finermoe_jax.errors import InputError
from finermoe_jax.hf_config import read_json
from finermoe_jax.hf_weights import copy_tokenizer


def claim(workdir: Path, config: RunConfig) -> None:
    """Refuses a directory that holds something else, or a run with another config.

    The mesh may differ: a run may go on on more devices, or fewer.
    """
    if not workdir.exists():
        return
    if not workdir.is_dir():
        raise InputError(f"{workdir} is a file; give a directory as --workdir")
    if (workdir / "config.json").is_file() and (workdir / "checkpoints").is_dir():
        refuse_differences(
            f"{workdir} holds a run with another config",
            read_json(workdir / "config.json") | {"mesh": None},
            dataclasses.asdict(config) | {"mesh": None},
            "give a new --workdir, or the config that the run began with",
        )
    elif any(workdir.iterdir()):
        raise InputError(f"{workdir} is not empty and holds no run; give a new --workdir")


def prepare(workdir: Path, config: RunConfig, tokenizer_files: Path) -> None:
    """Makes the workdir: config.json, checkpoints/, and tokenizer/, which a resumed run uses."""
    if jax.process_index() != 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    partial = workdir / ".config.json.partial"
    partial.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    partial.rename(workdir / "config.json")
    (workdir / "checkpoints").mkdir(exist_ok=True)
    (workdir / "tokenizer").mkdir(exist_ok=True)
    if tokenizer_files != workdir / "tokenizer":
        copy_tokenizer(tokenizer_files, workdir / "tokenizer")


def claim_data(workdir: Path, identity: dict[str, Any]) -> None:
    """Refuses to go on with other data than the run began with. Where it lies may differ.

    Raises InputError naming what differs of `identity` (data.open_data) and data.json.
    """
    if (workdir / "data.json").is_file():
        refuse_differences(
            f"{workdir} holds a run with other data",
            _by_number(read_json(workdir / "data.json")),
            _by_number(identity),
            "give the data that the run began with, or a new --workdir",
            here="now",
        )


def record_data(workdir: Path, identity: dict[str, Any]) -> None:
    """Writes data.json, unless it is there; the first process alone."""
    path = workdir / "data.json"
    if jax.process_index() == 0 and not path.is_file():
        partial = workdir / ".data.json.partial"
        partial.write_text(json.dumps(identity, indent=2) + "\n")
        partial.rename(path)


def _by_number(identity: dict[str, Any]) -> dict[str, Any]:
    """With sources under their numbers, and without their paths."""
    sources = identity["sources"]
    if identity["eval"]:
        sources = [*sources, identity["eval"]]
    named = {f"source {n}": s | {"path": None} for n, s in enumerate(sources, 1)}
    return named | {"tokenizer_sha256": identity["tokenizer_sha256"]}


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
    """Where a run that must end now can go on, in a sentence."""
    newest = newest_checkpoint(workdir.absolute() / "checkpoints")
    if newest is None:
        return f"{workdir} holds no complete checkpoint: the run must begin anew."
    return f"The run can go on from step {newest.name}: --workdir={workdir}."


class Log:
    """The workdir's JSON-lines files; only the first process writes them."""

    def __init__(self, workdir: Path):
        self.workdir = workdir

    def _append(self, file: str, values: dict) -> None:
        if jax.process_index() == 0:
            with (self.workdir / file).open("a") as stream:
                stream.write(json.dumps(_finite(values)) + "\n")

    def metrics(self, values: dict) -> None:
        """A logged step, into metrics.jsonl."""
        self._append("metrics.jsonl", values)

    def load(self, values: dict) -> None:
        """What each expert got in a step, into expert_load.jsonl."""
        self._append("expert_load.jsonl", values)

    def evaluation(self, name: str, step: int, loss: float) -> None:
        """A held-out loss, into evals.jsonl."""
        self._append("evals.jsonl", {"name": name, "step": step, "loss": loss})

    def has_evaluation(self, step: int) -> bool:
        """Whether the model after this step has been scored."""
        return any(
            e["name"] == f"step {step}" for e in plot.read_lines(self.workdir / "evals.jsonl")
        )

    def sample(self, name: str, step: int, prompt: str, text: str) -> None:
        """A prompt's continuation, into samples.jsonl."""
        self._append("samples.jsonl", {"name": name, "step": step, "prompt": prompt, "text": text})

    def cut(self, step: int) -> None:
        """Drops what an interrupted run logged after the step that is resumed from."""
        if jax.process_index() != 0:
            return
        for file in ("metrics.jsonl", "expert_load.jsonl", "evals.jsonl", "samples.jsonl"):
            path = self.workdir / file
            if not path.is_file():
                continue
            kept = []
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    continue  # a line cut short by a kill
            partial = path.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            partial.rename(path)


def _finite(values: Any) -> Any:
    """Values that JSON knows: NaN and infinity become null."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def refuse_differences(
    what: str, found: dict, stated: dict, way_out: str, here: str = "in the config"
) -> None:
    """Raises InputError with every field that differs between two nested mappings."""
    old, new = _flatten(found), _flatten(stated)
    differences = [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} {here}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise InputError(what + "\n  " + "\n  ".join(differences) + f"\n{way_out}")


def _flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
