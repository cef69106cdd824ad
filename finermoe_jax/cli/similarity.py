"""`finermoe similarity`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finermoe_jax.analysis.similarity import (
    Similarity,
    checkpoints_of,
    similarities,
    steps_table,
    table,
)
from finermoe_jax.cli.flags import Command, Flags, writable
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.buckets import is_url, placed
from finermoe_jax.runtime.files import write
from finermoe_jax.runtime.json_files import to_json
from finermoe_jax.runtime.paths import local
from finermoe_jax.training.plot import draw_similarity

_Curve = tuple[Sequence[int], Sequence[float]]


def define(flags: Flags) -> None:
    """Defines the flags."""
    text = "also write this .png or .json file; may be repeated"
    flags.add("output", (), text)
    flags.add("over_steps", False, "compare every checkpoint in the workdir of one run")


def main(flags: Flags) -> None:
    """Runs the command."""
    outputs = [path for output in flags.output if (path := writable(output))]
    for output in outputs:
        if output.suffix not in (".png", ".json"):
            raise InputError(f"--output={output} must end in .png or .json")
    if not flags.rest:
        raise InputError("no checkpoint given: finermoe similarity [LABEL=]CHECKPOINT …")
    found: Mapping[Any, Similarity]
    curves: dict[str, _Curve]
    if flags.over_steps:
        if len(flags.rest) > 1:
            raise InputError(f"--over_steps takes one workdir, but {len(flags.rest)} are given")
        found = similarities(checkpoints_of(flags.rest[0]))
        print(steps_table(found))
        over, curves = "step", _over_steps(found)
    else:
        found = similarities(labelled(flags.rest))
        print(table(found))
        over, curves = "layer", {n: (o.layers, o.values) for n, o in found.items()}
    for output in outputs:
        if output.suffix == ".png":
            draw_similarity(curves, output, over)
        else:
            values = {n: dataclasses.asdict(o) | {"mean": o.mean} for n, o in found.items()}
            write(output, to_json(values, indent=1) + "\n")


def _over_steps(found: Mapping[int, Similarity]) -> dict[str, _Curve]:
    """Returns the curve of each part of the pairs that the model has."""
    steps, parts = list(found), [one.parts for one in found.values()]
    return {
        name: (steps, [each[name] or 0.0 for each in parts])
        for name, value in parts[0].items()
        if value is not None
    }


def labelled(arguments: Sequence[str]) -> dict[str, str]:
    """Parses [LABEL=]SOURCE arguments to {label: source}. Raises InputError for equal labels."""
    sources: dict[str, str] = {}
    for argument in arguments:
        label, equals, source = argument.partition("=")
        if not equals or is_url(argument) or Path(local(argument)).exists():
            label, source = Path(argument).name or argument, argument
        source = placed(source)
        if not source:
            raise InputError(f"{argument} has no checkpoint after the label; give LABEL=CHECKPOINT")
        if label in sources:
            raise InputError(
                f"{sources[label]} and {source} have the same label {label}; give LABEL=CHECKPOINT"
            )
        sources[label] = source
    return sources


COMMAND = Command(
    "[LABEL=]CHECKPOINT … [--over_steps] [--output=FILE.png|.json]\n"
    "CHECKPOINT is a checkpoint, workdir, HF directory or Hub id. LABEL names it in the output.",
    define,
    main,
    rest=True,
)
