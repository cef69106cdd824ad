"""Runs compared: figures of their logs, groups by seed, the table and the picture."""

import dataclasses
import json
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from finermoe_jax.config.flops import training_flops
from finermoe_jax.config.model import MoEConfig
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.training import compare as comparing
from finermoe_jax.training.compare import compare, draw, summary, table
from finermoe_jax.training.history import read_history, setting_differences, shortest_ends
from finermoe_jax.training.run import train
from finermoe_jax.weights.checkpoint import load_checkpoint
from tests.support import command
from tests.support.training import silent, tiny_run


def with_seed(config, seed):
    data, train = (dataclasses.replace(part, seed=seed) for part in (config.data, config.train))
    return dataclasses.replace(config, data=data, train=train)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of one config, and another learning rate; scored every second step."""
    place, config = tmp_path_factory.mktemp("runs"), tiny_run(eval_every=2)
    slower = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-3)
    )
    wanted = {
        "fast/seed0": with_seed(config, 0),
        "fast/seed1": with_seed(config, 1),
        "slow": slower,
    }
    for name, each in wanted.items():
        train(each, place / name, silent)
    return place


def copy_of(run, tmp_path, change):
    """A copy of a run with another config.json."""
    target = shutil.copytree(run, tmp_path / "copy")
    values = json.loads((target / "config.json").read_text())
    change(values)
    (target / "config.json").write_text(json.dumps(values))
    return target


@pytest.mark.nightly
def test_a_history_follows_the_logs(runs):
    history, lines = read_history(runs / "slow"), read_lines(runs / "slow" / "metrics.jsonl")
    assert history.steps.tolist() == [0, 2, 4]
    scores = [e["loss"] for e in read_lines(runs / "slow" / "evals.jsonl")]
    assert history.loss.tolist() == scores
    # Rows of 16 tokens, 8 of them a step; none is padding.
    np.testing.assert_allclose(history.tokens, [0, 2 * 128, 4 * 128], rtol=1e-9)
    model = load_checkpoint(runs / "slow").config
    np.testing.assert_allclose(history.flops, history.tokens * training_flops(model, 16))
    np.testing.assert_allclose(history.seconds[-1], sum(line["step_seconds"] for line in lines))
    assert history.final["held_out_loss"] == scores[-1]


@pytest.mark.nightly
def test_steps_between_logged_ones_count(runs, tmp_path):
    run = shutil.copytree(runs / "slow", tmp_path / "sparse")
    line = {"tokens_per_second": 100.0, "step_seconds": 2.0, "pause_seconds": 0.0}
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, **line}) + "\n" for step in (3, 4))
    )
    history = read_history(run)
    np.testing.assert_allclose(history.seconds, [0, 4, 8])
    np.testing.assert_allclose(history.tokens, [0, 400, 800])


@pytest.mark.nightly
def test_runs_that_differ_in_seeds_alone_are_one_group(runs):
    groups = compare([runs / "fast/seed0", runs / "slow", runs / "fast/seed1"])
    assert [(group.name, len(group.runs)) for group in groups] == [("fast", 2), ("slow", 1)]
    assert setting_differences(groups) == {"optimizer.learning_rate": [1e-2, 1e-3]}
    text = table(groups)
    losses = [read_history(runs / f"fast/seed{seed}").loss[-1] for seed in (0, 1)]
    assert f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}" in text
    assert f"{min(losses):.4f} … {max(losses):.4f}" in text
    assert losses[0] != losses[1]
    assert "optimizer.learning_rate" in text and "train.seed" not in text
    found = summary(groups)
    assert found["groups"]["fast"]["held_out_loss_mean"] == pytest.approx(np.mean(losses))
    assert found["groups"]["slow"]["held_out_loss_std"] is None
    assert found["differences"] == {"optimizer.learning_rate": {"fast": 1e-2, "slow": 1e-3}}


@pytest.mark.nightly
def test_a_dense_run_beside_one_with_experts(runs, tmp_path):
    def with_experts(values, **changes):
        values["moe"] = dataclasses.asdict(MoEConfig(4, 2, 1, 2, 1, **changes))

    mixed = copy_of(runs / "slow", tmp_path, with_experts)
    other = copy_of(runs / "slow", tmp_path / "b", lambda v: with_experts(v, norm_topk_prob=True))
    assert setting_differences(compare([runs / "slow", mixed])) == {"moe": [None, "…"]}
    assert setting_differences(compare([runs / "slow", mixed, other])) == {
        "moe": [None, "…", "…"], "moe.norm_topk_prob": [None, False, True]
    }  # fmt: skip


@pytest.mark.nightly
def test_names_are_as_long_as_they_must_be(runs):
    names = [group.name for group in compare([runs / "fast/seed0", runs / "slow"])]
    assert names == ["fast", "slow"]  # not "seed0"
    assert shortest_ends([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert shortest_ends([Path("/a/x"), Path("/b/x"), Path("/b/y")]) == ["a/x", "b/x", "b/y"]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("sequence_length", 8, "data.sequence_length is 16 there and 8 here"),
        ("eval_windows", 2, "data.eval_windows is 4 there and 2 here"),
        ("eval_fraction", 0.1, "data.eval_fraction is 0.05 there and 0.1 here"),
    ],
)
def test_other_held_out_text_is_refused(runs, tmp_path, field, value, words):
    other = copy_of(runs / "slow", tmp_path, lambda values: values["data"].update({field: value}))
    with pytest.raises(InputError, match=words):
        compare([runs / "slow", other])


@pytest.mark.nightly
@pytest.mark.parametrize("part", ["tokenizer_sha256", "sources"])
def test_another_tokenizer_or_text_is_refused(runs, tmp_path, part):
    other = copy_of(runs / "slow", tmp_path, lambda values: None)
    data = json.loads((other / "data.json").read_text())
    if part == "sources":
        data["sources"][0]["tokens"] = -1
    else:
        data[part] = "0"
    (other / "data.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="cannot be compared"):
        compare([runs / "slow", other])


@pytest.mark.nightly
def test_the_text_may_lie_elsewhere(runs, tmp_path):
    other = copy_of(runs / "slow", tmp_path, lambda values: values["data"].update(path="moved.txt"))
    data = json.loads((other / "data.json").read_text())
    data["sources"][0]["path"] = "moved.txt"
    (other / "data.json").write_text(json.dumps(data))
    assert len(compare([runs / "slow", other])) == 2


@pytest.mark.nightly
def test_what_is_no_run_is_refused(runs, tmp_path):
    with pytest.raises(InputError, match=r"nowhere holds no config\.json"):
        compare([tmp_path / "nowhere"])
    unscored = shutil.copytree(runs / "slow", tmp_path / "unscored")
    (unscored / "evals.jsonl").unlink()
    with pytest.raises(InputError, match="has no held-out loss"):
        compare([unscored])
    (unscored / "evals.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="not a training run's"):
        compare([unscored])


@pytest.mark.nightly
def test_the_commands(runs, tmp_path):
    pair = [runs / "fast/seed0", runs / "slow"]
    result = command("compare", *pair, f"--output={tmp_path / 'found.json'}")
    assert result.returncode == 0 and result.stdout.rstrip() == table(compare(pair))
    assert json.loads((tmp_path / "found.json").read_text()) == summary(compare(pair))
    assert command("compare").returncode == 2
    drawn = command("plot", *pair)
    assert drawn.returncode == 0
    assert drawn.stdout.splitlines()[-1] == str(runs / "fast/seed0" / "comparison.png")
    assert table(compare(pair)) in drawn.stdout


@pytest.mark.nightly
def test_the_picture(runs, tmp_path, monkeypatch):
    groups = compare([runs / "fast/seed0", runs / "fast/seed1", runs / "slow"])
    labels = []
    monkeypatch.setattr(
        comparing.style, "label_ends", lambda axes, ends: labels.append((axes, ends))
    )
    path = draw(groups, tmp_path / "picture.png")
    assert matplotlib.image.imread(path).shape[1] > 1000
    [(axes, ends)] = labels
    assert [text.split(":")[0] for text in ends.values()] == ["fast", "slow"]
    mean, alone = ends
    fast = [read_history(runs / f"fast/seed{seed}") for seed in (0, 1)]
    np.testing.assert_allclose(mean.get_ydata(), np.mean([run.loss for run in fast], axis=0))
    np.testing.assert_allclose(alone.get_xdata(), read_history(runs / "slow").seconds)
    assert len(axes.collections) == 1  # the band of the group with two seeds


@pytest.mark.nightly
def test_a_bad_start_does_not_flatten_the_rest(runs):
    history = read_history(runs / "slow")

    def group(*losses):
        return comparing.Group("a", (dataclasses.replace(history, loss=np.array(losses)),))

    low, high = comparing.visible([group(9.0, 2.2, 2.0)])
    assert low < 2.0 and 2.2 < high < 2.5
    assert comparing.visible([group(2.5, 2.2, 2.0)])[1] > 2.5
