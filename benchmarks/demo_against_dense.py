"""Compares the demo's FineRMoE with its dense base, on equal tokens and at equal FLOPs.

    python benchmarks/demo_against_dense.py OUT [PICTURE.png]   # 12 minutes on 2 CPU cores

Trains three runs per seed: FineRMoE, the dense base on the same tokens, and the dense base for as
many steps as cost FineRMoE's FLOPs (config/flops.py), with its schedule stretched to them. The
seed sets the router and the order of the data. Prints a table of held-out losses. OUT keeps the
runs, and finished runs in it are reused. PICTURE shows the losses of the first seed over the
steps.
"""

import argparse
import dataclasses
import shutil
import statistics
from pathlib import Path

from finermoe_jax.config.flops import training_flops
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.parse import preset, run_config
from finermoe_jax.config.run import RunConfig
from finermoe_jax.runtime.files import find
from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.training.plot import draw_loss
from finermoe_jax.training.run import train
from finermoe_jax.weights.source import open_model
from finermoe_jax.weights.upcycle import upcycled_config


def demo(variant: str, seed: int, steps: int = 150) -> RunConfig:
    """configs/demo.py with this seed and number of steps, without samples."""
    config = run_config(preset(f"demo:{variant}").to_dict())
    return dataclasses.replace(
        config,
        prompts=(),
        data=dataclasses.replace(config.data, seed=seed),
        train=dataclasses.replace(config.train, seed=seed, steps=steps),
    )


def at_equal_flops(config: RunConfig, dense: ModelConfig) -> int:
    """Dense steps that cost as many FLOPs as the FineRMoE run, rounded up."""
    assert config.moe is not None
    length = config.data.sequence_length
    flops = training_flops(upcycled_config(dense, config.moe), length)
    return -int(-config.train.steps * flops // training_flops(dense, length))


def runs(seed: int, steps: int) -> dict[str, RunConfig]:
    """The configs of a seed's three runs, by name."""
    upcycled, dense = demo("", seed, steps), demo("ct", seed, steps)
    longest = at_equal_flops(upcycled, open_model(find(upcycled.init_from)).config)
    longer = dataclasses.replace(dense, train=dataclasses.replace(dense.train, steps=longest))
    return {"finermoe": upcycled, "dense": dense, "dense at equal FLOPs": longer}


def held_out(config: RunConfig, workdir: Path) -> float:
    """The held-out loss after the last step of a run; trains it unless it is finished."""
    scored = read_lines(workdir / "evals.jsonl")
    if not scored or scored[-1]["step"] != config.train.steps:
        train(config, workdir, say=lambda _: None)
        scored = read_lines(workdir / "evals.jsonl")
    return scored[-1]["loss"]


def main() -> None:
    """Trains all runs of every seed and prints the held-out losses and their differences."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="directory for the runs")
    parser.add_argument("picture", type=Path, nargs="?", help="plot of the first seed's losses")
    parser.add_argument("--seeds", default="1,2,3", help="seeds, separated by commas")
    parser.add_argument("--steps", type=int, default=150, help="steps of FineRMoE")
    arguments = parser.parse_args()
    seeds, steps, rows = [*map(int, arguments.seeds.split(","))], arguments.steps, []
    print("seed   FineRMoE    dense  difference   dense at equal FLOPs  difference")
    for seed in seeds:
        losses = []
        for name, config in runs(seed, steps).items():
            workdir = arguments.out / f"{name.replace(' ', '_')}-{seed}"
            losses.append(held_out(config, workdir))
        rows.append(losses)
        print(_row(str(seed), losses), flush=True)
    print(_row("mean", [statistics.mean(column) for column in zip(*rows, strict=True)]))
    made = [config.train.steps for config in runs(seeds[0], steps).values()]
    print(f"steps: {made}")
    if arguments.picture:
        first, rival = (arguments.out / f"{name}-{seeds[0]}" for name in ("finermoe", "dense"))
        shutil.copyfile(draw_loss(first, rival), arguments.picture)


def _row(name: str, losses: list[float]) -> str:
    ours, dense, longer = losses
    return (
        f"{name:>4}   {ours:8.4f} {dense:8.4f}  {ours - dense:+10.4f}   {longer:20.4f}  "
        f"{ours - longer:+10.4f}"
    )


if __name__ == "__main__":
    main()
