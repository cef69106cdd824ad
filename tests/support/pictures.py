"""Texts of a picture as it was drawn, with their real boxes."""

import contextlib
import itertools

import matplotlib.figure
import matplotlib.text
from matplotlib.transforms import Bbox


class Texts(dict):
    """Each text that the figure saved last shows, and its box; `axes` are the figure's.

    Boxes are in points, from the lower left corner.
    """

    def words(self):
        return [text.get_text() for text in self]

    def overlaps(self, slack=0.3):
        """Pairs of texts whose boxes overlap by more than `slack` points in both directions."""
        return [
            (a.get_text(), b.get_text())
            for (a, one), (b, other) in itertools.combinations(self.items(), 2)
            if min(one.x1, other.x1) - max(one.x0, other.x0) > slack
            and min(one.y1, other.y1) - max(one.y0, other.y0) > slack
        ]

    def outside(self, slack=0.3):
        """Texts that the figure cuts."""
        figure = self.axes[0].get_figure(root=True)
        width, height = figure.get_size_inches() * 72
        return [
            text.get_text()
            for text, box in self.items()
            if min(box.x0, box.y0, width - box.x1, height - box.y1) < -slack
        ]


def in_points(box, figure):
    """A box in pixels of a figure, in points."""
    return Bbox(box.get_points() * 72 / figure.dpi)


@contextlib.contextmanager
def recorded(monkeypatch):
    """Yields the Texts, which each picture that is saved inside of the block fills anew."""
    texts = Texts()
    draw_text, draw_figure = matplotlib.text.Text.draw, matplotlib.figure.Figure.draw

    def text_drawn(text, renderer):
        if text.get_visible() and text.get_text().strip():
            box = matplotlib.text.Text.get_window_extent(text, renderer)
            texts[text] = in_points(box, text.get_figure(root=True))
        draw_text(text, renderer)

    def figure_drawn(figure, renderer):
        texts.clear()
        texts.axes = figure.axes
        draw_figure(figure, renderer)

    with monkeypatch.context() as patch:
        patch.setattr(matplotlib.text.Text, "draw", text_drawn)
        patch.setattr(matplotlib.figure.Figure, "draw", figure_drawn)
        yield texts
