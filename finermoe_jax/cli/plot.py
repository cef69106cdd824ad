"""`finermoe plot`."""

from pathlib import Path

from finermoe_jax.cli.flags import Command, Flags
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.paths import local
from finermoe_jax.training import compare, goodput, plot


def define(flags: Flags) -> None:
    """Defines no flags: the command takes workdirs."""


def main(flags: Flags) -> None:
    """Runs the command."""
    runs = [Path(local(run)) for run in flags.rest]
    if not runs:
        raise InputError("no workdir given: give a run, or several (finermoe plot RUN [RUN …])")
    if len(runs) < 3:
        print(*plot.draw(*runs), sep="\n")
    if len(runs) == 1:
        if line := goodput.report(runs[0]):
            print(line)
        return
    groups = compare.compare(runs)
    print(compare.table(groups))
    print(compare.draw(groups, runs[0] / "comparison.png"))


COMMAND = Command(
    "RUN [RUN …]\nRUN is a workdir. The PNG files are written to the first one: loss.png, beside a "
    "second run's\nlosses, load.png, and comparison.png of several runs.",
    define,
    main,
    rest=True,
)
