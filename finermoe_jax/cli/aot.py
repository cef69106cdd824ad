"""The command line of analysis/aot.py."""

from pathlib import Path

from absl import flags

from finermoe_jax.analysis import candidates, report
from finermoe_jax.analysis.aot import compile_step, prepare
from finermoe_jax.analysis.topology import describe
from finermoe_jax.cli import commands
from finermoe_jax.errors import InputError
from finermoe_jax.runtime import files
from finermoe_jax.runtime.json_files import to_json


def _writable(flag: str) -> Path | None:
    """The file that a flag names; None without it. Raises InputError without its directory."""
    value = flags.FLAGS[flag].value
    if not value:
        return None
    path = Path(value).absolute()
    if not path.parent.is_dir():
        raise InputError(f"--{flag}={path}: its directory does not exist")
    return path


def main() -> None:
    """The command."""

    def define() -> None:
        commands.define_config(None)
        flag = commands.define_flag
        flag(flags.DEFINE_string, "topology", "", "v5e:16x16, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4 "
             "(chips), h100:8 (GPUs)")  # fmt: skip
        flag(flags.DEFINE_integer, "num_slices", 1, "TPU slices of that shape; data parallelism "
             "goes over them")  # fmt: skip
        flag(flags.DEFINE_bool, "suggest", False, "where it does not fit, compile the changes that "
             "may help until one fits; without it, count their state and gradients")  # fmt: skip
        commands.define_path("output", "also write all figures as JSON to this file")
        commands.define_path("hlo", "also write the compiled program to this file")

    status = 0

    def run() -> None:
        nonlocal status
        if flags.FLAGS.config is None:
            raise InputError("--config is needed; see --help")
        config = commands.read_config()
        if flags.FLAGS.print_config:
            commands.print_config(config)
            return
        output, hlo = (_writable(name) for name in ("output", "hlo"))
        target = describe(flags.FLAGS.topology, flags.FLAGS.num_slices)
        step = prepare(config, target)
        print(report.heading(step.mesh, target, config, step.notes), flush=True)
        figures = compile_step(step, target, hlo=hlo)
        print(report.text(figures, target))
        if not figures["fits"]:
            status = 1
            figures["changes"] = candidates.search(
                config, target, prepare, compile_step if flags.FLAGS.suggest else None
            )
        if output:
            files.write(output, to_json(figures, indent=2) + "\n")

    commands.run(
        "Compile the train step for hardware that is not there: python -m finermoe_jax.cli.aot "
        "--config=FILE --topology=v5e:16x16\nExit code 0: it fits; 1: it does not; 2: a mistake "
        "in the input. All figures are compiler estimates.",
        define,
        run,
    )
    raise SystemExit(status)


if __name__ == "__main__":
    main()
