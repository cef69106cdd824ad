"""Plots of a run: loss.png, optionally with another run's losses, and load.png."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.json_files import read_log
from finermoe_jax.runtime.paths import local
from finermoe_jax.training import style
from finermoe_jax.training.load_map import draw_load

# Name of the evaluation of the dense model before upcycling.
DENSE_BASE = "dense base"


def read_lines(path: Path) -> list[dict]:
    """Returns the records of a run's log (`json_files.read_log`); a missing file has none."""
    return [values for _, values in read_log(path)]


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
    metrics, evals = (read_lines(workdir / f"{name}.jsonl") for name in ("metrics", "evals"))
    if not metrics:
        raise InputError(f"{workdir} holds no metrics.jsonl to draw")
    picture = style.figure(7.5, 8.5)
    panels = picture.subplots(4, 1, height_ratios=(4, 1, 1, 1), sharex=True)
    top, *rates = panels
    steps, losses = _series(metrics, "loss")
    span = max(1, len(losses) // 20)
    ends: dict[Any, str] = {}
    if rival is not None:
        ends |= _rival_lines(top, rival, span)
    elif base := _series([e for e in evals if e.get("name") == DENSE_BASE], "loss")[1]:
        line = top.axhline(base[-1], color=style.SLATE, linestyle="--", linewidth=1.2)
        ends[line] = f"held-out, dense base\nas loaded: {base[-1]:.3f}"
    name = "" if rival is None else f"{style.short(workdir.absolute().name)}\n"
    top.plot(steps, losses, color=style.BLUE, linewidth=0.8, alpha=0.3)
    training = (
        f"training, mean of\n{span} logged steps" if span > 1 else "training, each logged step"
    )
    ends |= _training_line(top, metrics, span, f"{name}{training}", style.BLUE)
    ends |= _held_out_line(top, evals, f"{name}held-out", style.BLUE, "o-")
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


def _training_line(
    axes: Any, metrics: list[dict], span: int, label: str, colour: str
) -> dict[Any, str]:
    """Draws the running mean of the training losses; returns the line and its label."""
    steps, losses = _series(metrics, "loss")
    if not losses:
        return {}
    [line] = axes.plot(steps, _running_mean(losses, span), color=colour, linewidth=1)
    return {line: label}


def _held_out_line(
    axes: Any, evals: list[dict], name: str, colour: str, form: str
) -> dict[Any, str]:
    """Draws held-out losses over the run's steps; returns the line and its label."""
    steps, losses = _series([e for e in evals if e.get("name") != DENSE_BASE], "loss")
    if not losses:
        return {}
    [line] = axes.plot(steps, losses, form, color=colour, linewidth=2)
    return {line: f"{name}: {losses[0]:.3f} → {losses[-1]:.3f}"}


def _rival_lines(axes: Any, rival: Path, span: int) -> dict[Any, str]:
    """Draws another run's losses, behind the run's own; returns the lines and their labels."""
    metrics, evals = (read_lines(rival / f"{name}.jsonl") for name in ("metrics", "evals"))
    name = style.short(rival.absolute().name)
    training = _training_line(axes, metrics, span, f"{name}\ntraining", style.ORANGE)
    if not training and not evals:
        raise InputError(f"{rival} holds neither metrics.jsonl nor evals.jsonl to draw")
    return training | _held_out_line(axes, evals, f"{name}\nheld-out", style.ORANGE, "s--")


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
