"""load.png: the tokens of each expert in each MoE layer, and how the load developed."""

from pathlib import Path
from typing import Any

import numpy as np

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.parse import from_dict
from finermoe_jax.moe.routing import in_groups
from finermoe_jax.runtime.json_files import read_json, read_lines
from finermoe_jax.training import style

_WIDTH = 7.2  # inches
_SMALL = 7  # points: the numbers in cells
_DEAD = "black"
_MOST_CROSSES = 160


@style.applied()
def draw_load(workdir: Path) -> Path | None:
    """Draws each expert's load in each layer and over the steps; returns the PNG's path.

    Returns None, without drawing, for a dense run. Colours show tokens divided by the layer's mean,
    neutral at 1 (even load). Plain top-k has no slots and candidates to show. If the candidate
    groups of a pool are those of its layers, the columns are sorted by group.
    """
    records = read_lines(workdir / "expert_load.jsonl")
    if not records:
        return None
    last = records[-1]
    tokens = np.asarray(last["tokens"], float)
    candidates = np.asarray(last["candidates"])  # [L, slots, candidates]
    layers, slots, choices = candidates.shape
    moe = _moe_of(workdir)
    if moe.get("plain_top_k") is True:
        slots = choices = 1
    numbers = _sorted_experts(moe, tokens.shape[1])
    tokens = tokens[:, numbers]
    height = min(max(1.2, 0.19 * layers), 9.0)
    picture = style.figure(_WIDTH, height + 1.7 + 3.9)
    map_part, curve_part = picture.subfigures(2, 1, height_ratios=(height + 1.7, 3.9))
    shares = choices > 1
    widths = (1, min(0.4, max(0.2, 0.05 * slots * choices))) if shares else (1,)
    left, *right = np.atleast_1d(
        map_part.subplots(1, len(widths), width_ratios=widths, sharey=True)
    )
    ratio = tokens / np.maximum(tokens.mean(axis=1, keepdims=True), 1e-9)  # 1: even
    image = _heat_map(left, ratio)
    left.set_xlabel(f"expert (black, cross: no token; {(ratio == 0).sum()} of {ratio.size})")
    left.set_ylabel("MoE layer")
    share = candidates.reshape(layers, -1)
    if shares:
        _heat_map(right[0], share * choices)
        right[0].set_xlabel("share of its slot")
        right[0].tick_params(left=False, labelleft=False)
    style.load_bar(map_part, image, [left, *right], shrink=0.7, pad=0.02)
    _over_steps(curve_part, records, layers)
    style.title(picture, f"{workdir.absolute().name}: load of the experts, step {last['step']}")
    _mark(picture, left, tokens.shape, slots, choices, numbers)
    if shares:
        _mark(picture, right[0], (layers, slots * choices), slots, choices)
        _write(right[0], share, "{:.0%}", share * choices)
    if slots * choices == 1:
        left.set_title("no slots or candidate groups")
    _write(left, ratio, "{:.2f}", ratio)
    path = workdir / "load.png"
    picture.savefig(path)
    return path


def _moe_of(workdir: Path) -> dict[str, Any]:
    """Returns the fields of MoEConfig in config.json; empty without any."""
    path = workdir / "config.json"
    moe = read_json(path).get("moe") if path.is_file() else None
    return moe if isinstance(moe, dict) else {}


def _sorted_experts(moe: dict[str, Any], experts: int) -> np.ndarray:
    """Returns the pool's experts [E], sorted by slot, candidate group and number."""
    numbers = np.arange(experts)
    if moe.get("pooled_as") != "candidates":
        return numbers  # they are sorted already
    return in_groups(numbers, from_dict(MoEConfig, moe, "config.moe")).reshape(-1)


