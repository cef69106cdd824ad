"""`finermoe similarity`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import flags as absl_flags

from finermoe_jax.analysis.similarity import similarities, table
from finermoe_jax.cli.flags import Command, Flags
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.files import write
from finermoe_jax.runtime.json_files import to_json
from finermoe_jax.runtime.paths import local
from finermoe_jax.training.plot import draw_similarity


def define(flags: Flags) -> None:
    """Defines the flags."""
    text = "also write this .png or .json file; may be repeated"
    flags.add(absl_flags.DEFINE_multi_string, "output", [], text)


def main(flags: Flags) -> None:
    """Runs the command."""
    outputs = [Path(local(output, "--output")) for output in flags.output]
    for output in outputs:
        if output.suffix not in (".png", ".json"):
            raise InputError(f"--output={output} must end in .png or .json")
        if not output.absolute().parent.is_dir():
            raise InputError(
                f"--output={output}: {output.absolute().parent} does not exist; create it first"
            )
    if not flags.rest:
        raise InputError("no checkpoint given: finermoe similarity [LABEL=]CHECKPOINT …")
    found = similarities(labelled(flags.rest))
    print(table(found))
    for output in outputs:
        if output.suffix == ".png":
            draw_similarity({n: (o.layers, o.values) for n, o in found.items()}, output)
        else:
            values = {n: dataclasses.asdict(o) | {"mean": o.mean} for n, o in found.items()}
            write(output, to_json(values, indent=1) + "\n")


def labelled(arguments: Sequence[str]) -> dict[str, str]:
    """Parses [LABEL=]SOURCE arguments to {label: source}. Raises InputError for equal labels."""
    sources: dict[str, str] = {}
    for argument in arguments:
        label, equals, source = argument.partition("=")
        if not equals or Path(local(argument)).exists():
            label, source = Path(argument).name or argument, argument
        source = local(source)
        if not source:
            raise InputError(f"{argument} has no checkpoint after the label; give LABEL=CHECKPOINT")
        if label in sources:
            raise InputError(
                f"{sources[label]} and {source} have the same label {label}; give LABEL=CHECKPOINT"
            )
        sources[label] = source
    return sources


COMMAND = Command(
    "[LABEL=]CHECKPOINT … [--output=FILE.png|.json]\n"
    "CHECKPOINT is a checkpoint, workdir, HF directory or Hub id. LABEL names it in the output.",
    define,
    main,
    rest=True,
)
