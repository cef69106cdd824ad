"""The demo's FineRMoE against its dense base trained on the same further tokens, over seeds.

    python benchmarks/demo_against_dense.py OUT        # about 8 minutes on 2 CPU cores

The seed draws the router and the order of the data. Prints a table; OUT keeps the runs.
"""

import dataclasses
import importlib.util
import statistics
import sys
from pathlib import Path

from finermoe_jax.plot import read_lines
from finermoe_jax.run_settings import RunConfig, run_config
from finermoe_jax.training import train

SEEDS = (1, 2, 3)


def preset(variant: str, seed: int) -> RunConfig:
    """configs/demo.py with another seed, scored at the end only, without samples."""
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
        train=dataclasses.replace(config.train, seed=seed, eval_every=10_000),
    )


def main(argv: list[str]) -> int:
    """Trains both for every seed and prints the held-out losses."""
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(argv[1])
    losses: dict[str, list[float]] = {"": [], "ct": []}
    for seed in SEEDS:
        for variant, kept in losses.items():
            workdir = out / f"{variant or 'finermoe'}-{seed}"
            train(preset(variant, seed), workdir, say=lambda _: None)
            kept.append(read_lines(workdir / "evals.jsonl")[-1]["loss"])
    print("seed   FineRMoE   dense   difference")
    for seed, ours, dense in zip(SEEDS, losses[""], losses["ct"], strict=True):
        print(f"{seed:>4}   {ours:8.4f}  {dense:6.4f}   {ours - dense:+.4f}")
    ours, dense = (statistics.mean(losses[v]) for v in ("", "ct"))
    print(f"mean   {ours:8.4f}  {dense:6.4f}   {ours - dense:+.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
