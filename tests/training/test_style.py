"""The style of pictures: labels that keep apart, colours that everybody can distinguish."""

import itertools

import matplotlib.colors
import numpy as np
import pytest

from finermoe_jax.training import plot, style
from tests.support.pictures import recorded


@pytest.mark.parametrize("seed", range(20))
def test_spread_labels_keep_order_and_distance(seed):
    random = np.random.default_rng(seed)
    count = random.integers(1, 9)
    sizes = random.uniform(5, 15, count)
    wanted = random.uniform(0, 100, count).round(-1)  # some are equal
    low, high = 0.0, max(100.0, 1.2 * sizes.sum())
    found = style.spread(wanted, sizes, low, high)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(wanted[order]) >= 0).all()
    gaps = np.diff(found[order]) - (sizes[order][1:] + sizes[order][:-1]) / 2
    assert (gaps > -1e-9).all()
    assert (found - sizes / 2).min() > low - 1e-9 and (found + sizes / 2).max() < high + 1e-9


def test_spread_labels_move_no_further_than_they_must():
    np.testing.assert_allclose(style.spread([50, 20], [10, 10], 0, 100), [50, 20])
    np.testing.assert_allclose(style.spread([50, 52], [10, 10], 0, 100), [46, 56])
    np.testing.assert_allclose(style.spread([2, 99, 99], [10, 10, 10], 0, 100), [5, 85, 95])
    # More than there is room for: centred on it, and still apart.
    np.testing.assert_allclose(style.spread([1, 1, 1], [10, 10, 10], 0, 20), [0, 10, 20])


def test_steps_of_ticks():
    assert style.step_that_fits(32, 320, 10) == 1
    assert style.step_that_fits(32, 319, 10) == 2
    assert style.step_that_fits(128, 375, 26) == 16
    assert style.step_that_fits(1, 1, 100) == 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4, 17])
def test_labels_of_many_lines_keep_apart(tmp_path, monkeypatch, count):
    curves = {f"model {i}": (range(4), [0.5 + i / 1000] * 4) for i in range(count)}
    with recorded(monkeypatch) as texts:
        plot.draw_similarity(curves, tmp_path / "s.png")
    assert texts.overlaps() == [] and texts.outside() == []
    labels = {text.get_text().split("\n")[0]: box for text, box in texts.items()}
    heights = [labels[name].y0 for name in curves]
    assert heights == sorted(heights)  # as the lines' ends


# Linear sRGB as protanopes, deuteranopes and tritanopes see it (Machado, Oliveira, Fernandes 2009).
SEEN = {
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def _linear(colour):
    channels = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def _lab(linear):
    """CIELAB of linear sRGB."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = np.cbrt(np.maximum(to_xyz @ linear / [0.9505, 1, 1.089], 1e-3))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN)
def test_colours_of_lines_are_distinct(seen):
    labs = [_lab(np.clip(np.array(SEEN[seen]) @ _linear(c), 0, 1)) for c in style.LINES]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(labs, 2)) > 15


@pytest.mark.parametrize("colour", [*style.LINES, style.INK, style.QUIET])
def test_labels_can_be_read_on_white(colour):
    if colour in style.LINES:
        colour = style._darker(colour)
    assert 1.05 / (_linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05) >= 4.2
