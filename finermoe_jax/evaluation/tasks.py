"""Loads harness tasks by name, with rows from the Hub or from a local directory.

docs/evaluation.md describes the directory's layout. Needs the extra `eval`.
"""

import contextlib
import dataclasses
import functools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager

from finermoe_jax.data.compressed import decompressed
from finermoe_jax.data.text import HALF_PAIR, is_text
from finermoe_jax.errors import InputError, first_line, near_misses
from finermoe_jax.evaluation.code_execution import local_code_eval
from finermoe_jax.runtime.files import refuse_pointer
from finermoe_jax.runtime.json_files import json_rows, to_json

# The paper's ten benchmarks by the harness's names, with the metric that enters the mean: the Open
# LLM Leaderboards' metric if they had the task, else the harness's first.
TEN = {
    "mmlu": "acc",
    "bbh": "exact_match,get-answer",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "agieval": "acc",
    "mbpp": "pass_at_1",
    "gsm8k": "exact_match,strict-match",
    "gpqa_main_zeroshot": "acc_norm",
}
ALL_TEN = "finermoe"
# Their folders in the harness: reading all tasks takes many times as long.
_FOLDERS = (
    "mmlu/default", "bbh/cot_fewshot", "hellaswag", "winogrande", "arc", "agieval", "mbpp", "gsm8k",
    "gpqa/zeroshot",
)  # fmt: skip
_GROUP_FIELDS = {field.name for field in dataclasses.fields(GroupConfig)}


@dataclasses.dataclass(frozen=True)
class Selection:
    """Loaded tasks.

    Attributes:
      objects: the harness's tasks and groups.
      tasks: all tasks in them.
      skipped: names of tasks without local rows.
    """

    objects: list[Any]
    tasks: list[Any]
    skipped: list[str]


def select(
    names: Sequence[str],
    data_dir: Path | None = None,
    *,
    num_fewshot: int | None = None,
    skip_missing: bool = False,
    allow_code_execution: bool = False,
) -> Selection:
    """Loads tasks, groups and tags of the harness, and their rows.

    Args:
      names: the harness's names; "finermoe" stands for the keys of TEN.
      data_dir: directory with local rows; nothing is downloaded. None: the Hub.
      num_fewshot: examples per prompt; None: the task's own number.
      skip_missing: skips tasks that have no rows in data_dir.
      allow_code_execution: allows tasks that run model-written programs.

    Raises:
      InputError: an unknown name, missing or unusable rows, or a task that runs code without
        permission.
    """
    _read.cache_clear()
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"--data_dir={data_dir} is not a directory")
    expanded = [part for name in names for part in (TEN if name == ALL_TEN else [name])]
    wanted = list(dict.fromkeys(expanded))
    manager = _manager(wanted)
    index = manager.task_index
    leaves = {name: _leaves(name, index) for name in wanted}
    unsafe = [x for of in leaves.values() for x in of if (index[x].cfg or {}).get("unsafe_code")]
    if unsafe and not allow_code_execution:
        raise InputError(
            f"--tasks={','.join(names)} includes {', '.join(unsafe)}, which runs model-written "
            "programs on this machine with your permissions. To allow this (best in a container "
            "without network), add --allow_code_execution; otherwise omit the task"
        )
    local: dict[str, dict] | None = None
    missing: dict[str, Path] = {}
    if data_dir is not None:
        local, missing = _find_rows(leaves, index, data_dir, num_fewshot)
        _check_rows(data_dir, names, local, {} if skip_missing else missing)
    objects: list[Any] = []
    with local_code_eval() if unsafe else contextlib.nullcontext():
        for name in wanted:
            random.seed(0)  # loading GPQA shuffles its choices
            objects += _build(name, manager, local)
    _refuse_duplicates(objects)
    built = {one.name if isinstance(one, Group) else one.task_name for one in objects}
    if ALL_TEN in names and not built & TEN.keys():
        raise InputError(
            f"--data_dir={data_dir} contains no rows of the ten benchmarks of {ALL_TEN}: add rows, "
            "or omit that name"
        )
    tasks = [task for one in objects for task in _tasks(one)]
    return Selection(objects, tasks, list(missing))


def _manager(names: Sequence[str]) -> TaskManager:
    """Returns the harness's index of the ten benchmarks, or of all tasks if a name needs it."""
    root = Path(lm_eval.tasks.__file__).parent
    folders: list[str | Path] = [root / folder for folder in _FOLDERS]
    logger = logging.getLogger("lm_eval")
    logger.setLevel(logging.ERROR)  # hides warnings about names that the harness defines twice
    few = TaskManager(include_defaults=False, include_path=folders)
    # A tag may also contain tasks of other folders.
    if all(n in few.task_index and few.task_index[n].kind.name != "TAG" for n in names):
        return few
    every = TaskManager()
    for name in names:
        if name not in every.task_index:
            raise InputError(
                f"--tasks contains {name!r}, which the harness does not have. "
                + near_misses(name, [ALL_TEN, *every.all_tasks])
            )
    return every


