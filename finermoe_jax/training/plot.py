"""Plots of a run: loss.png, optionally with another run's losses, and load.png."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.runtime.paths import local
from finermoe_jax.training import style
from finermoe_jax.training.load_map import draw_load

# Name of the evaluation of the dense model before upcycling.
DENSE_BASE = "dense base"
_LOGS = ("metrics.jsonl", "evals.jsonl")


def draw(workdir: Path, rival: Path | None = None) -> list[Path]:
    """Draws loss.png and, except for a dense run, load.png; returns their paths.

    Raises InputError if workdir has no metrics, rival (`draw_loss`) no losses, or either has
    invalid records.
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


def _series(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of a field, without nulls (values that were not finite)."""
    kept = [line for line in lines if type(line.get(name)) in (int, float)]
    return [line["step"] for line in kept], [line[name] for line in kept]


@style.applied()
def draw_loss(workdir: Path, rival: Path | None = None) -> Path:
    """Draws losses, learning rate, gradient norm and speed over steps; returns the PNG's path.

    `rival` is the workdir of a run to compare with, such as the dense model trained on the same
    tokens. Without one, an upcycled run is compared with the untrained dense model.

    Raises InputError if workdir has no metrics, or rival neither metrics nor held-out losses.
    """
    metrics, evals = (read_lines(workdir / name) for name in _LOGS)
    if not metrics:
        raise InputError(f"{workdir} holds no metrics.jsonl to draw")
    picture = style.figure(7.5, 8.5)
    panels = picture.subplots(4, 1, height_ratios=(4, 1, 1, 1), sharex=True)
    top, *rates = panels
    steps, losses = _series(metrics, "loss")
    span = max(1, len(losses) // 20)
    ends: dict[Any, str] = {}
    name = ""
    if rival is not None:  # behind the run's own
        name, other = (f"{style.short(path.absolute().name)}\n" for path in (workdir, rival))
        theirs = [read_lines(rival / log) for log in _LOGS]
        named = [f"{other}training", f"{other}held-out"]
        ends = _lines(top, theirs, span, named, (style.ORANGE, "s--"))
        if not ends:
            raise InputError(f"{rival} holds neither metrics.jsonl nor evals.jsonl to draw")
    elif base := _series([e for e in evals if e.get("name") == DENSE_BASE], "loss")[1]:
        line = top.axhline(base[-1], color=style.SLATE, linestyle="--", linewidth=1.2)
        ends[line] = f"held-out, dense base\nas loaded: {base[-1]:.3f}"
    top.plot(steps, losses, color=style.BLUE, linewidth=0.8, alpha=0.3)
    training = (
        f"training, mean of\n{span} logged steps" if span > 1 else "training, each logged step"
    )
    named = [f"{name}{training}", f"{name}held-out"]
    ends |= _lines(top, [metrics, evals], span, named, (style.BLUE, "o-"))
    top.set_title("loss, nats per token" + (" (pale: each logged step)" if span > 1 else ""))
    top.margins(x=0.02)
    _draw_rates(metrics, *rates)
    style.title(picture, workdir.absolute().name)
    style.label_ends(top, ends)
    path = workdir / "loss.png"
    picture.savefig(path)
    return path


def _draw_rates(metrics: list[dict], rate: Any, norm: Any, speed: Any) -> None:
    """Draws learning rate, gradient norm and speed over the steps."""
    for axes, name, title in (
        (rate, "learning_rate", "learning rate"),
        (norm, "grad_norm", "norm of the gradient, before clipping"),
        (speed, "tokens_per_second", "tokens per second"),
    ):
        steps, values = _series(metrics, name)
        axes.plot(steps, values, color=style.BLUE, linewidth=1)
        axes.set_title(title)
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    # Logarithmic if one spike would flatten the rest.
    positive = [value for value in _series(metrics, "grad_norm")[1] if value > 0]
    speed.xaxis.get_major_locator().set_params(integer=True)
    if positive and max(positive) > 20 * float(np.median(positive)):
        norm.set_yscale("log")
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    speed.set_xlabel("step")


def _lines(
    axes: Any, logs: Sequence[list[dict]], span: int, names: Sequence[str], look: tuple[str, str]
) -> dict[Any, str]:
    """Draws the running mean of a run's training losses, and its held-out losses.

    logs are its metrics and evaluations, names those of the two lines, look their colour and the
    form of the second. Returns the lines and their labels.
    """
    ends, (metrics, evals), (colour, form) = {}, logs, look
    steps, losses = _series(metrics, "loss")
    if losses:
        [line] = axes.plot(steps, _running_mean(losses, span), color=colour, linewidth=1)
        ends[line] = names[0]
    steps, losses = _series([e for e in evals if e.get("name") != DENSE_BASE], "loss")
    if losses:
        [line] = axes.plot(steps, losses, form, color=colour, linewidth=2)
        ends[line] = f"{names[1]}: {losses[0]:.3f} → {losses[-1]:.3f}"
    return ends


def _running_mean(values: list[float], span: int) -> np.ndarray:
    """Returns the mean of the last `span` values at each position."""
    sums = np.convolve(values, np.ones(span))[: len(values)]
    return sums / np.minimum(np.arange(1, len(values) + 1), span)


@style.applied()
def draw_similarity(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], path: Path, over: str = "layer"
) -> None:
    """Draws the experts' similarity over layers or steps, with a curve per model or per part."""
    picture = style.figure(7.5, max(4.0, 0.55 * len(curves)))
    axes = picture.subplots()
    kinds = itertools.cycle(itertools.product(("-", "--", ":"), style.LINES))
    ends = {}
    for (name, (places, values)), (form, colour) in zip(curves.items(), kinds, strict=False):
        [line] = axes.plot(places, values, "o", linestyle=form, color=colour)
        figure = f"mean {np.mean(values):.3f}" if over == "layer" else f"{values[-1]:.3f}"
        ends[line] = f"{style.short(name)}\n{figure}"
    axes.set_xlabel(over)
    axes.set_title("mean cosine similarity of a layer's experts")
    axes.xaxis.get_major_locator().set_params(integer=True)
    lowest = min(min(values) for _, values in curves.values())
    axes.set_ylim(min(0.0, 1.1 * lowest), 1.05)
    style.label_ends(axes, ends)
    picture.savefig(path)
