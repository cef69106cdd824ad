"""Pictures of runs: looked at by hand, here that they are drawn, and of what."""

import json

import matplotlib.axes
import matplotlib.image
import numpy as np
import pytest

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.errors import InputError
from finermoe_jax.training import plot
from finermoe_jax.training.monitor import load_of
from tests.support import invoke

MOE = MoEConfig(4, 2, 1, 2, 1)  # 16 experts


def _write(workdir, file, lines):
    (workdir / file).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _metrics(workdir, **more):
    line = {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1e3}
    _write(workdir, "metrics.jsonl", [{"step": s, **line, **more} for s in range(1, 30)])


def _loads(workdir, tokens):
    records = []
    for step in (1, 10):
        load = load_of(tokens, np.ones(len(tokens)), MOE)
        records.append({"step": step, **{k: v.tolist() for k, v in load._asdict().items()}})
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


def test_a_rival_is_drawn_in_place_of_the_untrained_base(tmp_path, monkeypatch):
    for name, losses in (("ours", (4.0, 2.5)), ("theirs", (3.0, 2.75))):
        (tmp_path / name).mkdir()
        _metrics(tmp_path / name)
        scores = [{"name": f"step {s}", "step": s, "loss": losses[s > 0]} for s in (0, 29)]
        base = {"name": "dense base", "step": 0, "loss": 3.0}
        _write(tmp_path / name, "evals.jsonl", [base, *scores])
    said = []
    monkeypatch.setattr(
        matplotlib.axes.Axes, "legend",
        lambda axes, **_: said.append(axes.get_legend_handles_labels()[1]),
    )  # fmt: skip
    plot.draw(tmp_path / "ours")
    plot.draw(tmp_path / "ours", tmp_path / "theirs")
    alone, beside = (set(labels) for labels in said)
    base, ours = "held-out, dense base as loaded: 3.000", "held-out: 4.000 → 2.500"
    assert alone - beside == {base} and ours in alone & beside
    assert beside - alone == {"theirs: training", "theirs: held-out: 3.000 → 2.750"}
    (tmp_path / "theirs" / "metrics.jsonl").unlink()  # held-out losses are enough
    plot.draw(tmp_path / "ours", tmp_path / "theirs")
    assert set(said[2]) == beside - {"theirs: training"}
    with pytest.raises(InputError, match="nowhere holds neither"):
        plot.draw(tmp_path / "ours", tmp_path / "nowhere")


def test_the_running_mean():
    np.testing.assert_allclose(plot._running_mean([1.0, 3.0, 5.0, 1.0], 2), [1, 2, 4, 3])


def _has(picture, colour):
    """Pixels of this colour, of 255 a channel."""
    pixels = np.round(matplotlib.image.imread(picture)[..., :3] * 255)
    return (np.abs(pixels - colour).max(axis=-1) <= 2).sum()


def test_loads_have_their_colours_and_the_dead_are_black(tmp_path):
    tokens = np.full((2, 16), 64)
    _loads(tmp_path, tokens)
    black = _has(plot.draw_load(tmp_path), (0, 0, 0))
    tokens[1, :8] = 0
    tokens[0, 5] = 64 * 40
    _loads(tmp_path, tokens)
    picture = plot.draw_load(tmp_path)
    # Eight of 32 cells of a map that takes more than a fifth of the picture.
    size = np.prod(matplotlib.image.imread(picture).shape[:2])
    assert _has(picture, (0, 0, 0)) - black > size / 5 * 8 / 32
    heaviest = np.array(plot.colours()(1.0)[:3]) * 255
    assert _has(picture, heaviest) > size / 5 / 32 / 2


def test_the_command_names_its_pictures_and_its_mistakes(tmp_path, capsys):
    _metrics(tmp_path)
    _loads(tmp_path, np.full((1, 16), 3))
    assert invoke("plot", tmp_path) == 0
    wanted = [str(tmp_path / "loss.png"), str(tmp_path / "load.png")]
    assert capsys.readouterr().out.split() == wanted
    assert invoke("plot", tmp_path / "nowhere") == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
