"""Compares the function-preserving start with the published one.

    python benchmarks/function_preserving.py OUT       # about 25 minutes on 2 CPU cores
    python benchmarks/function_preserving.py --logits=models/smollm2_135m

The first command trains configs/demo.py with both starts and three seeds, which set the router and
the order of the data, and its dense base with one. It prints a table of held-out losses. OUT keeps
the runs and function_preserving.png. The second compares the logits of both starts with those of a
dense model, on the first 128 tokens of the Python licence.
"""

import dataclasses
import statistics
import sys
from pathlib import Path

import jax
import numpy as np

import finermoe_jax as fm
from benchmarks.demo_against_dense import demo
from finermoe_jax.data.tokenizers import open_tokenizer
from finermoe_jax.runtime.files import find
from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.training import style
from finermoe_jax.training.run import train

STARTS = {"": "published start", "function_preserving": "function-preserving start"}
COLOURS = {"": style.BLUE, "function_preserving": style.ORANGE}
EVERY = 10
SEEDS = (1, 2, 3)


def held_out(workdir: Path) -> dict[int, float]:
    """Held-out losses of a run, by step."""
    return {e["step"]: e["loss"] for e in read_lines(workdir / "evals.jsonl") if "step" in e}


@style.applied()
def draw(
    curves: dict[str, list[dict[int, float]]], rival: dict[int, float], note: str, target: Path
) -> None:
    """Plots held-out losses of both starts over steps, and of the dense base trained on.

    `note` says what a curve is: one seed's, or a mean.
    """
    picture = style.figure(7.5, 4)
    axes, ends = picture.subplots(), {}
    for start, runs in curves.items():
        for run in runs:
            [line] = axes.plot(list(run), list(run.values()), "o-", color=COLOURS[start])
        ends[line] = f"{STARTS[start]}\n{note}"
    [line] = axes.plot(list(rival), list(rival.values()), "s--", color=style.SLATE)
    ends[line] = "dense base,\ntrained on (1 seed)"
    axes.set_title("held-out loss, nats per token")
    axes.set_xlabel("step")
    style.label_ends(axes, ends)
    picture.savefig(target)


def compare_logits(source: str) -> None:
    """Upcycles a dense HF directory with both starts and prints the largest logit differences."""
    dense = fm.load_hf(source, dtype="float32")
    tokenizer = open_tokenizer(Path(source), dense.config.vocab_size)
    text = find("demo/LICENSE.pydoc.txt").read_text()
    ids = np.asarray(tokenizer(text)["input_ids"][:128], np.int32)[None]
    wanted = np.asarray(dense(ids).logits)
    print(f"dense: {ids.size} tokens, standard deviation of the logits {wanted.std():.2f}")
    for start, name in STARTS.items():
        upcycle = fm.UpcycleConfig(function_preserving=bool(start))
        model = fm.upcycle_model(dense, fm.MoEConfig(), jax.random.key(0), upcycle)
        print(f"{name}: largest difference {np.abs(model(ids).logits - wanted).max():.3g}")


def _trained(variant: str, seed: int, workdir: Path) -> dict[int, float]:
    """Trains a variant of the demo; returns its held-out losses by step."""
    config = demo(variant, seed)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=EVERY))
    train(config, workdir, say=lambda _: None)
    return held_out(workdir)


def main(argv: list[str]) -> int:
    """Trains both starts for every seed, prints the held-out losses and plots them."""
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    if argv[1].startswith("--logits="):
        compare_logits(argv[1].removeprefix("--logits="))
        return 0
    out = Path(argv[1])
    curves: dict[str, list[dict[int, float]]] = {start: [] for start in STARTS}
    for seed in SEEDS:
        for start, runs in curves.items():
            runs.append(_trained(start, seed, out / f"{start or 'published'}-{seed}"))
    rival = _trained("ct", SEEDS[0], out / f"dense-{SEEDS[0]}")
    print(f"held-out loss, mean of seeds {SEEDS}; the dense base has {rival[0]:.4f}")
    print("step   published   function-preserving")
    steps = [0, 10, 20, 50, 100, 150]
    for step in steps:
        means = [statistics.mean(run[step] for run in runs) for runs in curves.values()]
        print(f"{step:>4}   {means[0]:9.4f}   {means[1]:19.4f}")
    draw(curves, rival, f"{len(SEEDS)} seeds", out / "function_preserving.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
