"""Pictures of a run: loss.png, with another run's losses where asked for, and load.png."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.json_files import read_log
from finermoe_jax.runtime.paths import local

_BLUE, _PALE, _ORANGE, _GREY = "#1f5f99", "#9ec5e8", "#c2410c", "#777777"
_GREEN, _PURPLE = "#2a9d6f", "#7b4fa3"
_DEAD = "black"
# The score of the dense model that an upcycled one was made of, before any step.
_BASE = "dense base"
# The colours cover loads between an eighth of the even one and eight times as much.
_OCTAVES = 3


def read_lines(path: Path) -> list[dict]:
    """The records of a run's log (`json_files.read_log`); an absent file has none."""
    return [values for _, values in read_log(path)]


def draw(workdir: Path, rival: Path | None = None) -> list[Path]:
    """Draws all there is to see of a run; returns the PNGs' paths. A dense run has no load.png.

    Raises InputError when workdir holds no metrics, rival (`draw_loss`) no losses at all, or either
    records that are not a run's.
    """
    workdir = Path(local(workdir))
    rival = None if rival is None else Path(local(rival))
    try:
        pictures = [draw_loss(workdir, rival), draw_load(workdir)]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{workdir}: metrics.jsonl, evals.jsonl or expert_load.jsonl holds a record that is "
            f"not a training run's ({error!r}): remove that line"
        ) from None
    return [picture for picture in pictures if picture is not None]


def _matplotlib() -> Any:
    import matplotlib.figure  # without pyplot there is no backend to choose, and nothing to close

    return matplotlib


def colours() -> Any:
    """The colour map of loads: purple is less than even, white even, orange more.

    Everybody can distinguish these colours. The darkest ends of Matplotlib's map are left out: they
    look like the black of dead experts.
    """
    mpl = _matplotlib()
    return mpl.colors.ListedColormap(mpl.colormaps["PuOr_r"](np.linspace(0.08, 0.92, 256)))


