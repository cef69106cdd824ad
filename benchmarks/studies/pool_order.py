"""Measures how evenly two numberings of a pool's experts load the devices of `mesh.expert`.

    python benchmarks/studies/pool_order.py RUN [--devices=4,8]

RUN is the workdir of a run with moe.experts_across=r. For each device count, the script splits the
N * r experts into equal consecutive parts and counts the rows of each part, from the loads in
expert_load.jsonl. Two numberings are compared: p = e * r + j, which this project uses, and
p = j * N + e, in which the experts of a layer are neighbours. A figure is the rows of the fullest
device divided by the mean, averaged over the layers. All other devices wait for the fullest one.
"""

import argparse
from pathlib import Path

import numpy as np

from finermoe_jax.config.parse import run_config
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.json_files import read_json, read_log


def fullest(tokens: np.ndarray, across: int, devices: int) -> tuple[float, float]:
    """Returns the fullest device over the mean for p = e * r + j and for p = j * N + e.

    Args:
      tokens: rows of each expert, [L, N * r], numbered p = e * r + j.
      across: r.
      devices: divides N * r.
    """
    by_layer = tokens.reshape(len(tokens), -1, across).swapaxes(1, 2)
    rows = [each.reshape(len(tokens), devices, -1).sum(axis=2) for each in (tokens, by_layer)]
    one, other = (float((each.max(axis=1) / each.mean(axis=1)).mean()) for each in rows)
    return one, other


def main() -> None:
    """Prints a table with a row per logged step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="workdir of a run with pools")
    parser.add_argument("--devices", default="4,8", help="device counts, separated by commas")
    arguments = parser.parse_args()
    moe = run_config(read_json(arguments.run / "config.json")).moe
    if moe is None or moe.experts_across == 1:
        raise InputError(
            f"{arguments.run} has no pools: give a run with moe.experts_across=2 or more"
        )
    counts = [int(count) for count in arguments.devices.split(",")]
    for count in counts:
        if moe.pool_size % count:
            raise InputError(f"--devices={count} must divide the {moe.pool_size} experts of a pool")
    names = [f"{count} devices, {order}" for count in counts for order in ("e*r + j", "j*N + e")]
    print("| step | foreign | " + " | ".join(names) + " |")
    print("|---|---|" + "---|" * len(names))
    for _, line in read_log(arguments.run / "expert_load.jsonl"):
        tokens = np.asarray(line["tokens"])
        figures = [value for n in counts for value in fullest(tokens, moe.experts_across, n)]
        cells = [f"{np.mean(line['foreign']):.2f}", *(f"{value:.2f}" for value in figures)]
        print(f"| {line['step']} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
