"""`finermoe aot`."""

from finermoe_jax.analysis import candidates, report
from finermoe_jax.analysis.aot import compile_program
from finermoe_jax.analysis.programs import PROGRAMS, abstract_program
from finermoe_jax.analysis.topology import describe
from finermoe_jax.cli.flags import Command, Flags, print_config, writable
from finermoe_jax.model.offload import PLACES
from finermoe_jax.runtime.files import write
from finermoe_jax.runtime.json_files import to_json


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_config(required=True)
    flags.add(
        "topology",
        "",
        "TPU slice (chips) or GPUs: v5e:16x16, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4, h100:8",
        required=True,
    )
    flags.add("program", "train", f"program to compile: {', '.join(PROGRAMS)}")
    flags.add(
        "experts",
        "device",
        f"memory of the experts: {', '.join(PLACES)} (host…: decode and prefill only)",
    )
    flags.add("num_slices", 1, "number of TPU slices; only mesh.data spans them")
    flags.add(
        "suggest",
        False,
        "if it does not fit, compile the proposed config changes until one fits (otherwise they "
        "are only estimated, not compiled)",
    )
    flags.add("bytes", False, "also print HBM bytes by cause: attention, experts, loss, …")
    flags.add_path("output", "also write all figures to this JSON file")
    flags.add_path("hlo", "also write the compiled program's HLO text to this file")


def main(flags: Flags) -> int:
    """Runs the command; returns 1 if the program does not fit."""
    flags.need("config")
    config = flags.run_config()
    if flags.print_config:
        print_config(config)
        return 0
    output, hlo = writable(flags.output), writable(flags.hlo, "--hlo")
    target = describe(flags.topology, flags.num_slices)
    program = abstract_program(config, target, flags.program, flags.experts)
    print(report.heading(program, target), flush=True)
    figures = compile_program(program, target, hlo=hlo)
    print(report.text(figures, target))
    if flags.bytes and "bytes_by" in figures:
        print(report.bytes_by_cause(figures))
    if program.trains and not figures["fits"]:
        figures["changes"] = candidates.search(
            program.config, target, abstract_program, compile_program if flags.suggest else None
        )
    if output:
        write(output, to_json(figures, indent=2) + "\n")
    return 0 if figures["fits"] else 1


COMMAND = Command(
    "--config=FILE --topology=v5e:16x16\nExit code 0: it fits; 1: it does not fit; 2: invalid "
    "input. All figures are compiler estimates.",
    define,
    main,
)
