"""`finermoe compare`."""

import contextlib

from finermoe_jax.cli.flags import Command, Flags, writable
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.files import write
from finermoe_jax.runtime.json_files import to_json
from finermoe_jax.training.compare import compare, summary, table
from finermoe_jax.training.storage import readable_workdir


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_path("output", "also write all figures and curves as JSON to this file")


def main(flags: Flags) -> None:
    """Runs the command."""
    if not flags.rest:
        raise InputError("runs are needed: finermoe compare RUN RUN …")
    output = writable(flags.output)
    with contextlib.ExitStack() as opened:
        groups = compare([opened.enter_context(readable_workdir(run)) for run in flags.rest])
    print(table(groups))
    if output:
        write(output, to_json(summary(groups), indent=1) + "\n")


COMMAND = Command(
    "RUN RUN … [--output=FILE.json]\nRUN is a workdir, local or gs://bucket/run.",
    define,
    main,
    rest=True,
)
