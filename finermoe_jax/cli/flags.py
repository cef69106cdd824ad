"""A command's flags: definition, --help and parsing.

Each command has its own FlagValues, so that two commands can run in one process.
"""

import dataclasses
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from absl.flags import FlagValues
from ml_collections import ConfigDict, config_flags

from finermoe_jax.config.parse import FORMER, default_config, find_config, preset, run_config
from finermoe_jax.config.run import RunConfig
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.buckets import placed
from finermoe_jax.runtime.json_files import to_json
from finermoe_jax.runtime.paths import local, local_list

_HELP = ("-h", "--h", "-help", "--help", "--helpfull", "--helpshort")
_TEXT_AT = 26  # first column of the help texts
_CONFIG_HELP = (
    "preset (demo) or FILE.py, optionally with :VARIANT; --config.FIELD=VALUE sets a field"
)

_DEFINE: dict[type, Callable[..., Any]] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    list: flags.DEFINE_list,
    tuple: flags.DEFINE_multi_string,
}


class Flags:
    """The flags of one command, in the order of --help.

    Attributes:
      values: absl's flag values by name; `values[name].present` is nonzero if the flag was given.
      rest: positional arguments.
      config_name: the config's file and variant, as in a file name; empty without a config.
      configs: the values of --config if it may be given several times (add_configs).
      overrides: --config.FIELD=VALUE arguments, which apply to each of them.
    """

    def __init__(self) -> None:
        self.values = FlagValues()
        self.rest: list[str] = []
        self.config_name = ""
        self.configs: list[str] = []
        self.overrides: list[str] = []
        self._required: list[str] = []

    def add(self, name: str, default: Any, text: str, required: bool = False) -> None:
        """Defines a flag of the default's type; a type as the default: not set unless given.

        The values of a list are separated by commas, those of a tuple are given one by one.
        """
        assert not hasattr(type(self), name), name
        kind, default = (default, None) if isinstance(default, type) else (type(default), default)
        _DEFINE[kind](name, default, text, flag_values=self.values)
        if required:
            self._required.append(name)

    def add_path(
        self,
        name: str,
        text: str,
        required: bool = False,
        several: bool = False,
        buckets: bool = False,
    ) -> None:
        """Defines a flag for a path or Hub id, or a comma-separated list of them.

        `buckets`: gs:// URLs are allowed.
        """
        parser = _PathParser(placed if buckets else local_list if several else local)
        flags.DEFINE(parser, name, "", text, flag_values=self.values)
        if required:
            self._required.append(name)

    def add_checkpoint(self) -> None:
        """Defines --checkpoint, the model to read."""
        text = "checkpoint, workdir or HF directory (local or gs://), or Hub id"
        self.add_path("checkpoint", text, required=True, buckets=True)

    def add_config(self, default: str | None = None, required: bool = False) -> None:
        """Defines --config and --print_config, and reads the config file.

        values.config is None without --config and default. Removes --config from sys.argv, where
        ml_collections looks for overrides (--config.FIELD=VALUE).
        """
        given = _take_configs(self.values)
        name = given[-1] if given else None if wants_help() else default
        text = _CONFIG_HELP + (f" (default: {default})" if default else "")
        if name is None:
            self.add("config", str, text)
        else:
            config = preset(name)
            _add_former(config, sys.argv)
            config_flags.DEFINE_config_dict("config", config, text, flag_values=self.values)
            file, variant = find_config(name)
            stem = f"{file.stem}-{variant}" if variant else file.stem
            self.config_name = re.sub(r"[:/]", "-", stem)
        if required:
            self._required.append("config")
        self.add("print_config", False, "print the resolved config and exit")

    def add_configs(self) -> None:
        """Defines --config, given once or several times, with overrides that apply to each."""
        self.configs = _take_configs(self.values)
        self.overrides = [each for each in sys.argv if re.match(r"--?config\.", each)]
        sys.argv = [each for each in sys.argv if each not in self.overrides]
        self.add("config", str, f"{_CONFIG_HELP}; may be given several times")
        self._required.append("config")

    def config_of(self, name: str) -> RunConfig:
        """Returns one of `configs` with the overrides, checked."""
        one, given = Flags(), sys.argv
        sys.argv = [given[0], f"--config={name}", *self.overrides]
        try:
            one.read(lambda flags: flags.add_config())
        finally:
            sys.argv = given
        return one.run_config()

    # --- parsing ----------------------------------------------------------------------------

    def read(self, define: Callable[["Flags"], None]) -> bool:
        """Defines a command's flags and parses sys.argv; returns False if it asks for help.

        Raises InputError for an unknown flag or an invalid value.
        """
        try:
            define(self)
            if not wants_help():
                self.rest = self.values(sys.argv)[1:]
        except InputError:
            raise
        except Exception as error:  # absl and ml_collections raise many unrelated types
            raise InputError(_flag_message(error)) from None
        return not wants_help()

    def __getattr__(self, name: str) -> Any:
        """Returns a flag's value."""
        return getattr(self.values, name)

    def given(self, name: str) -> bool:
        """Returns True if a flag is on the command line."""
        return bool(self.values[name].present)

    def need(self, name: str) -> Any:
        """Returns a required flag's value. Raises InputError if it is empty."""
        value = self.values[name].value
        if value in (None, ""):
            raise InputError(f"--{name} is required; see --help")
        return value

    def run_config(self) -> RunConfig:
        """Returns the checked config with its overrides."""
        return run_config(self.values.config.to_dict())

    def help(self) -> str:
        """Returns the flags' part of --help: required flags first, defaults shown."""
        known = [name for name in self.values if name not in ("flagfile", "undefok")]
        optional = [name for name in known if name not in self._required]
        parts = [("Required:", self._required), ("Optional:", optional)]
        return "\n".join(
            "\n".join([title, *(self._line(name) for name in names)])
            for title, names in parts
            if names
        )

    def _line(self, name: str) -> str:
        flag = self.values[name]
        text = re.sub(r";\s+repeat this option.*", "", flag.help or "", flags=re.S)  # absl's text
        if flag.default not in (None, "", []) and "default:" not in text and name != "config":
            text += f" (default: {str(flag.default).lower() if flag.boolean else flag.default})"
        left = f"  --{name}".ljust(_TEXT_AT - 2) + "  "
        return textwrap.fill(
            left + text, 100, subsequent_indent=" " * _TEXT_AT, break_on_hyphens=False
        )


