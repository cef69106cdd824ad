"""The demo's FineRMoE against its dense base trained on: on the same tokens, and at equal FLOPs.

    python benchmarks/demo_against_dense.py OUT [PICTURE.png]   # 12 minutes on 2 CPU cores

The seed draws the router and the order of the data. The third run is the dense one again, with as
many steps as cost what FineRMoE's cost (config/flops.py), its schedule stretched to them.
Prints a table; OUT keeps the runs, and runs that are there already are not made again. PICTURE:
the first seed's losses over the steps, with the dense rival.
"""

import dataclasses
import importlib.util
import shutil
import statistics
import sys
from pathlib import Path

from finermoe_jax.config.flops import training_flops
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.parse import run_config
from finermoe_jax.config.run import RunConfig
from finermoe_jax.runtime.files import find
from finermoe_jax.training.plot import draw_loss, read_lines
from finermoe_jax.training.run import train
from finermoe_jax.weights.source import open_model
from finermoe_jax.weights.upcycle import upcycled_config

SEEDS = (1, 2, 3)


def preset(variant: str, seed: int) -> RunConfig:
    """configs/demo.py with another seed, without samples."""
    path = Path(__file__).parent.parent / "configs" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = run_config(module.get_config(variant).to_dict())
    return dataclasses.replace(
        config,
        prompts=(),
        data=dataclasses.replace(config.data, seed=seed),
        train=dataclasses.replace(config.train, seed=seed),
    )


def at_equal_flops(config: RunConfig, dense: ModelConfig) -> int:
    """The dense model's steps that cost what this FineRMoE's cost, rounded up in its favour."""
    assert config.moe is not None
    length = config.data.sequence_length
    flops = training_flops(upcycled_config(dense, config.moe), length)
    return -int(-config.train.steps * flops // training_flops(dense, length))


def runs(seed: int) -> dict[str, RunConfig]:
    """The three runs of a seed, by name."""
    upcycled, dense = preset("", seed), preset("ct", seed)
    steps = at_equal_flops(upcycled, open_model(find(upcycled.init_from)).config)
    longer = dataclasses.replace(dense, train=dataclasses.replace(dense.train, steps=steps))
    return {"finermoe": upcycled, "dense": dense, "dense at equal FLOPs": longer}


def held_out(config: RunConfig, workdir: Path) -> float:
    """The held-out loss after the last step of a run, made unless it is there."""
    scored = read_lines(workdir / "evals.jsonl")
    if not scored or scored[-1]["step"] != config.train.steps:
        train(config, workdir, say=lambda _: None)
        scored = read_lines(workdir / "evals.jsonl")
    return scored[-1]["loss"]


def main(argv: list[str]) -> int:
    """Trains all three for every seed; prints the held-out losses and how far apart they are."""
    if len(argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    out, rows = Path(argv[1]), []
    print("seed   FineRMoE    dense  difference   dense at equal FLOPs  difference")
    for seed in SEEDS:
        losses = []
        for name, config in runs(seed).items():
            workdir = out / f"{name.replace(' ', '_')}-{seed}"
            losses.append(held_out(config, workdir))
        rows.append(losses)
        print(_row(str(seed), losses), flush=True)
    print(_row("mean", [statistics.mean(column) for column in zip(*rows, strict=True)]))
    steps = [config.train.steps for config in runs(SEEDS[0]).values()]
    print(f"steps: {steps}")
    if len(argv) == 3:
        first, rival = (out / f"{name}-{SEEDS[0]}" for name in ("finermoe", "dense"))
        shutil.copyfile(draw_loss(first, rival), argv[2])
    return 0


def _row(name: str, losses: list[float]) -> str:
    ours, dense, longer = losses
    return (
        f"{name:>4}   {ours:8.4f} {dense:8.4f}  {ours - dense:+10.4f}   {longer:20.4f}  "
        f"{ours - longer:+10.4f}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
