"""Measures on a CPU how much time pools of experts cost (docs/pooling.md).

    python benchmarks/pools.py [--layers=4] [--rounds=7]

Training step, prefill of 512 tokens and decoding step at batch 1 and 8, with experts_across 1, 2
and 4. All models have Qwen2.5-0.5B's widths, vocabulary 2048, float32 and random weights, and take
turns in every round. Figures are medians; ratios are computed round by round.
"""

import argparse
import dataclasses
import statistics
import sys

import jax
from tqdm import tqdm

from benchmarks.inference import Served, seconds
from benchmarks.train_step import Stepper
from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.presets import QWEN2P5
from finermoe_jax.config.run import DataConfig, RunConfig, TrainConfig
from finermoe_jax.runtime import host_memory

POOLS = (1, 2, 4)


def main() -> None:
    """Prints a table with a row per measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4, help="number of layers, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--hidden", type=int, default=896, help="hidden size")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    arguments = parser.parse_args()
    host_memory.keep_freed()
    base = dataclasses.replace(
        QWEN2P5["0.5B"],
        vocab_size=2048,
        num_hidden_layers=arguments.layers,
        hidden_size=arguments.hidden,
        head_dim=64,
        tie_word_embeddings=False,
        initializer_range=0.02,
    )
    run = RunConfig(
        dense=base,
        data=DataConfig(sequence_length=256, global_batch_size=2),
        train=TrainConfig(steps=1000, compute_dtype="float32", remat="none"),
    )
    measured = {}
    for across in POOLS:
        shape = dataclasses.replace(base, moe=MoEConfig(experts_across=across))
        stepper = Stepper(shape, run)
        shared: dict[tuple, jax.Array] = {}
        one = Served(shape, "float32", 1, shared, prompt=arguments.prompt)
        eight = Served(shape, "float32", 8, shared, prompt=16)
        measured[across] = {
            "training step, 512 tokens": (stepper.step, 1),
            f"prefill, {arguments.prompt} tokens": (one.prefill, 1),
            "decoding step, batch 1": (one.decode, 5),
            "decoding step, batch 8": (eight.decode, 5),
        }
        for call, _ in measured[across].values():
            jax.block_until_ready(call())
    names = list(measured[1])
    times = {(name, across): [] for name in names for across in POOLS}
    for _ in tqdm(range(arguments.rounds), desc="rounds", file=sys.stderr):
        for name in names:
            for across in POOLS:
                times[name, across].append(seconds(*measured[across][name]))
    print("| | r = 1 |" + "".join(f" r = {r} | of r = 1 |" for r in POOLS[1:]))
    print("|---|---|" + "---|---|" * len(POOLS[1:]))
    for name in names:
        cells = [f"{statistics.median(times[name, 1]) * 1e3:.1f} ms"]
        for across in POOLS[1:]:
            pairs = zip(times[name, across], times[name, 1], strict=True)
            cells.append(f"{statistics.median(times[name, across]) * 1e3:.1f} ms")
            cells.append(f"{statistics.median(a / b for a, b in pairs):.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