def _heat_map(axes: Any, ratio: np.ndarray) -> Any:
    """Draws loads over the even load, one cell each; 0 is black with a cross."""
    axes.set_facecolor(_DEAD)
    image = axes.imshow(
        style.octaves(ratio), cmap=style.load_colours(), vmin=-style.OCTAVES, vmax=style.OCTAVES,
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    dead = np.argwhere(ratio == 0)
    fits = ratio.shape[1] <= _MOST_CROSSES  # else a white cross would hide its cell
    axes.plot(
        dead[:, 1], dead[:, 0], "x", color="white" if fits else _DEAD, markersize=3,
        markeredgewidth=0.8,
    )  # fmt: skip
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return image


def _cell(axes: Any, shape: tuple[int, int]) -> tuple[float, float]:
    """Returns a cell's width and height in points, after the layout."""
    box, scale = axes.get_window_extent(), 72 / axes.get_figure(root=True).dpi
    return box.width * scale / shape[1], box.height * scale / shape[0]


def _mark(
    picture: Any,
    axes: Any,
    shape: tuple[int, int],
    slots: int,
    choices: int,
    numbers: np.ndarray | None = None,
) -> None:
    """Numbers layers, columns, slots and candidates from 0, as many as fit; draws the borders.

    `numbers` are those of the columns. The panel of candidates has none, and does not name them.
    """
    layers, columns = shape
    group, leftmost = columns // (slots * choices), numbers is not None
    picture.draw_without_rendering()
    width, height = _cell(axes, shape)
    for border in range(group, columns, group):
        most = 1.8 if border % (group * choices) == 0 else 0.7
        axes.axvline(border - 0.5, color=style.INK, linewidth=min(most, 0.1 * most * group * width))
    width, height = width * columns, height * layers
    axes.set_yticks(range(0, layers, style.step_that_fits(layers, height, 12)))
    step = style.step_that_fits(columns, width, 8 + 6 * len(str(columns - 1)))
    shown = [] if numbers is None else numbers[::step].tolist()
    axes.set_xticks(range(0, columns, step) if shown else [], shown)
    rows = []
    if choices > 1 and style.step_that_fits(slots * choices, width, 14) == 1:
        rows.append(("candidate", choices, slots * choices, 1))
    if slots * choices > 1:
        rows.append(("slot", slots, slots, style.step_that_fits(slots, width, 20)))
    for level, (name, period, count, every) in enumerate(rows):
        top, pad = axes.secondary_xaxis("top"), 2 + 13 * level
        places = range(0, count, every)
        span = columns / count
        top.set_xticks([(n + 0.5) * span - 0.5 for n in places], [f"{n % period}" for n in places])
        top.tick_params(length=0, pad=pad)
        top.spines[:].set_visible(False)
        if leftmost:
            axes.annotate(
                name, (0, 1), (-6, pad + 1), xycoords="axes fraction", color=style.QUIET,
                textcoords="offset points", ha="right", va="bottom", fontsize=9,
            )  # fmt: skip


def _write(axes: Any, values: np.ndarray, form: str, ratio: np.ndarray) -> None:
    """Writes the values into the cells of a map of loads, where they are large enough."""
    width, height = _cell(axes, ratio.shape)
    longest = max(len(form.format(value)) for value in values.flat)
    if height < 1.3 * _SMALL or width < 0.75 * _SMALL * longest:
        return
    strong = np.abs(np.nan_to_num(style.octaves(ratio))) > 1.7
    for (row, column), load in np.ndenumerate(ratio):
        if load > 0:
            axes.text(
                column, row, form.format(values[row, column]), ha="center", va="center",
                fontsize=_SMALL, color="white" if strong[row, column] else style.INK,
            )  # fmt: skip


def _over_steps(part: Any, records: list[dict], layers: int) -> None:
    """Draws entropy, fullest expert, aux loss and dead experts of each layer over the steps."""
    import matplotlib

    steps = [record["step"] for record in records]
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, layers))
    panels = part.subplots(2, 2, sharex=True)
    for axes, name, title in zip(
        panels.flat,
        ("entropy", "max_over_mean", "aux_loss", "dead"),
        ("entropy of the load (1 = even)", "fullest expert / even load",
         "load-balancing loss (1 = even)", "experts without a token"),
        strict=True,
    ):  # fmt: skip
        values = np.asarray([record[name] for record in records], float)
        for layer in range(layers):
            axes.plot(
                steps, values[:, layer], color=colours[layer], linewidth=1.1,
                marker="o" if len(steps) < 3 else None, markersize=3,
            )  # fmt: skip
        axes.set_title(title)
        axes.xaxis.set_major_locator(
            matplotlib.ticker.MaxNLocator(integer=True, nbins=5, min_n_ticks=1)
        )
    for axes in panels[1]:
        axes.set_xlabel("step")
    entropy, fullest, _, dead = panels.flat
    entropy.set_ylim(top=1.0)
    fullest.set_ylim(bottom=1.0)
    dead.set_ylim(bottom=0, top=max(1.0, dead.get_ylim()[1]))
    dead.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    scale = matplotlib.cm.ScalarMappable(
        matplotlib.colors.BoundaryNorm(np.arange(layers + 1) - 0.5, layers),
        matplotlib.colors.ListedColormap(colours),
    )
    bar = part.colorbar(scale, ax=list(panels.flat), pad=0.01, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label("MoE layer")
    bar.set_ticks(range(0, layers, style.step_that_fits(layers, 250, 30)))
    bar.ax.minorticks_off()
