"""The held-out losses of a run over tokens, FLOPs and seconds."""

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from finermoe_jax.config.flops import training_flops
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.parse import run_config
from finermoe_jax.config.run import RunConfig
from finermoe_jax.errors import InputError, differences, flattened
from finermoe_jax.runtime.buckets import Place
from finermoe_jax.runtime.json_files import read_json, read_lines
from finermoe_jax.training.plot import DENSE_BASE
from finermoe_jax.training.storage import Workdir, checkpoints_of, files_of, readable_workdir
from finermoe_jax.weights.checkpoint import newest_checkpoint, read_description
from finermoe_jax.weights.model_card import TrainingRun

SEEDS = ("train.seed", "data.seed")
# Fields of DataConfig that decide, beside the text, which rows are scored.
HELD_OUT = ("sequence_length", "packing", "eval_windows")


@dataclasses.dataclass(frozen=True)
class History:
    """The held-out losses of one run.

    Attributes:
      name: the run's workdir as it was given, a path or URL.
      workdir: the local directory with the run's files.
      config: the run's config.
      held_out: identifies the tokenizer and the held-out rows; if it differs, losses cannot be
        compared.
      steps: steps of the evaluations, ascending.
      loss: held-out losses at these steps, nats per token.
      tokens: training tokens up to each, without padding.
      flops: model FLOPs up to each (config/flops.py).
      seconds: time of the steps up to each, without compilation, evaluations and saves.
    """

    name: str
    workdir: Path
    config: RunConfig
    held_out: dict[str, Any]
    steps: Int[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]
    tokens: Float[np.ndarray, " n"]
    flops: Float[np.ndarray, " n"]
    seconds: Float[np.ndarray, " n"]

    @property
    def final(self) -> dict[str, float]:
        """The last score, as summary.json has it."""
        return {
            "held_out_loss": float(self.loss[-1]),
            "tokens": float(self.tokens[-1]),
            "flops": float(self.flops[-1]),
            "seconds": float(self.seconds[-1]),
        }

    @property
    def setting(self) -> dict[str, Any]:
        """All fields of the config but the seeds."""
        fields = flattened(dataclasses.asdict(self.config))
        return {name: value for name, value in fields.items() if name not in SEEDS}


def read_history(place: Workdir) -> History:
    """Reads a workdir's logs. Raises InputError if it has no run or no held-out losses."""
    workdir = files_of(place)
    if not (workdir / "config.json").is_file():
        raise InputError(f"{workdir} holds no config.json: it is not the workdir of a run")
    config = run_config(read_json(workdir / "config.json"))
    try:
        evals = read_lines(workdir / "evals.jsonl")
        scores = {e["step"]: float(e["loss"]) for e in evals if e["name"] != DENSE_BASE}
        steps, tokens_by, seconds_by = _spent(workdir)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{workdir}: metrics.jsonl or evals.jsonl has a record that is not a training run's "
            f"({error!r}): remove that line"
        ) from None
    if not scores:
        raise InputError(
            f"{workdir} has no held-out loss in evals.jsonl: train with data.eval_fraction or "
            "data.eval_path"
        )
    scored = np.array(sorted(scores))
    tokens, seconds = (np.interp(scored, steps, by_step) for by_step in (tokens_by, seconds_by))
    per_token = training_flops(
        _model(place, config), config.data.sequence_length, config.train.freeze
    )
    losses = np.array([scores[step] for step in scored])
    flops, held_out = tokens * per_token, _held_out(workdir, config)
    return History(str(place), workdir, config, held_out, scored, losses, tokens, flops, seconds)


