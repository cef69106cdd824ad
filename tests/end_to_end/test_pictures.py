"""The pages' pictures: drawings are what their scripts draw, true and readable; slots from 0."""

import re
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from docs import draw_results, fill_results
from finermoe_jax.config.model import MoEConfig
from finermoe_jax.moe.routing import route
from tests.support import ROOT
from tests.support.pictures import recorded

NAMES = ("cut", "routing", "upcycling", "layer", "pooling", "route_ahead", "architecture")
DOCS = ROOT / "docs"


@pytest.fixture
def draw(monkeypatch):
    """The module docs/draw_pictures.py."""
    monkeypatch.syspath_prepend(str(DOCS))
    import draw_pictures

    return draw_pictures


def test_drawings_are_what_the_script_draws(draw):
    for name, drawn in draw.DRAWN.items():
        assert (DOCS / f"{name}.svg").read_text() == drawn(), "python docs/draw_pictures.py"


def _texts(name):
    """Words, size and box of each text, in the widest of its fonts; the drawing's size and root."""
    root = ElementTree.fromstring((DOCS / f"{name}.svg").read_text())
    assert root.get("font-family").startswith("DejaVu Sans, ")
    found = []
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        x, y, size = (float(text.get(key)) for key in ("x", "y", "font-size"))
        font = FontProperties(
            family="DejaVu Sans", weight=text.get("font-weight", "normal"), size=size
        )
        words = re.sub(" +", " ", text.text)
        width, height, descent = TextToPath().get_text_width_height_descent(words, font, False)
        left = {"start": 0.0, "middle": 0.5, "end": 1.0}[text.get("text-anchor")]
        found.append((words, size, (x - left * width, y - height + descent, width, height)))
    return found, [float(n) for n in root.get("viewBox").split()[2:]], root


@pytest.mark.parametrize("name", NAMES)
def test_texts_of_drawings_are_inside_apart_and_not_small(name):
    texts, (width, height), root = _texts(name)
    assert (root.get("width"), root.get("height")) == (f"{width:g}", f"{height:g}")
    assert 'fill="white"' in (DOCS / f"{name}.svg").read_text()  # on dark pages, too
    for i, (words, size, (x, y, w, h)) in enumerate(texts):
        assert size >= 12
        assert x > 0 and y > 0 and x + w < width and y + h < height, words
        for others, _, (x2, y2, w2, h2) in texts[:i]:
            across = min(x + w, x2 + w2) - max(x, x2)
            down = min(y + h, y2 + h2) - max(y, y2)
            assert across < 0 or down < 0.5, (words, others)


def test_slots_of_drawings_are_counted_from_0():
    for name in NAMES:
        words = " ".join(words for words, *_ in _texts(name)[0])
        assert {int(n) for n in re.findall(r"(?:slot|half|candidate|w)\s?(\d)", words)} <= {0, 1}
        assert name in ("architecture", "route_ahead") or "slot 0" in words


def test_the_routing_of_the_drawing_is_the_codes(draw):
    logits = jnp.array([sum((group for slot in draw.LOGITS for group in slot), ())])
    routing, order = route(logits, MoEConfig(4, 2, 1, 2, 1), jnp.float32)
    by_slot = [jnp.take_along_axis(a, order, -1)[0] for a in (routing.experts, routing.weights)]
    words = [words for words, *_ in _texts("routing")[0]]
    for expert, weight in zip(*by_slot, strict=True):
        assert f"expert {expert}(x)" in words
        assert f"{weight:.2f} ×" in words and f"→ {weight:.2f}" in words


@pytest.mark.slow
def test_tables_are_drawn_with_texts_apart(monkeypatch, tmp_path):
    places = []

    def redirected(figure, path, save=Figure.savefig):
        places.append(path.name)
        save(figure, tmp_path / path.name)
        assert texts.overlaps() == [] and texts.outside() == [], path.name

    with recorded(monkeypatch) as texts:
        monkeypatch.setattr(Figure, "savefig", redirected)
        draw_results.main()
    assert places == [
        "smollm2_loss.png", "inference.png", "function_preserving.png", "scaling_chips.png",
        "scaling_experts.png",
    ]  # fmt: skip
    assert set(places) <= {path.name for path in DOCS.glob("*.png")}


@pytest.mark.slow
def test_figures_of_studies_are_the_recorded_ones(monkeypatch, tmp_path):
    text = "".join(page.read_text() for page in fill_results.PAGES)
    assert fill_results.filled(text) == text
    named = [found[2] for found in fill_results.BLOCK.finditer(text)]
    assert set(fill_results.TABLES) < set(named)
    assert set(named) == {path.stem for path in (DOCS / "studies").glob("*.json")}

    def redirected(figure, path, save=Figure.savefig):
        save(figure, tmp_path / path.name)
        assert texts.overlaps() == [] and texts.outside() == [], path.name

    with recorded(monkeypatch) as texts:
        monkeypatch.setattr(Figure, "savefig", redirected)
        for name in set(named) - set(fill_results.TABLES):
            fill_results.draw(name)
            assert f"(studies/{name}.png)" in text and (DOCS / "studies" / f"{name}.png").is_file()


def test_loss_at_equal_flops():
    """It is read off between two evaluations, where the cheapest runs end."""

    def runs(*curves):
        return {
            str(seed): {"curve": {"flops": flops, "loss": loss}}
            for seed, (flops, loss) in enumerate(curves)
        }

    cheap = runs(([0, 5, 10], [3, 2, 1]), ([0, 5, 10], [3, 2.5, 2]))
    dear = runs(([0, 20], [4, 0]))
    rows = {"cheap": cheap, "dear": dear}
    assert fill_results.at_equal_flops(cheap, rows) == "1.5000 ± 0.7071"
    assert fill_results.at_equal_flops(dear, rows) == "2.0000"
