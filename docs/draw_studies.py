"""Pictures of studies, from the figures in docs/studies/*.json. docs/fill_results.py calls this."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from finermoe_jax.training import style

Seeds = Mapping[str, Any]  # the figures of one variant's runs, by seed
Rows = Mapping[str, Seeds]  # by the rows' names
Draw = Callable[[str, Rows], Any]  # title and rows to a Matplotlib figure

MATRICES = ("gate", "up", "down")
LOSS = "held-out loss, nats per token"
ACROSS = {
    "tokens": ("tokens seen, M", 1e6),
    "flops": ("model FLOPs, T", 1e12),
    "seconds": ("minutes", 60),
}


def losses(runs: Seeds) -> dict[str, float]:
    """Returns the last held-out loss of each seed."""
    return {seed: run["curve"]["loss"][-1] for seed, run in runs.items()}


def dots(title: str, rows: Rows) -> Any:
    """Draws the last held-out losses: a dot per seed, a bar at each variant's mean."""
    picture = style.figure(7.5, 1.1 + 0.34 * len(rows))
    axes = picture.subplots()
    _dots(axes, rows)
    axes.set_title(title)
    several = "; a dot per seed, a bar at the mean" if len(next(iter(rows.values()))) > 1 else ""
    axes.set_xlabel(f"{LOSS}{several}")
    return picture


def _dots(axes: Any, rows: Rows) -> None:
    for place, runs in enumerate(rows.values()):
        values = list(losses(runs).values())
        colour = style.ORANGE if place == 0 else style.BLUE
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.8)
        if len(values) > 1:
            axes.plot([np.mean(values)], [place], "|", color=style.INK, markersize=14, mew=2)
    axes.set_yticks(range(len(rows)), [_plain(label) for label in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def curves(*across: str, top: float = np.inf) -> Draw:
    """Returns a function that draws mean losses over each of `across`, names in ACROSS.

    Losses above `top` lie outside the picture; a row that ends there is not drawn.
    """

    def draw(title: str, rows: Rows) -> Any:
        ending = {
            label: runs for label, runs in rows.items() if np.mean([*losses(runs).values()]) < top
        }
        picture = style.figure(4.2 * len(across) + 1.8, 3.6)
        panels = picture.subplots(1, len(across), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, across, strict=True):
            label, unit = ACROSS[name]
            lines = {}
            for (row, runs), look in zip(ending.items(), _looks(), strict=False):
                values = [np.asarray(run["curve"]["loss"]) for run in runs.values()]
                x = np.mean([run["curve"][name] for run in runs.values()], axis=0) / unit
                (line,) = axes.plot(x, np.mean(values, axis=0), **look)
                lines[line] = _plain(row)
            axes.set_xlabel(label)
        if np.isfinite(top):
            panels[0].set_ylim(top=top)
        panels[0].set_ylabel(LOSS)
        style.title(picture, title)
        style.label_ends(panels[-1], lines)
        return picture

    return draw


def over_values(xlabel: str, values: Mapping[str, float], log: bool = False) -> Draw:
    """Returns a function that draws final losses over a setting, a line per group of rows.

    Rows are named "GROUP, VALUE"; `values` has the numbers that their second parts stand for.
    """

    def draw(title: str, rows: Rows) -> Any:
        picture = style.figure(7.5, 3.6)
        axes = picture.subplots()
        lines = {}
        groups = itertools.groupby(rows.items(), lambda item: item[0].rpartition(", ")[0])
        for (group, members), look in zip(groups, _looks(), strict=False):
            each = sorted((values[row.rpartition(", ")[2]], runs) for row, runs in members)
            x = [value for value, _ in each]
            (line,) = axes.plot(x, [np.mean([*losses(r).values()]) for _, r in each], **look)
            for value, runs in each:
                found = list(losses(runs).values())
                axes.plot([value] * len(found), found, "o", color=line.get_color(), alpha=0.6)
            lines[line] = _plain(group)
        if log:
            axes.set_xscale("log")
        axes.set_xticks(list(values.values()), list(values), minor=False)
        axes.minorticks_off()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(LOSS)
        axes.set_title(title)
        style.label_ends(axes, lines)
        return picture

    return draw


def parting(title: str, rows: Rows) -> Any:
    """Draws the similarity of copies over the steps, beside the last held-out losses."""
    picture = style.figure(9.5, 3.4)
    right, left = picture.subplots(1, 2, width_ratios=(1, 1.1))
    _dots(right, rows)
    right.set_xlabel(LOSS)
    right.set_title("a dot per seed, a bar at the mean")
    lines = {}
    for (row, runs), look in zip(rows.items(), _looks(), strict=False):
        steps = [0, *map(int, next(iter(runs.values()))["similarity"])]
        found = [
            [1.0, *(at["copies"] for at in run["similarity"].values())] for run in runs.values()
        ]
        (line,) = left.plot(steps, np.mean(found, axis=0), **look)
        lines[line] = _plain(row)
    left.set_xlabel("step")
    left.set_title("mean cosine similarity of copies")
    style.title(picture, title)
    style.label_ends(left, lines)
    return picture


def ranks(title: str, seeds: Mapping[str, Any]) -> Any:
    """Draws loss and kept squares over the rank, as benchmarks/studies/low_rank.py's figures."""
    picture = style.figure(8.5, 3.3)
    left, right = picture.subplots(1, 2)
    names = [name for name in next(iter(seeds.values())) if name != "all"]
    x = list(map(int, names))
    added = [[run[n]["loss"] - run["all"]["loss"] for n in names] for run in seeds.values()]
    for each in added:
        left.plot(x, each, "o", color=style.BLUE, alpha=0.6)
    left.plot(x, np.mean(added, axis=0), color=style.BLUE)
    left.set_ylim(bottom=0)
    left.set_title("rise of the held-out loss, nats per token")
    lines = {}
    for matrix, look in zip(MATRICES, _looks(), strict=False):
        kept = np.mean([[run[n][matrix] for n in names] for run in seeds.values()], axis=0)
        (line,) = right.plot(x, kept, **look)
        lines[line] = matrix
    right.set_ylim(0, 1)
    right.set_title("share of the squares that is kept")
    for axes in (left, right):
        axes.set_xlabel("rank of each copy's difference")
        axes.set_xticks(x)
    style.title(picture, title)
    style.label_ends(right, lines)
    return picture


def _looks() -> Any:
    """Yields a colour and a dash for each line; all dashes of a colour come after all colours."""
    for dash, colour in itertools.product(("-", "--", ":"), style.LINES):
        yield {"color": colour, "linestyle": dash}


def _plain(label: str) -> str:
    return label.replace("`", "")