class Command(NamedTuple):
    """A command. `usage` follows its name in --help; `rest` allows positional arguments."""

    usage: str
    define: Callable[[Flags], None]
    main: Callable[[Flags], int | None]
    rest: bool = False


class _PathParser(flags.ArgumentParser):
    """Parses a flag's value with `local`, `local_list` or `placed`."""

    def __init__(self, read: Callable[[str], str]):
        self.read = read

    def parse(self, argument: str) -> str:
        """Returns the path. Raises InputError, a ValueError, for a URL."""
        return self.read(argument)


def wants_help() -> bool:
    """Returns True if the command line asks for help."""
    return any(each in _HELP for each in sys.argv)


def writable(output: str, flag: str = "--output") -> Path | None:
    """Returns the file that a flag names, if any. Raises InputError if it cannot be created."""
    if not output:
        return None
    path = Path(local(output, flag))
    if not path.absolute().parent.is_dir():
        raise InputError(f"{flag}={output}: its directory does not exist; create it first")
    if path.is_dir():
        raise InputError(f"{flag}={output} is a directory; name a file in it")
    return path


def print_config(config: RunConfig) -> None:
    """Prints the resolved config as JSON."""
    print(to_json(dataclasses.asdict(config), indent=2))


def _flag_message(error: Exception) -> str:
    """Returns a flag error on one line, without ml_collections' tracebacks and nested quotes."""
    message = str(error)
    if miss := re.search(r'Did you mean \W*"(\w+)\W*" instead of \W*"(\w+)', message):
        return f"--config has no field {miss[2]!r}. Did you mean {miss[1]!r}?"
    if none := re.search(
        r'Override ([\w.]+) can not be applied because field "(\w+)" is None', message
    ):
        return f"--config.{none[1]}: config.{none[2]} is None and has no fields; remove this flag"
    if group := re.search(r"flag --([\w.]+)=(.*?): Failed to parse .* as a ConfigDict", message):
        return f"--{group[1]}={group[2]}: this is a group of fields; set one, as --{group[1]}.FIELD"
    if isinstance(error, (KeyError, AttributeError)):
        name = message.strip("\"'\\")
        return f"--config has no field {name!r}; --print_config lists the fields"
    return " ".join(message.replace("\\n", " ").split())


def _add_former(config: ConfigDict, arguments: list[str]) -> None:
    """Adds the former fields that the arguments override, for run_config to rename."""
    for name, former in FORMER.items():
        group, _, field = name.rpartition(".")
        override = re.compile(rf"--?(no)?config\.{re.escape(name)}(=|$)")
        if group and field not in config[group] and any(map(override.match, arguments)):
            if any(
                re.match(rf"--?config\.{re.escape(former.now)}(=|$)", each) for each in arguments
            ):
                raise InputError(
                    f"--config.{name} is the former name of --config.{former.now}, which is also "
                    f"given: remove --config.{name}"
                )
            with config.unlocked():
                config[group][field] = former.default
                # The argument overrides the file, even if the file uses the present name.
                now_group, _, now = former.now.rpartition(".")
                config[now_group][now] = default_config()[now_group][now]


def _take_configs(values: FlagValues) -> list[str]:
    """Removes every `--config=NAME` and `--config NAME` from sys.argv; returns the values."""
    given: list[str] = []
    rest = []
    arguments = iter(values.read_flags_from_files(sys.argv))
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config"):
            # The former name of config.dense is config.model.
            rest.append(re.sub(r"^(--?config\.)model\b", r"\1dense", argument))
        elif name := value if equals else next(arguments, ""):
            given.append(name)
        else:
            raise InputError("--config has no value: give a preset, such as demo, or a config file")
    sys.argv = rest
    return given
