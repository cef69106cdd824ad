"""Builds configs from defaults, mappings and config files (presets in configs/, or users' own)."""

import dataclasses
import inspect
import operator
import os
import re
import runpy
import traceback
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from finermoe_jax.config.model import MoEConfig, check_kind, field_kinds
from finermoe_jax.config.run import RunConfig
from finermoe_jax.errors import InputError, differences, near_misses
from finermoe_jax.runtime.files import find
from finermoe_jax.runtime.paths import local


def default_config() -> Any:
    """Returns an ml_collections ConfigDict with every field of RunConfig at its default.

    `moe` holds the published settings; set `config.moe = None` for a dense run. `dense` is None.

    Examples:
      >>> import finermoe_jax as fm
      >>> config = fm.default_config()
      >>> config.init_from = "Qwen/Qwen2.5-0.5B"
      >>> config.data.path = "my_text.jsonl"
      >>> config.moe.intermediate_granularity
      32
    """
    from ml_collections import ConfigDict  # needed for config files only

    config = ConfigDict(
        {
            field.name: dataclasses.asdict(field.default)  # type: ignore[arg-type]
            if dataclasses.is_dataclass(field.default)
            else field.default
            for field in dataclasses.fields(RunConfig)
        },
        type_safe=False,
    )
    config.moe = ConfigDict(dataclasses.asdict(MoEConfig()), type_safe=False)
    return config


def run_config(values: Any) -> RunConfig:
    """Makes a RunConfig from a ConfigDict, such as `preset(NAME)`, or from a nested mapping.

    Args:
      values: fields by name; those omitted get their defaults.

    Returns:
      The validated config.

    Raises:
      InputError: an unknown field (the message suggests similar names), a value of the wrong type
        or out of range, or fields that contradict each other.

    Examples:
      >>> import finermoe_jax as fm
      >>> config = fm.preset("demo")
      >>> config.train.steps = 10
      >>> fm.run_config(config).train.steps
      10
    """
    if hasattr(values, "to_dict"):
        values = values.to_dict()
    if not isinstance(values, Mapping):
        raise InputError(f"config is of type {type(values).__name__}; it must be a mapping")
    return from_dict(RunConfig, _renamed(values), "config")


class Former(NamedTuple):
    """A former field that is still read.

    Attributes:
      now: its present name.
      default: its former default.
      convert: returns the present value of a former one.
    """

    now: str
    default: Any = None
    convert: Callable[[Any], Any] = lambda value: value


def _backbone(frozen: Any) -> tuple[str, ...]:
    check_kind("config.optimizer.freeze_backbone", frozen, (bool,))
    return ("attention", "dense_ffn", "lm_head") if frozen else ()


FORMER = {
    "model": Former("dense"),
    "train.aux_loss_weight": Former("balance.weight", 0.001),
    "optimizer.freeze_backbone": Former("train.freeze", False, _backbone),
}


def _renamed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replaces former fields (FORMER) by their present names.

    Raises InputError if a field is set under both names.
    """
    for old, former in FORMER.items():
        group, _, name = old.rpartition(".")
        if name not in _group(values, group):
            continue
        value = former.convert(_group(values, group)[name])
        now_group, _, now = former.now.rpartition(".")
        default = operator.attrgetter(former.now)(RunConfig(init_from="any"))
        other = _group(values, now_group).get(now, default)
        if differences({now: default}, {now: other}):
            both = ""
            if not isinstance(other, Mapping):
                both = f" ({_group(values, group)[name]!r} and {other!r})"
            raise InputError(
                f"config.{old} is the former name of config.{former.now}, and both are set{both}: "
                f"remove config.{old}"
            )
        values = _with(values, group, {k: v for k, v in _group(values, group).items() if k != name})
        values = _with(values, now_group, {**_group(values, now_group), now: value})
    return values


def _group(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a group of fields, `values` itself without a name; empty if it is none."""
    found = values.get(name) if name else values
    return found if isinstance(found, Mapping) else {}


def _with(values: Mapping[str, Any], name: str, group: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**values, name: group} if name else group


