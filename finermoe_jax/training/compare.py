"""Compares runs: a table of final losses with their spread, and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finermoe_jax.training import style
from finermoe_jax.training.history import (
    Group,
    History,
    group_by_seed,
    read_history,
    refuse_incomparable,
    setting_differences,
)
from finermoe_jax.training.storage import Workdir


def compare(workdirs: Sequence[Workdir]) -> list[Group]:
    """Reads runs and groups those that differ only in their seeds.

    Raises InputError for a folder that is not a run, and for runs with incomparable losses.
    """
    histories = [read_history(workdir) for workdir in workdirs]
    refuse_incomparable(histories)
    return group_by_seed(histories)


def table(groups: Sequence[Group]) -> str:
    """Returns final held-out losses with their spread, the costs, and the configs' differences."""
    rows: list[tuple[str, ...]] = [
        ("run", "seeds", "held-out loss", "range", "tokens", "FLOPs", "seconds")
    ]
    for group in groups:
        losses = group.finals("held_out_loss")
        several = len(losses) > 1
        spread = f" ± {np.std(losses, ddof=1):.4f}" if several else ""
        costs = [_mean(group, quantity) for quantity in ("tokens", "flops", "seconds")]
        rows.append(
            (
                group.name,
                str(len(losses)),
                f"{np.mean(losses):.4f}{spread}",
                f"{losses.min():.4f} … {losses.max():.4f}" if several else "",
                *(f"{value:.3g}" if value >= 1e6 else f"{value:,.0f}" for value in costs),
            )
        )
    lines = aligned(rows)
    if changed := setting_differences(groups):
        head = ("differs in", *(group.name for group in groups))
        lines += ["", *aligned([head, *((name, *map(_short, v)) for name, v in changed.items())])]
    if any(len(group.runs) > 1 for group in groups):
        lines += ["", "± is the standard deviation over runs that differ in their seeds alone."]
    return "\n".join(lines)


def _mean(group: Group, quantity: str) -> float:
    return float(np.mean(group.finals(quantity)))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Formats rows, with the first column aligned left and the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = (
        [row[0].ljust(widths[0])]
        + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        for row in rows
    )
    return ["  ".join(each).rstrip() for each in cells]


def summary(groups: Sequence[Group]) -> dict[str, Any]:
    """Returns the table and the curves, for JSON."""
    return {
        "groups": {
            group.name: {
                "runs": {run.name: _curves(run) for run in group.runs},
                "held_out_loss_mean": _mean(group, "held_out_loss"),
                "held_out_loss_std": (
                    float(np.std(group.finals("held_out_loss"), ddof=1))
                    if len(group.runs) > 1
                    else None
                ),
            }
            for group in groups
        },
        "differences": {
            name: dict(zip((group.name for group in groups), values, strict=True))
            for name, values in setting_differences(groups).items()
        },
    }


def _curves(run: History) -> dict[str, Any]:
    names = ("steps", "loss", "tokens", "flops", "seconds")
    seeds = {"train.seed": run.config.train.seed, "data.seed": run.config.data.seed}
    return run.final | seeds | {"curve": {name: getattr(run, name).tolist() for name in names}}


# --- the picture ----------------------------------------------------------------------------


@style.applied()
def draw(groups: Sequence[Group], path: Path) -> Path:
    """Draws held-out losses over tokens, FLOPs and seconds; returns the PNG's path.

    A group's line is the mean over its seeds, and a band around it their range.
    """
    from matplotlib import ticker

    picture = style.figure(11.0, 4.2)
    panels = picture.subplots(1, 3, sharey=True)
    titles = ("tokens trained on", "model FLOPs", "seconds of steps")
    ends: dict[Any, str] = {}
    for axes, quantity, title in zip(panels, ("tokens", "flops", "seconds"), titles, strict=True):
        ends = {}
        for number, group in enumerate(groups):
            colour = style.LINES[number % len(style.LINES)]
            dashes = ("-", "--", ":")[number // len(style.LINES) % 3]
            line = _curve(axes, group, quantity, colour, dashes)
            ends[line] = f"{style.short(group.name)}: {np.mean(group.finals('held_out_loss')):.3f}"
        axes.set_xlabel(title)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
    panels[0].set_ylabel("held-out loss (nats per token)")
    panels[0].set_ylim(*visible(groups))
    style.label_ends(panels[-1], ends)
    picture.savefig(path)
    return path


def _curve(axes: Any, group: Group, quantity: str, colour: str, dashes: str) -> Any:
    """Draws one group; returns its line. Runs scored at other steps are interpolated."""
    grid = np.unique(np.concatenate([run.steps for run in group.runs]))
    grid = grid[grid <= min(run.steps[-1] for run in group.runs)]
    at, losses = (
        np.array([np.interp(grid, run.steps, getattr(run, name)) for run in group.runs])
        for name in (quantity, "loss")
    )
    x = at.mean(axis=0)
    if len(group.runs) > 1:
        axes.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.2, lw=0)
    [line] = axes.plot(x, losses.mean(axis=0), "o", linestyle=dashes, color=colour)
    return line


def visible(groups: Sequence[Group]) -> tuple[float, float]:
    """Limits of the loss axis; without the first scores where they would flatten all the rest."""
    runs = [run for group in groups for run in group.runs]
    low = min(run.loss.min() for run in runs)
    later = [run.loss[1:].max() if len(run.loss) > 1 else run.loss[0] for run in runs]
    first = [run.loss[0] for run in runs]
    high = max(later)
    if max(first) - low < 3 * (high - low):
        high = max(high, *first)
    margin = 0.05 * max(high - low, 1e-3)
    return float(low - margin), float(high + margin)