def _series(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that hold one; null means that it was not finite."""
    kept = [line for line in lines if type(line.get(name)) in (int, float)]
    return [line["step"] for line in kept], [line[name] for line in kept]


def draw_loss(workdir: Path, rival: Path | None = None) -> Path:
    """Draws losses, learning rate, gradient norm and speed over steps; returns the PNG's path.

    `rival` is the workdir of a run to compare with, as of the dense model on the same tokens: its
    losses are drawn, too. Without one, an upcycled run is drawn beside the dense model as loaded,
    which no step has trained.

    Raises InputError when workdir holds no metrics, or rival neither metrics nor held-out losses.
    """
    metrics, evals = (read_lines(workdir / f"{name}.jsonl") for name in ("metrics", "evals"))
    if not metrics:
        raise InputError(f"{workdir} holds no metrics.jsonl to draw")
    figure = _matplotlib().figure.Figure(figsize=(7.5, 9), layout="constrained")
    panels = figure.subplots(4, 1, height_ratios=(3, 1, 1, 1), sharex=True)
    top, *rates = panels
    steps, losses = _series(metrics, "loss")
    span = max(1, len(losses) // 20)
    top.plot(steps, losses, color=_PALE, linewidth=0.8, label="training, each logged step")
    if span > 1:
        top.plot(
            steps, _running_mean(losses, span), color=_BLUE, linewidth=1.6,
            label=f"training, mean of {span} logged steps",
        )  # fmt: skip
    if rival is not None:
        _draw_rival(top, rival, span)
    elif base := _series([e for e in evals if e.get("name") == _BASE], "loss")[1]:
        top.axhline(
            base[-1], color=_GREY, linestyle="--", linewidth=1.2,
            label=f"held-out, dense base as loaded: {base[-1]:.3f}",
        )  # fmt: skip
    _draw_held_out(top, evals, "held-out", "o-", _ORANGE)
    top.set_ylabel("loss (nats per token)")
    # Above the curves, which may be anywhere.
    top.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _draw_rates(metrics, *rates)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.suptitle(workdir.absolute().name)
    path = workdir / "loss.png"
    figure.savefig(path, dpi=130)
    return path


def _draw_rates(metrics: list[dict], rate: Any, norm: Any, speed: Any) -> None:
    """Learning rate, gradient norm and speed over the run's steps."""
    for axes, name, label in (
        (rate, "learning_rate", "learning rate"),
        (norm, "grad_norm", "gradient norm"),
        (speed, "tokens_per_second", "tokens per second"),
    ):
        steps, values = _series(metrics, name)
        axes.plot(steps, values, color=_BLUE, linewidth=1)
        axes.set_ylabel(label)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    # One spike would flatten all the rest.
    positive = [value for value in _series(metrics, "grad_norm")[1] if value > 0]
    speed.xaxis.get_major_locator().set_params(integer=True)
    if positive and max(positive) > 20 * float(np.median(positive)):
        norm.set_yscale("log")
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    speed.set_xlabel("step")


def _draw_held_out(axes: Any, evals: list[dict], name: str, line: str, colour: str) -> None:
    """Held-out losses over the run's steps."""
    steps, losses = _series([e for e in evals if e.get("name") != _BASE], "loss")
    if losses:
        label = f"{name}: {losses[0]:.3f} → {losses[-1]:.3f}"
        axes.plot(steps, losses, line, color=colour, markersize=4, label=label)


def _draw_rival(axes: Any, rival: Path, span: int) -> None:
    """Another run's losses, behind the run's own."""
    name, evals = rival.absolute().name, read_lines(rival / "evals.jsonl")
    steps, losses = _series(read_lines(rival / "metrics.jsonl"), "loss")
    if losses:
        axes.plot(
            steps, _running_mean(losses, span), color=_GREY, linewidth=1, alpha=0.7,
            label=f"{name}: training",
        )  # fmt: skip
    elif not evals:
        raise InputError(f"{rival} holds neither metrics.jsonl nor evals.jsonl to draw")
    _draw_held_out(axes, evals, f"{name}: held-out", "s--", _GREY)


def _running_mean(values: list[float], span: int) -> np.ndarray:
    """At each place the mean of the last `span` values."""
    sums = np.convolve(values, np.ones(span))[: len(values)]
    return sums / np.minimum(np.arange(1, len(values) + 1), span)


def draw_load(workdir: Path) -> Path | None:
    """Draws each expert's load in each layer, and how it developed; returns the PNG's path.

    None, and no picture, where no load was recorded: the run is dense.
    """
    records = read_lines(workdir / "expert_load.jsonl")
    if not records:
        return None
    mpl = _matplotlib()
    last = records[-1]
    tokens = np.asarray(last["tokens"], float)
    candidates = np.asarray(last["candidates"])
    layers, slots, choices = candidates.shape
    height = max(2.6, 1.2 + 0.17 * layers)
    figure = mpl.figure.Figure(figsize=(13, height + 3.2), layout="constrained")
    map_row, curve_row = figure.subfigures(2, 1, height_ratios=(height, 2.8))
    left, right = map_row.subplots(
        1, 2, width_ratios=(1, min(0.5, 0.06 + 0.02 * slots * choices)), sharey=True
    )
    _heat_map(mpl, figure, left, tokens, slots, choices)
    _shares(figure, right, candidates)
    _over_steps(mpl, curve_row, records, layers)
    figure.suptitle(f"{workdir.absolute().name}: load of the experts, step {last['step']}")
    path = workdir / "load.png"
    figure.savefig(path, dpi=110)
    return path


def _heat_map(
    mpl: Any, figure: Any, axes: Any, tokens: np.ndarray, slots: int, choices: int
) -> None:
    """A cell for each expert of each layer; what got nothing is black, with a cross."""
    experts = tokens.shape[1]
    even = np.maximum(tokens.mean(axis=1, keepdims=True), 1e-9)
    octaves = np.log2(np.where(tokens > 0, tokens / even, np.nan))
    axes.set_facecolor(_DEAD)
    image = axes.imshow(
        octaves, cmap=colours(), vmin=-_OCTAVES, vmax=_OCTAVES, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    dead = np.argwhere(tokens == 0)
    axes.plot(dead[:, 1], dead[:, 0], "x", color="white", markersize=3, markeredgewidth=0.8)
    group = experts // (slots * choices)
    for border in range(group, experts, group):
        heavy = border % (group * choices) == 0
        axes.axvline(border - 0.5, color="black", linewidth=1.6 if heavy else 0.6)
    names = axes.secondary_xaxis("top")
    names.set_xticks(
        [(number + 0.5) * group - 0.5 for number in range(slots * choices)],
        [f"slot {n // choices}, candidate {n % choices}" for n in range(slots * choices)],
        fontsize=8,
    )
    names.tick_params(length=0)
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True, nbins=15))
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True, nbins=16))
    axes.set_xlabel(
        f"expert (black with a cross: no token in this step; {len(dead)} of {tokens.size})"
    )
    axes.set_ylabel("MoE layer")
    bar = figure.colorbar(image, ax=axes, extend="both", pad=0.01, aspect=30)
    bar.ax.yaxis.set_major_formatter(
        mpl.ticker.FuncFormatter(
            lambda value, _: f"{2**value:g}×" if value >= 0 else f"1/{2**-value:g}"
        )
    )
    bar.set_ticks(range(-_OCTAVES, _OCTAVES + 1))
    bar.set_label("tokens / even load")