def _members(name: str, index: dict) -> list[str] | None:
    """Returns the members of a group or a tag; None for a task."""
    entry = index[name]
    match entry.kind.name:
        case "TAG":
            return sorted(entry.tags)
        case "GROUP":
            return list(_listed(entry.cfg.get("task")))
    return None


def _listed(members: Any) -> Iterator[str]:
    """Yields the names in a group's list; members may be names, settings or inline groups."""
    for member in [members] if isinstance(members, str | dict) else members or []:
        if isinstance(member, str):
            yield member
        elif isinstance(inside := member.get("task"), list):
            yield from _listed(inside)
        elif name := inside or member.get("group"):
            yield name


def _leaves(name: str, index: dict) -> list[str]:
    if name not in index:  # defined inline in its group
        return []
    members = _members(name, index)
    return [name] if members is None else [x for m in members for x in _leaves(m, index)]


def _refuse_duplicates(objects: list[Any]) -> None:
    seen: dict[str, str] = {}
    for one in objects:
        name = one.name if isinstance(one, Group) else one.task_name
        for task in _tasks(one):
            if task.task_name in seen:
                raise InputError(
                    f"--tasks contains {task.task_name} twice, in {seen[task.task_name]} and "
                    f"{name}: omit one"
                )
            seen[task.task_name] = name


def _tasks(one: Any) -> list[Any]:
    return one.get_all_tasks() if isinstance(one, Group) else [one]


# --- building -------------------------------------------------------------------------------


def _build(name: str, manager: TaskManager, local: dict[str, dict] | None) -> list[Any]:
    """Builds the task or group of a name, or a tag's tasks; with local rows, those with rows."""
    if local is None:
        loaded = _harness(name, lambda: manager.load(name))
        groups = loaded.get("groups") or {}
        return [groups[name]] if name in groups else list(loaded["tasks"].values())
    return _with_rows(name, manager, local, {})


def _with_rows(
    name: str, manager: TaskManager, local: dict[str, dict], settings: dict[str, Any]
) -> list[Any]:
    entry = manager.task_index[name]
    members = _members(name, manager.task_index)
    if members is None:
        if name not in local:
            return []
        # Wrapped in a group: only group members may override settings.
        spec = {"group": "local", "task": [{"task": name, **settings, **local[name]}]}
        return list(_harness(name, lambda: manager.load(spec))["tasks"].values())
    config: dict[str, Any] = entry.cfg or {} if entry.kind.name == "GROUP" else {}
    if unknown := [m for m in members if m not in manager.task_index] or [
        m for m in config.get("task") or [] if not isinstance(m, str)
    ]:
        raise InputError(
            f"the harness defines members of {name} inline ({unknown[0]}); with --data_dir name "
            "the tasks themselves"
        )
    settings = settings | {k: v for k, v in config.items() if k not in (*_GROUP_FIELDS, "tag")}
    found = [x for member in members for x in _with_rows(member, manager, local, settings)]
    if entry.kind.name == "TAG" or not found:
        return found
    group = Group.from_config({k: v for k, v in config.items() if k in _GROUP_FIELDS})
    for one in found:
        group.add(one)
    return [group]


def _harness(name: str, load: Callable[[], Any]) -> Any:
    """Calls a loader of the harness and converts its many kinds of errors to InputError."""
    try:
        return load()
    except Exception as error:  # of datasets, the Hub client, jinja, or a task's own code
        raise InputError(
            f"task {name}: its rows cannot be loaded: {type(error).__name__}: "
            f"{first_line(error)}\nWithout a network, give local rows with --data_dir "
            "(docs/evaluation.md)"
        ) from None


# --- local rows -----------------------------------------------------------------------------


def _summary(missing: dict[str, Path]) -> list[str]:
    """Returns one line per folder."""
    folders: dict[Path, list[str]] = {}
    for task, place in missing.items():
        folders.setdefault(place.parent, []).append(f"{task} ({place.name}.jsonl or .jsonl.gz)")
    return [
        f"{folder}: {', '.join(of[:2])}" + (f" and {len(of) - 2} more" if len(of) > 2 else "")
        for folder, of in folders.items()
    ]


