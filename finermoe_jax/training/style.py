"""Style of all plots: colours, fonts, axes, and labels at line ends."""

import contextlib
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

INK, QUIET, GREY, PLAIN = "#1f2933", "#52606d", "#9aa3ad", "#eef1f4"
BLUE, ORANGE, GOLD, PLUM, SLATE = "#1f5f99", "#c2410c", "#d08a00", "#7b2d6b", "#777777"
# Distinguishable with any kind of colour blindness (tests/training/test_style.py).
LINES = (BLUE, ORANGE, GOLD, PLUM, SLATE)
# Strong and light colours of the slots, repeated for further slots.
SLOTS = ((BLUE, "#dbe9f6"), (ORANGE, "#fbe6da"))
# DejaVu Sans comes with Matplotlib; the others are fallbacks for SVGs in browsers.
FONTS = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif"
SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler('color', {list(LINES)})",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "savefig.dpi": 140,
}
# The colours of loads cover an eighth of the even load to eight times as much.
OCTAVES = 3
_LABEL_GAP = 0.02  # between the axes and their labels, as a share of the axes' width


@contextlib.contextmanager
def applied() -> Iterator[Any]:
    """Draws in this style inside a `with` block or a decorated function; yields Matplotlib."""
    import matplotlib.figure  # without pyplot: no backend, nothing to close

    with matplotlib.rc_context(SETTINGS):
        yield matplotlib


def figure(width: float | int, height: float | int) -> Any:
    """Returns an empty Matplotlib figure, size in inches; its layout keeps labels apart."""
    import matplotlib.figure

    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def title(picture: Any, words: str) -> None:
    """Writes a figure's title at its left edge."""
    picture.suptitle(words, x=0.01, ha="left")


def load_colours() -> Any:
    """Returns the colour map of loads: purple below even, neutral at even, orange above.

    Colour-blind people can distinguish these colours. The map omits the darkest ends of
    Matplotlib's: they look like the black of experts without a token.
    """
    import matplotlib

    ends = np.linspace(0.08, 0.92, 257)  # odd: the middle colour is the neutral one
    return matplotlib.colors.ListedColormap(matplotlib.colormaps["PuOr_r"](ends))


def octaves(ratio: Any) -> np.ndarray:
    """Returns log2(loads / even load), with NaN for load 0."""
    ratio = np.asarray(ratio, float)
    return np.log2(np.where(ratio > 0, ratio, np.nan))


def load_bar(picture: Any, image: Any, axes: Any, **place: Any) -> Any:
    """Adds the colour bar of loads below the axes; 1 is the even load. Returns it."""
    bar = picture.colorbar(
        image, ax=axes, extend="both", orientation="horizontal", aspect=40, **place
    )
    marks = range(-OCTAVES, OCTAVES + 1)
    names = [f"{2**m}" if m > 0 else f"1/{2**-m}" if m else "1 = even" for m in marks]
    bar.set_ticks(list(marks), labels=names)
    bar.outline.set_visible(False)
    bar.set_label("tokens / even load")
    return bar


def step_that_fits(count: int, room: float | int, size: float | int) -> int:
    """Returns the smallest power of two s such that every s-th of `count` labels fits.

    `room` is the axis length, `size` a label's with its gap, in the same unit.
    """
    step = 1
    while step < count and step * room < size * count:
        step *= 2
    return step


def spread(wanted: Any, sizes: Any, low: float | int, high: float | int) -> np.ndarray:
    """Returns centres [n] of labels with sizes [n], near the wanted centres [n], without overlaps.

    Keeps the order, and stays within low and high; labels that do not fit are centred there.
    """
    order = np.argsort(wanted, kind="stable")
    ordered, size = np.asarray(wanted, float)[order], np.asarray(sizes, float)[order]
    before = np.concatenate([[0.0], np.cumsum((size[1:] + size[:-1]) / 2)])
    # Without the room that the labels before take, an order without overlaps is a rising one.
    # Neighbours that would fall meet at their mean.
    blocks: list[list[float]] = []
    for value in ordered - before:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    rising = np.concatenate([np.full(len(b), np.mean(b)) for b in blocks])
    least, most = low + size[0] / 2, high - size[-1] / 2 - before[-1]
    rising = (
        np.clip(rising, least, most) if least <= most else np.full_like(rising, (least + most) / 2)
    )
    found = np.empty_like(rising)
    found[order] = rising + before
    return found


def label_ends(axes: Any, labels: Mapping[Any, str]) -> list[Any]:
    """Writes each line's label at the right of the axes, level with the line's last point.

    Labels have their line's colour. Where they would overlap they move apart, and a thin line leads
    to the line's end. Call it last: it lays the figure out. Returns the labels, Matplotlib texts.
    """
    if not labels:
        return []
    texts = []
    for line, words in labels.items():
        x, y = (float(np.asarray(values)[-1]) for values in line.get_data())
        on = line.get_transform()  # a horizontal line's x counts in widths of the axes
        colour = line.get_color()
        text = axes.annotate(
            words, (x, y), xycoords=on, xytext=(1 + _LABEL_GAP, 0.5), textcoords="axes fraction",
            va="center", fontsize=9, color=_darker(colour), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.7,
                        "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip
        texts.append(text)
    axes.figure.draw_without_rendering()  # now everything has its place
    frame = axes.get_window_extent()
    ends = [
        float(line.get_transform().transform((text.xy[0], text.xy[1]))[1])
        for line, text in zip(labels, texts, strict=True)
    ]
    gap = axes.figure.dpi / 72 * 3
    heights = [extent(text).height + gap for text in texts]
    centres = spread(ends, heights, frame.y0 - gap / 2, frame.y1 + gap / 2)
    for text, centre in zip(texts, centres, strict=True):
        text.set_position((1 + _LABEL_GAP, (centre - frame.y0) / frame.height))
    return texts


def extent(text: Any) -> Any:
    """Returns the box of a label's text in pixels, without its leader line."""
    import matplotlib.text

    return matplotlib.text.Text.get_window_extent(text)


def short(name: str, width: int = 24) -> str:
    """Shortens a name to at most two lines of `width` characters."""
    return "\n".join(textwrap.wrap(name, width, max_lines=2, placeholder="…")) or name


def _darker(colour: str) -> tuple[float, ...]:
    """Returns a colour dark enough for small text on white."""
    import matplotlib

    red, green, blue = matplotlib.colors.to_rgb(colour)
    dark = min(1.0, 0.45 / (0.3 * red + 0.59 * green + 0.11 * blue))
    return red * dark, green * dark, blue * dark
