"""`finermoe plot`."""

from pathlib import Path

from finermoe_jax.cli.flags import Command, Flags
from finermoe_jax.errors import InputError
from finermoe_jax.training.plot import draw


def define(flags: Flags) -> None:
    """Defines no flags: the command takes workdirs."""


def main(flags: Flags) -> None:
    """Runs the command."""
    if len(flags.rest) not in (1, 2):
        raise InputError(
            f"{len(flags.rest)} workdirs given: give one, or one and a second to compare with "
            "(finermoe plot RUN [RIVAL])"
        )
    print(*draw(*map(Path, flags.rest)), sep="\n")


COMMAND = Command(
    "RUN [RIVAL]\nRUN and RIVAL are workdirs. The PNG files are written to RUN.",
    define,
    main,
    rest=True,
)
