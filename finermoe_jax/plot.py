"""Pictures of a run: `python -m finermoe_jax.plot WORKDIR` writes WORKDIR/loss.png."""

import json
import math
import sys
from pathlib import Path

from finermoe_jax.errors import InputError


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file; an absent file has none."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def draw_loss(workdir: Path) -> Path:
    """Draws training loss, held-out losses and learning rate over steps; returns the PNG's path.

    Raises InputError when workdir holds no metrics.
    """
    metrics = read_lines(workdir / "metrics.jsonl")
    evals = read_lines(workdir / "evals.jsonl")
    if not metrics:
        raise InputError(f"{workdir} holds no metrics.jsonl to draw")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7.5, 5.4), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    for line in metrics + evals:  # null stands for what JSON cannot hold
        line["loss"] = math.nan if line["loss"] is None else line["loss"]
    steps = [m["step"] for m in metrics]
    losses = [m["loss"] for m in metrics]
    span = max(1, len(losses) // 20)
    smooth = [
        sum(losses[max(0, i - span + 1) : i + 1]) / len(losses[max(0, i - span + 1) : i + 1])
        for i in range(len(losses))
    ]
    top.plot(steps, losses, color="#9ec5e8", linewidth=0.8, label="training, each step")
    top.plot(steps, smooth, color="#1f5f99", linewidth=1.6, label=f"training, mean of {span} steps")
    dense = [e for e in evals if e["name"] == "dense base"]
    scored = [e for e in evals if e["name"] != "dense base"]
    if dense:
        top.axhline(
            dense[-1]["loss"], color="#777777", linestyle="--", linewidth=1.2,
            label=f"held-out, dense base: {dense[-1]['loss']:.3f}",
        )  # fmt: skip
    if scored:
        top.plot(
            [e["step"] for e in scored], [e["loss"] for e in scored], "o-", color="#c2410c",
            markersize=4, label=f"held-out: {scored[0]['loss']:.3f} → {scored[-1]['loss']:.3f}",
        )  # fmt: skip
    top.set_ylabel("loss (nats per token)")
    top.grid(alpha=0.25)
    top.legend(frameon=False)
    bottom.plot(steps, [m["learning_rate"] for m in metrics], color="#1f5f99")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.grid(alpha=0.25)
    figure.suptitle(workdir.name)
    path = workdir / "loss.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def main(argv: list[str]) -> int:
    """The command; returns the exit code."""
    if len(argv) != 2 or argv[1] in ("-h", "--help"):
        print("usage: python -m finermoe_jax.plot WORKDIR", file=sys.stderr)
        return 0 if argv[1:] in (["-h"], ["--help"]) else 2
    try:
        print(draw_loss(Path(argv[1])))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
