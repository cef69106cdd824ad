"""The shares of a run's wall time, over its restarts."""

import json
import time

import pytest

from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.training import goodput
from finermoe_jax.training.run import train
from finermoe_jax.training.workdir import Log
from tests.support import command
from tests.support.training import tiny_run


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def metrics(steps, seconds=2.0, waited=0.5):
    return [{"step": s, "step_seconds": seconds, "input_seconds": waited} for s in steps]


def test_shares_of_the_wall_time(tmp_path):
    write(tmp_path / "metrics.jsonl", metrics([10, 20]))  # every tenth step is logged
    kinds = {"starting": 4.0, "compiling": 6.0, "evaluating": 20.0, "saving": 10.0}
    records = [{"step": 0, "kind": kind, "seconds": value / 2} for kind, value in kinds.items()]
    write(tmp_path / goodput.LOG, records * 2)
    found = goodput.wall_seconds(tmp_path)
    assert {kind: value for kind, value in found.items() if value} == {
        "steps": 30.0, "input": 10.0, **kinds
    }  # fmt: skip
    assert goodput.report(tmp_path) == (
        "goodput 37.5% of 80 s: steps 37.5%, input 12.5%, starting 5.0%, compiling 7.5%, "
        "evaluating 25.0%, saving 12.5%"
    )


def test_a_run_of_before_has_none(tmp_path):
    assert goodput.report(tmp_path) == ""
    write(tmp_path / "metrics.jsonl", metrics([1]))
    assert goodput.report(tmp_path) == ""
    write(tmp_path / goodput.LOG, [{"step": 0}, {"step": 0, "kind": "new", "seconds": 1}])
    assert goodput.report(tmp_path).startswith("goodput 75.0% of 2 s")


def test_steps_that_a_resumed_run_makes_again_are_lost(tmp_path):
    write(tmp_path / "metrics.jsonl", metrics([2, 4, 6, 7]))
    Log(tmp_path).cut(4)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [2, 4]
    assert read_lines(tmp_path / goodput.LOG) == [{"step": 4, "kind": "lost", "seconds": 6.0}]
    Log(tmp_path).cut(4)
    assert goodput.wall_seconds(tmp_path)["lost"] == 6.0  # once


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run, what it said, and its seconds."""
    run, said = tmp_path_factory.mktemp("goodput") / "run", []
    began = time.perf_counter()
    train(tiny_run(), run, said.append)
    return run, said, time.perf_counter() - began


@pytest.mark.slow
def test_what_takes_long_is_announced(half):
    _, said, _ = half
    announced = [line for line in said if line.endswith("…")]
    assert announced == [
        "drawing random weights …",
        "evaluating step 0 on 4 held-out rows (compiles first) …",
        "compiling the training step …",
    ]
    assert said.index(announced[-1]) == said.index(
        next(line for line in said if line.startswith("compiled the step"))
    ) - 1  # fmt: skip


@pytest.mark.slow
def test_a_run_and_its_second_half(half):
    run, said, first = half
    began = time.perf_counter()
    train(tiny_run(steps=6), run, said.append, allow_changes=["train.steps"])
    both = first + time.perf_counter() - began
    kinds = [record["kind"] for record in read_lines(run / goodput.LOG)]
    assert kinds.count("starting") == kinds.count("compiling") == 2
    assert {"evaluating", "saving"} <= set(kinds)
    seconds = goodput.wall_seconds(run)
    # Drawing, and what no record covers, is little.
    assert 0.25 * both < sum(seconds.values()) < both
    assert seconds["lost"] == 0 and min(seconds["steps"], seconds["compiling"]) > 0
    assert said[-1] == goodput.report(run) and "goodput" in said[-1]
    assert command("plot", run).stdout.splitlines()[-1] == goodput.report(run)


@pytest.mark.parametrize(("before", "words"), [(None, "compiles first"), (8.4, "about 8 s")])
def test_an_evaluation_that_took_long_is_announced_with_its_time(before, words, monkeypatch):
    from types import SimpleNamespace

    from finermoe_jax.training import run as running

    said = []
    setup = SimpleNamespace(
        config=tiny_run(), data=SimpleNamespace(held_out=[1]), say=said.append,
        report_seconds=before,
    )  # fmt: skip
    monitor = SimpleNamespace(spending=lambda *_: __import__("contextlib").nullcontext())
    monkeypatch.setattr(running, "_evaluate", lambda *_: 2.0)
    assert running._report.__wrapped__(setup, monitor, "step 5", None, 5) == 2.0
    assert said == [f"evaluating step 5 on 4 held-out rows ({words}) …"]
    running._report.__wrapped__(setup, monitor, "step 6", None, 6)  # now known to be quick
    assert len(said) == 1