def _shares(figure: Any, axes: Any, candidates: np.ndarray) -> None:
    """The share of tokens that chose each candidate group of each slot."""
    layers, slots, choices = candidates.shape
    flat = candidates.reshape(layers, -1)
    image = axes.imshow(
        flat, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
    )
    for border in range(choices, slots * choices, choices):
        axes.axvline(border - 0.5, color="white", linewidth=2)
    axes.set_xticks(
        range(slots * choices), [f"{n // choices}.{n % choices}" for n in range(slots * choices)]
    )
    axes.set_xlabel("slot.candidate")
    bar = figure.colorbar(image, ax=axes, pad=0.04, aspect=30)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.set_label("share of tokens")
    axes.set_title("candidate chosen", fontsize=9)


def _over_steps(mpl: Any, figure: Any, records: list[dict], layers: int) -> None:
    """Entropy, heaviest expert, aux loss and dead experts of each layer over the steps."""
    steps = [record["step"] for record in records]
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.92, layers))
    panels = figure.subplots(1, 4)
    for axes, name, title in zip(
        panels,
        ("entropy", "max_over_mean", "aux_loss", "dead"),
        ("entropy of the load (1: even)", "fullest expert / mean", "aux loss (1: even)",
         "experts without a token"),
        strict=True,
    ):  # fmt: skip
        values = np.asarray([record[name] for record in records], float)
        for layer in range(layers):
            axes.plot(
                steps, values[:, layer], color=colours[layer], linewidth=1,
                marker="o" if len(steps) < 3 else None, markersize=3,
            )  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True, nbins=5))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(top=1.0)
    panels[1].set_ylim(bottom=1.0)
    panels[3].set_ylim(bottom=0, top=max(1.0, panels[3].get_ylim()[1]))
    panels[3].yaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    scale = mpl.cm.ScalarMappable(
        mpl.colors.BoundaryNorm(np.arange(layers + 1) - 0.5, layers),
        mpl.colors.ListedColormap(colours),
    )
    bar = figure.colorbar(scale, ax=list(panels), pad=0.01, aspect=25)
    bar.set_label("MoE layer")
    bar.set_ticks(sorted({0, layers // 2, layers - 1}))
    bar.ax.minorticks_off()


def draw_similarity(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], path: Path
) -> None:
    """Draws the experts' similarity over layers (similarity.py), one curve per model."""
    figure = _matplotlib().figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    styles = itertools.product(("-", "--", ":"), (_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY))
    for (name, (layers, values)), (line, colour) in zip(curves.items(), styles, strict=False):
        label = f"{name}: mean {np.mean(values):.3f}"
        axes.plot(layers, values, "o", linestyle=line, color=colour, markersize=4, label=label)
    axes.set_xlabel("layer")
    axes.set_ylabel("mean cosine similarity of experts")
    axes.xaxis.get_major_locator().set_params(integer=True)
    lowest = min(min(values) for _, values in curves.values())
    axes.set_ylim(min(0.0, 1.1 * lowest), 1.05)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=130)
