"""`finermoe params`."""

import math

from finermoe_jax.analysis import paper_tables
from finermoe_jax.analysis.params import published_models, run_model, sharding_table, table
from finermoe_jax.cli.flags import Command, Flags, print_config
from finermoe_jax.errors import InputError
from finermoe_jax.model.decoder import parameter_shapes


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_config()
    flags.add("shardings", False, "show how config.mesh shards every parameter")
    flags.add("paper", False, "compare with the counts in the paper's Tables 1, 2, 4 and 8")
    flags.add(
        "devices",
        0,
        "with --shardings: number of devices (default: product of the mesh sizes, -1 as 1)",
    )


def main(flags: Flags) -> None:
    """Runs the command."""
    if not flags.config_name:
        if flags.shardings:
            raise InputError("--shardings shows the mesh of a config: add --config")
        print(paper_tables.text() if flags.paper else table(published_models()))
        return
    if flags.paper:
        raise InputError("--paper shows the paper's models and --config another one: remove one")
    config = flags.run_config()
    if flags.devices < 0:
        raise InputError(f"--devices={flags.devices} must be at least 1")
    if flags.print_config:
        print_config(config)
        return
    model = run_model(config)
    if flags.shardings:
        print(sharding_table(config, model, flags.devices))
        return
    for path, shape in parameter_shapes(model).items():
        print(
            f"{'/'.join(map(str, path)):<40}{'x'.join(map(str, shape)):>24}{math.prod(shape):>16,}"
        )
    print(table({"this config": model}))


COMMAND = Command("[--paper | --config=FILE [--shardings]]", define, main)
