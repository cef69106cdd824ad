"""`finermoe plot`."""

from pathlib import Path

from finermoe_jax.cli.flags import Command, Flags
from finermoe_jax.errors import InputError
from finermoe_jax.training.plot import draw


def define(flags: Flags) -> None:
    """Defines no flags: the command takes runs."""


def main(flags: Flags) -> None:
    """Runs the command."""
    if len(flags.rest) not in (1, 2):
        raise InputError("a run, or a run and its rival, are needed: finermoe plot RUN [RIVAL]")
    print(*draw(*map(Path, flags.rest)), sep="\n")


COMMAND = Command("RUN [RIVAL]", define, main, rest=True)
