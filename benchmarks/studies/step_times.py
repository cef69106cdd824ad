"""Times the training steps of several configs in turns, in one process.

    python benchmarks/studies/step_times.py docs/studies/table1_seconds.json --rounds=5 \\
        --config=configs/studies/upcycled.py:{inter_out_fg,ct,s16a4,nvshard,du,c32a2}

Weights and tokens are random. The JSON file holds the seconds of every round by variant. Other jobs
on the machine affect all variants alike, so compare the ratios of rounds.
"""

import argparse
import statistics
from pathlib import Path

import jax

from benchmarks.train_step import Stepper, timed
from finermoe_jax.analysis.params import run_model
from finermoe_jax.config.parse import preset, run_config
from finermoe_jax.runtime import files, host_memory
from finermoe_jax.runtime.json_files import to_json


def main() -> None:
    """Writes the file and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--config", action="append", required=True, help="FILE:VARIANT, repeated")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    arguments = parser.parse_args()
    host_memory.keep_freed()
    steppers = {}
    for name in arguments.config:
        config = run_config(preset(name).to_dict())
        steppers[name.partition(":")[2] or name] = Stepper(run_model(config), config)
    times = timed({name: each.step for name, each in steppers.items()}, arguments.rounds)
    about = {"jax": jax.__version__, "platform": jax.default_backend()}
    files.write(arguments.output, to_json({"about": about, "seconds": times}, indent=1) + "\n")
    first = times[next(iter(times))]
    print("| | median s per step | median ratio to the first |\n|---|---|---|")
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, first, strict=True))
        print(f"| {name} | {statistics.median(seconds):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