def _spent(workdir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the logged steps, from 0, and the training tokens and seconds up to each.

    Raises KeyError, TypeError or ValueError for a record that is not a training run's.
    """
    lines = read_lines(workdir / "metrics.jsonl")
    steps = np.array([0, *(line["step"] for line in lines)])
    lasted = np.diff(steps) * np.array([line["step_seconds"] for line in lines], float)
    speeds = np.array([line["tokens_per_second"] for line in lines], float)
    tokens, seconds = (
        np.concatenate([[0.0], np.cumsum(values)]) for values in (lasted * speeds, lasted)
    )
    return steps, tokens, seconds


def training_run(checkpoint: Place) -> TrainingRun | None:
    """Returns the run that saved a checkpoint; None if the checkpoint is not in a workdir.

    Figures that the workdir's logs do not have are omitted. Raises InputError for a damaged config.
    """
    place, number = checkpoint.parent.parent, checkpoint.name
    steps_folder = checkpoint.parent.name == "checkpoints" and number.isdecimal()
    if not steps_folder or not (place / "config.json").is_file():
        return None
    with readable_workdir(place) as opened:
        return _training_run(files_of(opened), int(number))


def _training_run(workdir: Path, step: int) -> TrainingRun:
    config = run_config(read_json(workdir / "config.json"))
    losses = {
        line["step"]: float(line["loss"])
        for line in read_lines(workdir / "evals.jsonl")
        if line.get("name") != DENSE_BASE and type(line.get("loss")) in (int, float)
    }
    tokens = None
    with contextlib.suppress(KeyError, TypeError, ValueError):
        steps, by_step, _ = _spent(workdir)
        if steps[-1] >= step:
            tokens = round(float(np.interp(step, steps, by_step)))
    held_out = {at: loss for at, loss in losses.items() if at <= step}
    return TrainingRun(config, step, tokens, held_out)


def _model(workdir: Workdir, config: RunConfig) -> ModelConfig:
    """Returns the config of the model that the run trains."""
    if newest := newest_checkpoint(checkpoints_of(workdir)):
        return read_description(newest)[0]
    if config.dense is None:
        raise InputError(f"{workdir} holds no checkpoint, which would give the model's FLOPs")
    return dataclasses.replace(config.dense, moe=config.moe)


def _held_out(workdir: Path, config: RunConfig) -> dict[str, Any]:
    """Returns everything that held-out losses depend on."""
    found = {f"data.{name}": getattr(config.data, name) for name in HELD_OUT}
    if not (workdir / "data.json").is_file():
        return found
    data = read_json(workdir / "data.json")
    found["tokenizer"] = data.get("tokenizer_sha256")
    if data.get("eval"):
        return found | {"data.eval_path": data["eval"] | {"path": None}}
    sources = [source | {"path": None} for source in data.get("sources", [])]
    return found | {"data.eval_fraction": config.data.eval_fraction, "data.path": sources}


def refuse_incomparable(histories: Sequence[History]) -> None:
    """Raises InputError if two runs have different tokenizers or held-out text."""
    first = histories[0]
    for other in histories[1:]:
        if changed := differences(first.held_out, other.held_out):
            name, (ours, theirs) = next(iter(changed.items()))
            raise InputError(
                f"the losses of {first.name} and {other.name} cannot be compared: {name} is "
                f"{ours!r} there and {theirs!r} here. Use one tokenizer for both, and score both "
                "on one held-out text (data.eval_path)"
            )


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only in their seeds."""

    name: str
    runs: tuple[History, ...]

    def finals(self, quantity: str) -> Float[np.ndarray, " runs"]:
        """The last values of `held_out_loss`, `tokens`, `flops` or `seconds`."""
        return np.array([run.final[quantity] for run in self.runs])


def group_by_seed(histories: Sequence[History]) -> list[Group]:
    """Groups runs whose configs differ only in seeds, in the order of their first runs.

    A group of several runs in one folder is named after the folder; a single run after itself.
    """
    groups: list[list[History]] = []
    for history in histories:
        for group in groups:
            if group[0].setting == history.setting:
                group.append(history)
                break
        else:
            groups.append([history])
    names = shortest_ends([_place(group) for group in groups])
    return [Group(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def _place(group: list[History]) -> Path:
    """Returns the path that names a group: its run, or its runs' common folder."""
    path = group[0].workdir.absolute()
    together = len(group) > 1 and len({run.workdir.absolute().parent for run in group}) == 1
    return path.parent if together or re.fullmatch(r"seed\d+", path.name) else path


def shortest_ends(paths: Sequence[Path]) -> list[str]:
    """Shortens paths to as few last parts as keep them distinct."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def setting_differences(groups: Sequence[Group]) -> dict[str, list]:
    """Returns the fields that are not the same in all groups, each with its value in every group.

    A dense run has no fields of `moe`: its value is None there, and `moe` itself is listed.
    """
    settings = [group.runs[0].setting for group in groups]
    fields = dict.fromkeys(name for setting in settings for name in setting)
    found = {}
    for name in fields:
        values = [setting[name] for setting in settings if name in setting]
        inside = any(field.startswith(f"{name}.") for field in fields)
        if inside or any(value != values[0] for value in values):
            found[name] = [setting.get(name, "…" if inside else None) for setting in settings]
    return found
