"""Draws pictures of the pages' tables anew: python -m docs.draw_results

Writes smollm2_loss.png, inference.png, function_preserving.png and scaling_*.png. A benchmark that
runs again draws its own picture, with more in it; the pictures here show what the tables hold.
"""

import re
from pathlib import Path

from benchmarks import function_preserving, inference, pods
from finermoe_jax.training import style

DOCS = Path(__file__).parent
TOKENS_PER_CHIP = 2 * 8192  # of a step in docs/scaling.md, "Growth"


def table(page: str, label: str) -> list[list[str]]:
    """The cells of the page's table in which a row begins with `label`, its head first."""
    for block in re.split(r"\n\s*\n", (DOCS / page).read_text()):
        lines = [line.strip() for line in block.splitlines() if line.strip().startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        if any(row[0].startswith(label) for row in cells):
            return [cells[0], *cells[2:]]
    raise ValueError(f"docs/{page} has no table with a row {label!r}")


def number(cell: str) -> float:
    """The first number in a cell."""
    found = re.search(r"\d[\d,]*\.?\d*", cell)
    if found is None:
        raise ValueError(f"the cell {cell!r} holds no number")
    return float(found[0].replace(",", ""))


def by_step(head: list[str], row: list[str]) -> dict[int, float]:
    """The values of a row whose columns are steps, by step."""
    steps = {
        i: int(number(name)) for i, name in enumerate(head) if re.fullmatch(r"(step )?\d+", name)
    }
    return {step: number(row[i]) for i, step in steps.items()}


@style.applied()
def smollm2() -> None:
    """Draws held-out losses of FineRMoE and of the dense model trained on."""
    head, ours, dense = table("results.md", "dense SmolLM2, trained")
    picture = style.figure(7.5, 4)
    axes, ends = picture.subplots(), {}
    for row, name, colour, form in (
        (ours, "FineRMoE", style.BLUE, "o-"),
        (dense, "dense SmolLM2,\ntrained on", style.ORANGE, "s--"),
    ):
        losses = by_step(head, row)
        [line] = axes.plot(list(losses), list(losses.values()), form, color=colour, linewidth=2)
        first, *_, last = losses.values()
        ends[line] = f"{name}\n{first:.3f} → {last:.3f}"
    axes.set_title("SmolLM2-135M: held-out loss, nats per token")
    axes.set_xlabel("step")
    style.label_ends(axes, ends)
    picture.savefig(DOCS / "smollm2_loss.png")


def architectures() -> None:
    """Draws the paper's architectures at inference."""
    _, *rows = table("results.md", "C4A2")
    found = [
        {"name": name, "total": number(total) * 1e9, "first_s": number(first),
         "step_s": 1 / number(speed)}
        for name, total, _, first, _, speed, _ in rows
    ]  # fmt: skip
    inference.draw(found, 10, DOCS / "inference.png")


def starts() -> None:
    """Draws both starts' held-out losses, means over the seeds."""
    head, *rows = table("architectures.md", "published start")
    names = function_preserving.STARTS
    curves = {start: [by_step(head, row)] for start, row in zip(names, rows, strict=True)}
    head, *rows = table("results.md", "dense base, trained")
    rival = next(by_step(head, row) for row in rows if row[0].startswith("dense base"))
    function_preserving.draw(curves, rival, "mean of 3 seeds", DOCS / "function_preserving.png")


def growth(name: str, label: str) -> None:
    """Draws what a step takes per token, over chips or experts."""
    head, *rows = table("scaling.md", label)
    columns = [head.index(column) for column in ("TFLOP", "HBM, GB", "wire, GB")]
    flop, hbm, wire = ([number(row[i]) / TOKENS_PER_CHIP for row in rows] for i in columns)
    panels = {
        pods.FLOP: {"": [1e3 * value for value in flop]},
        pods.HBM: {"": [1e3 * value for value in hbm]},
        pods.WIRE: {"": [1e6 * value for value in wire]},
    }
    at = [int(row[0].split()[-1]) for row in rows]
    pods.draw(name, at, panels, DOCS / f"scaling_{name}.png")


def main() -> None:
    """Draws all of them."""
    smollm2()
    architectures()
    starts()
    growth("chips", "0.5B on 8")
    growth("experts", "1.5B with 128")


if __name__ == "__main__":
    main()