def from_dict(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """Builds dataclass `cls` from nested mappings. Raises InputError, naming the field."""
    kinds = field_kinds(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in kinds:
            raise InputError(f"{where} has no field {key!r}. {near_misses(key, kinds)}")
        kwargs[key] = typed(value, kinds[key], f"{where}.{key}")
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - kwargs.keys()):
        raise InputError(f"{where} lacks {', '.join(missing)}: add the missing fields")
    return cls(**kwargs)


def typed(value: Any, kinds: tuple, where: str) -> Any:
    """Converts `value` to one of these types: ints to floats, lists to tuples.

    Raises InputError for a value of another type, and for numbers that are too large.
    """
    for kind in kinds:
        if dataclasses.is_dataclass(kind) and value is not None:
            if not isinstance(value, Mapping):
                raise InputError(f"{where}={value!r} must be a group of fields")
            return from_dict(kind, value, where)
        if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
            return tuple(typed(item, typing.get_args(kind)[:1], where) for item in value)
        if kind is float and type(value) is int:
            if abs(value) > 2**1000:
                raise InputError(f"{where}={value!r} is too large")
            return float(value)
    if type(value) is int and abs(value) >= 1 << 63:
        raise InputError(f"{where} has {len(str(abs(value)))} digits; it must fit 64 bits")
    check_kind(where, value, kinds)
    return value


# --- config files ---------------------------------------------------------------------------


def preset(name: str) -> Any:
    """Returns the ConfigDict of `--config=NAME`. `run_config` makes a RunConfig from it.

    Args:
      name: a preset ("demo") or a file ("my/run.py"), with or without ":VARIANT".

    Returns:
      A ConfigDict whose fields can be changed.

    Raises:
      InputError: there is no such file, it fails, it has no such variant, or it returns something
        other than a ConfigDict.

    Examples:
      >>> import finermoe_jax as fm
      >>> config = fm.preset("demo:ct")
      >>> config.init_from, config.moe
      ('demo/model', None)
    """
    from ml_collections import ConfigDict  # needed for config files only

    path, variant = find_config(name)
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if not callable(get_config):
            raise InputError("it does not define get_config()")
        _check_variant(get_config, variant)
        config = get_config() if variant is None else get_config(variant)
    except InputError as error:
        raise InputError(f"config file {path}: {error}") from None
    except (Exception, SystemExit) as error:  # a config file may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f" in line {frame.lineno}" for frame in frames if frame.filename == str(path)]
        where = lines[-1] if lines else ""
        raise InputError(
            f"config file {path} failed{where}: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(config, ConfigDict):
        found = "nothing" if config is None else f"a {type(config).__name__}"
        raise InputError(
            f"config file {path}: get_config() returns {found} but must return a ConfigDict: "
            "modify and return finermoe_jax.default_config()"
        )
    values = config.to_dict()
    renamed = _renamed(values)
    return config if renamed is values else ConfigDict(renamed, type_safe=False)


def _check_variant(get_config: Callable[..., Any], variant: str | None) -> None:
    """Raises InputError if a config does not take a variant, or needs one."""
    try:
        inspect.signature(get_config).bind(*([] if variant is None else [variant]))
    except TypeError:
        if variant is None:
            raise InputError('this config needs a variant: add ":NAME" to --config') from None
        raise InputError(
            f'this config has no variants: remove ":{variant}" from --config'
        ) from None


def find_config(name: str) -> tuple[Path, str | None]:
    """Returns the file of `PATH[:VARIANT]` or `PRESET[:VARIANT]`, and the variant or None.

    Paths may contain colons: the longest prefix of `name` that is a file is the path.

    Raises InputError, with near misses and the presets, if there is no such file.
    """
    name = local(name, "--config")
    for end in (len(name), *(i for i in reversed(range(len(name))) if name[i] == ":")):
        path, variant = name[:end], name[end + 1 :] if end < len(name) else None
        if find(path).is_file():
            return find(path), variant
        if "/" not in path and find(f"configs/{path}.py").is_file():
            return find(f"configs/{path}.py"), variant
    path = re.split(r"(?<=\.py):", name)[0] if ".py" in name else name.partition(":")[0]
    raise InputError(_not_found(path))


def _not_found(path: str) -> str:
    """Returns the message for a --config that is neither a file nor a preset."""
    presets = sorted(file.stem for file in find("configs").glob("*.py"))
    folder, listed = os.path.dirname(path), f"Presets: {', '.join(presets)}."
    if folder or path.endswith(".py"):
        message = f"config file {path} does not exist."
    else:
        message = f"--config={path} is neither a preset nor a file."
    known = presets
    if folder:
        known = [os.path.join(folder, file.name) for file in find(folder).glob("*.py")]
    hint = near_misses(path if folder else path.removesuffix(".py"), known)
    return " ".join([message, *([hint] if hint.startswith("Did you mean") else []), listed])
