"""The command line of analysis/params.py."""

import math

from absl import flags

from finermoe_jax.analysis.params import (
    _published,
    parameter_shapes,
    run_model,
    sharding_table,
    table,
)
from finermoe_jax.cli import commands
from finermoe_jax.errors import InputError


def main() -> None:
    """The command."""

    def run() -> None:
        if flags.FLAGS.config is None:
            if flags.FLAGS.shardings:
                raise InputError("--shardings needs --config, whose mesh it is about")
            if flags.FLAGS.paper:
                from finermoe_jax.analysis import paper_tables

                print(paper_tables.text())
                return
            print(table(_published()))
            return
        if flags.FLAGS.paper:
            raise InputError("--paper is about the paper's models; --config=… shows another one")
        config = commands.read_config()
        if flags.FLAGS.devices < 0:
            raise InputError(f"--devices={flags.FLAGS.devices} must be at least 1")
        if flags.FLAGS.print_config:
            commands.print_config(config)
            return
        model = run_model(config)
        if flags.FLAGS.shardings:
            print(sharding_table(config, model, flags.FLAGS.devices))
            return
        for name, shape in parameter_shapes(model).items():
            print(f"{name:<40}{'x'.join(map(str, shape)):>24}{math.prod(shape):>16,}")
        print(table({"this config": model}))

    def define() -> None:
        commands.define_config(None)
        commands.define_flag(
            flags.DEFINE_bool, "shardings", False, "how config.mesh splits every parameter"
        )
        commands.define_flag(
            flags.DEFINE_bool, "paper", False, "the paper's Tables 1, 2, 4 and 8 beside our counts"
        )
        commands.define_flag(
            flags.DEFINE_integer, "devices", 0,
            "with --shardings: devices of the mesh (default: the product of its sizes, -1 as 1)",
        )  # fmt: skip

    commands.run(
        "Parameter counts: python -m finermoe_jax.cli.params [--paper | --config=FILE "
        "[--shardings]]",
        define,
        run,
    )


if __name__ == "__main__":
    main()
