"""Pictures of runs: looked at by hand, here that they are drawn, and of what."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.errors import InputError
from finermoe_jax.training import load_map, plot, style
from finermoe_jax.training.monitor import load_of
from tests.support import invoke
from tests.support.pictures import in_points, recorded

MOE = MoEConfig(4, 2, 1, 2, 1)  # 16 experts


def _write(workdir, file, lines):
    (workdir / file).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _metrics(workdir, **more):
    line = {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1e3}
    _write(workdir, "metrics.jsonl", [{"step": s, **line, **more} for s in range(1, 30)])


def _loads(workdir, tokens, moe=MOE):
    records = []
    for step in (1, 10):
        load = load_of(tokens, np.ones(len(tokens)), moe)
        found = {k: v.tolist() for k, v in load._asdict().items() if v is not None}
        records.append({"step": step, **found})
    _write(workdir, "expert_load.jsonl", records)


def test_a_dense_run_has_no_picture_of_loads(tmp_path):
    _metrics(tmp_path)
    assert plot.draw(tmp_path) == [tmp_path / "loss.png"]
    with pytest.raises(InputError, match=r"holds no metrics\.jsonl"):
        plot.draw(tmp_path / "nowhere")


def test_what_older_runs_lack_and_what_was_not_finite_is_left_out(tmp_path):
    _write(
        tmp_path, "metrics.jsonl",
        [{"step": 1, "loss": None, "learning_rate": 1e-3}, {"step": 2, "loss": 2.0,
          "learning_rate": 1e-3}],
    )  # fmt: skip
    assert plot.draw_loss(tmp_path).stat().st_size > 10_000


def _scored(workdir, losses):
    _metrics(workdir)
    scores = [{"name": f"step {s}", "step": s, "loss": losses[s > 0]} for s in (0, 29)]
    base = {"name": "dense base", "step": 0, "loss": 3.0}
    _write(workdir, "evals.jsonl", [base, *scores])


@pytest.fixture
def rivals(tmp_path):
    """Two runs, ours and theirs."""
    for name, losses in (("ours", (4.0, 2.5)), ("theirs", (3.0, 2.75))):
        (tmp_path / name).mkdir()
        _scored(tmp_path / name, losses)
    return tmp_path / "ours", tmp_path / "theirs"


@pytest.mark.slow
def test_a_rival_is_drawn_in_place_of_the_untrained_base(rivals, monkeypatch):
    said, (ours, theirs) = [], rivals
    label_ends = style.label_ends
    monkeypatch.setattr(style, "label_ends", lambda axes, ends: said.append(label_ends(axes, ends)))
    plot.draw(ours)
    plot.draw(ours, theirs)
    alone, beside = ({text.get_text().replace("\n", " ") for text in labels} for labels in said)
    base = "held-out, dense base as loaded: 3.000"
    each = "training, each logged step"
    assert alone == {base, "held-out: 4.000 → 2.500", each}
    own = {"ours held-out: 4.000 → 2.500", f"ours {each}"}
    assert beside == own | {"theirs training", "theirs held-out: 3.000 → 2.750"}
    (theirs / "metrics.jsonl").unlink()  # held-out losses are enough
    plot.draw(ours, theirs)
    last = {text.get_text().replace("\n", " ") for text in said[2]}
    assert last == beside - {"theirs training"}
    with pytest.raises(InputError, match="nowhere holds neither"):
        plot.draw(ours, ours.parent / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("ends", [(2.5, 2.75), (2.5, 2.5), (2.0, 2.0001)])
def test_labels_of_losses_are_at_their_lines_ends_and_apart(rivals, monkeypatch, ends):
    ours, theirs = rivals
    for run, end in zip(rivals, ends, strict=True):
        _scored(run, (4.0, end))
    with recorded(monkeypatch) as texts:
        plot.draw_loss(ours, theirs)
    assert texts.overlaps() == [] and texts.outside() == []
    top = texts.axes[0]
    assert all(axes.get_legend() is None for axes in texts.axes)
    frame = in_points(top.get_window_extent(), top.figure)
    labels = {text: box for text, box in texts.items() if "\n" in text.get_text()}
    assert len(labels) == 4
    for text, box in labels.items():
        lines = [line for line in top.lines if tuple(line.get_xydata()[-1]) == text.xy]
        assert to_rgb(text.arrow_patch.get_edgecolor()) in [to_rgb(x.get_color()) for x in lines]
        assert box.x0 > frame.x1 and frame.y0 - 3 < box.y0 and box.y1 < frame.y1 + 3


def test_the_running_mean():
    np.testing.assert_allclose(plot._running_mean([1.0, 3.0, 5.0, 1.0], 2), [1, 2, 4, 3])


def _has(picture, colour):
    """Pixels of this colour, of 255 a channel."""
    pixels = np.round(matplotlib.image.imread(picture)[..., :3] * 255)
    return (np.abs(pixels - colour).max(axis=-1) <= 2).sum()


@pytest.mark.slow
def test_loads_have_their_colours_and_the_dead_are_black(tmp_path, monkeypatch):
    tokens = np.full((2, 16), 64)
    _loads(tmp_path, tokens)
    black = _has(load_map.draw_load(tmp_path), (0, 0, 0))
    tokens[1, :8] = 0
    tokens[0, 5] = 64 * 40
    _loads(tmp_path, tokens)
    with recorded(monkeypatch) as texts:
        picture = load_map.draw_load(tmp_path)
    # Eight of 32 cells of the map.
    cell = _size(picture, texts.axes[0]) / 32
    assert _has(picture, (0, 0, 0)) - black > 0.85 * 8 * cell
    heaviest = np.array(style.load_colours()(1.0)[:3]) * 255
    assert _has(picture, heaviest) > 0.8 * cell


def _size(picture, axes):
    """The pixels that axes take of a saved picture."""
    whole = axes.get_figure(root=True).bbox
    part = axes.get_window_extent()
    pixels = np.prod(matplotlib.image.imread(picture).shape[:2])
    return pixels * part.width * part.height / (whole.width * whole.height)


@pytest.mark.slow
def test_an_even_load_is_neutral(tmp_path, monkeypatch):
    colours = style.load_colours()
    red, green, blue = (np.array(colours(0.5)[:3]) * 255).round()
    assert max(red, green, blue) - min(red, green, blue) <= 1 and red > 240
    for away in (0.1, 0.3, 0.5):
        less, more = colours(0.5 - away), colours(0.5 + away)
        assert less[2] > less[0] and more[0] > more[2]  # purple, orange
    _loads(tmp_path, np.full((3, 16), 64))
    with recorded(monkeypatch) as texts:
        picture = load_map.draw_load(tmp_path)
    even = _has(picture, (red, green, blue))
    assert even > 0.85 * sum(_size(picture, axes) for axes in texts.axes[:2])
    assert "1 = even" in texts.words()


PLAIN = {"plain_top_k": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "moe"),
    [
        (2, MoEConfig(1, 1, 1, 2, 1)),
        (4, MoEConfig(1, 1, 1, 2, 1, **PLAIN)),
        (1, MoEConfig(8, 2, 1, 2, 1)),
        (4, MoEConfig(8, 2, 1, 2, 1)),
        (28, MoEConfig(32, 2, 1, 2, 1)),
        pytest.param(28, MoEConfig(64, 1, 1, 2, 4, **PLAIN), marks=pytest.mark.nightly),
        (6, MoEConfig(8, 4, 2, 1, 1)),
        pytest.param(28, MoEConfig(64, 8, 1, 2, 1), marks=pytest.mark.nightly),
        pytest.param(80, MoEConfig(4, 32, 1, 2, 1), marks=pytest.mark.nightly),
    ],
    ids=lambda value: f"{value.num_experts} experts" if isinstance(value, MoEConfig) else None,
)
def test_a_map_of_loads_is_readable(tmp_path, monkeypatch, layers, moe):
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.full(moe.num_experts, 4.0), size=layers)
    _loads(tmp_path, np.stack([random.multinomial(8192, share) for share in shares]), moe)
    (tmp_path / "config.json").write_text(json.dumps({"moe": {"plain_top_k": moe.plain_top_k}}))
    with recorded(monkeypatch) as texts:
        load_map.draw_load(tmp_path)
    assert texts.overlaps() == [] and texts.outside() == []
    words = texts.words()
    slots, candidates = moe.output_granularity, moe.output_expansion
    assert ("slot" in words) == (slots > 1 or (candidates > 1 and not moe.plain_top_k))
    assert ("share of its slot" in words) == (candidates > 1 and not moe.plain_top_k)
    assert ("no slots or candidate groups" in words) == moe.plain_top_k
    # Experts and layers are numbered from 0.
    for axis, count in ((texts.axes[0].xaxis, moe.num_experts), (texts.axes[0].yaxis, layers)):
        shown = [int(label.get_text()) for label in axis.get_ticklabels()]
        assert shown[0] == 0 and (count - 1) / 2 <= shown[-1] < count
        assert {str(number) for number in shown} <= set(words)
    assert min(text.get_fontsize() for text in texts) >= 7


@pytest.mark.slow
def test_a_map_of_a_pool_has_its_candidate_groups_side_by_side(tmp_path, monkeypatch):
    """If the layers' experts are groups of their own."""
    moe = MoEConfig(4, 2, 1, 2, 1, experts_across=2, pooled_as="candidates")
    tokens = np.arange(1, 65).reshape(2, 32)
    _loads(tmp_path, tokens, moe)
    (tmp_path / "config.json").write_text(json.dumps({"moe": dataclasses.asdict(moe)}))
    with recorded(monkeypatch) as texts:
        load_map.draw_load(tmp_path)
    experts, shares = texts.axes[:2]
    one = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # layer 0's experts of a group, then layer 1's
    order = (np.arange(0, 32, 8)[:, None] + one).ravel()
    ratio = tokens / tokens.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(experts.images[0].get_array(), style.octaves(ratio[:, order]))
    assert shares.images[0].get_array().shape == (2, 2 * 4)
    for tick, label in zip(experts.get_xticks(), experts.get_xticklabels(), strict=True):
        assert label.get_text() == str(order[int(tick)])
    assert texts.overlaps() == [] and texts.outside() == []


@pytest.mark.slow
def test_the_command_names_its_pictures_and_its_mistakes(tmp_path, capsys):
    _metrics(tmp_path)
    _loads(tmp_path, np.full((1, 16), 3))
    assert invoke("plot", tmp_path) == 0
    wanted = [str(tmp_path / "loss.png"), str(tmp_path / "load.png")]
    assert capsys.readouterr().out.split() == wanted
    assert invoke("plot", tmp_path / "nowhere") == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
