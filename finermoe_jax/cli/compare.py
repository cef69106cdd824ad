"""`finermoe compare`."""

from pathlib import Path

from finermoe_jax.cli.flags import Command, Flags
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.files import write
from finermoe_jax.runtime.json_files import to_json
from finermoe_jax.runtime.paths import local
from finermoe_jax.training.compare import compare, summary, table


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_path("output", "also write all figures and curves as JSON to this file")


def main(flags: Flags) -> None:
    """Runs the command."""
    if not flags.rest:
        raise InputError("runs are needed: finermoe compare RUN RUN …")
    groups = compare([Path(local(run)) for run in flags.rest])
    print(table(groups))
    if flags.output:
        write(Path(flags.output), to_json(summary(groups), indent=1) + "\n")


COMMAND = Command("RUN RUN … [--output=FILE.json]", define, main, rest=True)