def _check_rows(
    data_dir: Path, names: Sequence[str], local: dict[str, dict], missing: dict[str, Path]
) -> None:
    """Raises InputError if required rows, or all rows, are missing."""
    if missing:
        raise InputError(
            "\n  ".join([f"--data_dir={data_dir} has no rows for", *_summary(missing)])
            + "\nAdd them (layout: docs/evaluation.md), or skip these tasks with --skip_missing"
        )
    if not local:
        raise InputError(
            f"--data_dir={data_dir} contains no rows of {', '.join(names)}: see the layout in "
            "docs/evaluation.md"
        )


def _find_rows(
    leaves: dict[str, list[str]], index: dict, data_dir: Path, num_fewshot: int | None
) -> tuple[dict[str, dict], dict[str, Path]]:
    """Returns the settings of tasks with rows, and the expected paths of missing rows."""
    found: dict[str, dict] = {}
    missing: dict[str, Path] = {}
    for leaf in dict.fromkeys(leaf for group in leaves.values() for leaf in group):
        config = index[leaf].cfg or {}
        splits = {key: config.get(key) for key in _SPLITS}
        scored = splits["test_split"] or splits["validation_split"] or "test"
        needed = {scored, _fewshot_split(config, num_fewshot)} - {None}
        rows: dict[str, list[dict]] = {}
        for split in dict.fromkeys([scored, *filter(None, splits.values())]):
            there, place = _rows_of(data_dir, leaf, config, split, split == scored)
            if there is not None:
                rows[split] = there
            elif split in needed:
                missing.setdefault(leaf, place)
        if leaf in missing:
            continue
        # None, so that the harness does not read splits that it does not need.
        absent = {key: None for key, split in splits.items() if split and split not in rows}
        found[leaf] = {"custom_dataset": _dataset(rows)} | absent
    return found, missing


_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")


def examples(stated: int | None, asked: int | None) -> int:
    """Returns the examples per prompt, given the task's number and the user's."""
    return (stated or 0) if asked is None or stated == 0 else asked


def _fewshot_split(config: dict, num_fewshot: int | None) -> str | None:
    """Returns the split with the few-shot examples; None if no rows are needed for them."""
    fewshot = config.get("fewshot_config") or {}
    count = examples(config.get("num_fewshot"), num_fewshot)
    named = fewshot.get("split") or config.get("fewshot_split")
    if not count or (fewshot.get("samples") and not named):
        return None
    order = ("training_split", "validation_split", "test_split")
    return named or next((config[key] for key in order if config.get(key)), None)


def _rows_of(
    data_dir: Path, task: str, config: dict, split: str, scored: bool
) -> tuple[list[dict] | None, Path]:
    """Returns a split's rows, or None, and their expected path without a suffix."""
    place = data_dir / task / split
    rows = _read(place)
    folder, subset = _family(config)
    if rows is None and folder == "mmlu" and subset:
        place = data_dir / folder / split
        rows = [row for row in _read(place) or [] if row.get("subject") == subset] or None
    elif rows is None and folder and subset and scored:
        place = data_dir / folder / subset
        rows = _read(place)
    return rows, place


def _family(config: dict) -> tuple[str, str]:
    """Returns the folder and the name of a subset of MMLU, BBH, AGIEval or GPQA; else empty."""
    path, name = str(config.get("dataset_path")), str(config.get("dataset_name") or "")
    if path.startswith("hails/agieval-"):
        return "agieval", path.removeprefix("hails/agieval-")
    folders = {"cais/mmlu": "mmlu", "SaylorTwift/bbh": "bbh", "Idavidrein/gpqa": "gpqa"}
    return folders.get(path, ""), name


@functools.lru_cache(maxsize=4)  # MMLU's subjects share one file
def _read(path: Path) -> list[dict] | None:
    """Reads the rows of path.jsonl or path.jsonl.gz; returns None if neither exists."""
    plain, packed = (path.with_name(path.name + suffix) for suffix in (".jsonl", ".jsonl.gz"))
    file = plain if plain.is_file() else packed
    if not file.is_file():
        return None
    refuse_pointer(file)
    rows: list[dict] = []
    try:
        with file.open("rb") as raw, decompressed(raw, file) as stream:
            for number, row in json_rows(stream, file):
                if not isinstance(row, dict):
                    raise InputError(f"{file}, line {number} is not a JSON object")
                if not is_text(to_json(row, ensure_ascii=False)):
                    raise InputError(f"{file}, line {number}: {HALF_PAIR}")
                rows.append(row)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    if not rows:
        raise InputError(f"{file} contains no rows")
    return rows


def _dataset(rows: dict[str, list[dict]]) -> Callable[..., Any]:
    """Returns a function that the harness calls to get an in-memory dataset."""
    return lambda **_: datasets.DatasetDict(
        {split: datasets.Dataset.from_list(of_split) for split, of_split in rows.items()}
    )
