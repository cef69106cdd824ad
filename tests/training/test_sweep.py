"""A sweep: its plan, what it refuses, a stop in the middle, its summary."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.studies import record
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.json_files import read_json, read_lines
from finermoe_jax.training import sweep
from finermoe_jax.training.history import read_history
from tests.support import ROOT, assert_refused, command
from tests.support.training import tiny_run

CONFIG = '''
from ml_collections import ConfigDict
from finermoe_jax import default_config
from tests.support.training import TINY

def get_config(variant: str = "") -> ConfigDict:
    config = default_config()
    for group, values in TINY.items():
        config[group] = values if group == "dense" else {**config[group], **values}
    config.moe = None
    if variant == "short":
        config.data.sequence_length //= 2
    else:
        config.optimizer.learning_rate = {"": 1e-2, "slow": 1e-3, "broken": -1.0}[variant]
    return config
'''  # fmt: skip


@pytest.fixture
def config(tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG)
    return tmp_path / "tiny.py"


def test_names_of_variants():
    assert sweep.variant_names([("demo", ""), ("demo:8,2,1,2", "8,2,1,2")]) == ["base", "8,2,1,2"]
    with pytest.raises(
        InputError, match=r"--config=a\.py:x and --config=b\.py:x are both called x"
    ):
        sweep.variant_names([("a.py:x", "x"), ("b.py:x", "x")])


def test_every_variant_has_a_first_seed_early(tmp_path):
    runs = sweep.plan(tmp_path, {"a": tiny_run(), "b": tiny_run(steps=7)}, 2)
    assert [(run.variant, run.seed, run.steps) for run in runs] == [
        ("a", 0, 4), ("b", 0, 7), ("a", 1, 4), ("b", 1, 7)
    ]  # fmt: skip
    assert runs[3].workdir == tmp_path / "b" / "seed1"
    assert not any(run.done for run in runs)


def test_seeds_of_an_earlier_command_are_known(tmp_path):
    (tmp_path / "a" / "seed2").mkdir(parents=True)
    variants = {"a": tiny_run(), "b": tiny_run()}
    assert [(run.variant, run.seed) for run in sweep.every_run(tmp_path, variants, 1)] == [
        (name, seed) for seed in range(3) for name in "ab"
    ]
    assert len(sweep.every_run(tmp_path, variants, 4)) == 8


def test_another_sweep_is_refused_and_a_larger_one_is_not(tmp_path):
    folder, variants = tmp_path / "sweep", {"a": tiny_run(), "b": tiny_run(steps=7)}
    with (
        sweep.claimed(folder, variants),
        pytest.raises(InputError, match="in use"),
        sweep.claimed(folder, variants),
    ):
        pass
    with sweep.claimed(folder, variants | {"c": tiny_run(steps=9)}):
        pass
    for others, words in (
        ({"a": tiny_run()}, "b, c is not given"),
        (variants | {"c": tiny_run()}, "another config of c\n.*train.steps: 9 there, 4 in"),
    ):
        with pytest.raises(InputError, match=words), sweep.claimed(folder, others):
            pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="holds no sweep"), sweep.claimed(tmp_path / "other", {}):
        pass


def test_hours_done_and_left(tmp_path):
    variants = {"a": tiny_run(steps=100), "b": tiny_run(steps=200)}
    runs = sweep.plan(tmp_path, variants, 2)
    assert sweep.status(runs).splitlines()[-1] == "0 of 4 runs done in 0.00 h, unknown time left"
    # 36 s a step: the two runs of `a` have 1 h left each, and those of `b`, by its speed, 2 h.
    (runs[0].workdir).mkdir(parents=True)
    line = {"step": 10, "step_seconds": 35.0, "pause_seconds": 10.0}
    (runs[0].workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    lines = sweep.status(runs).splitlines()
    assert lines[1].split("seed 0")[1].strip() == "step 0 of 200, 2.00 h left"
    assert lines[-1].endswith("6.00 h left")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir={}/s"], ["--config is needed"]),
        (["--config={}/tiny.py"], ["--workdir is required"]),
        (["--config={}/tiny.py", "--workdir={}/s", "--seeds=0"], ["--seeds=0 must be at least 1"]),
        (["--config={}/tiny.py", "--config={}/tiny.py", "--workdir={}/s"], ["both called base"]),
        (["--config={}/tiny.py:broken", "--workdir={}/s"], ["optimizer.learning_rate=-1.0"]),
        (["--config={}/tiny.py", "--config.train.stpes=3", "--workdir={}/s"],
         ["has no field 'stpes'. Did you mean 'steps'?"]),
        (["--config={}/tiny.py", "--config.data.seed=7", "--workdir={}/s"],
         ["--config.data.seed=7: a sweep sets the seeds itself, 0 to 2"]),
        (["--config={}/tiny.py", "--config.data.eval_fraction=0", "--workdir={}/s"],
         ["base holds out no text"]),
        (["--config={}/tiny.py", "--config={}/tiny.py:short", "--workdir={}/s"],
         ["base and short could not be compared: data.sequence_length is"]),
        (["--config=demmo", "--workdir={}/s"], ["Did you mean demo?"]),
    ],
)  # fmt: skip
def test_wrong_command_lines(config, tmp_path, arguments, words):
    result = command("sweep", *(each.format(tmp_path) for each in arguments))
    assert_refused(result, *words)
    assert not (tmp_path / "s").exists()


@pytest.mark.nightly
def test_a_sweep_that_is_stopped_resumes_and_sums_up(config, tmp_path):
    folder = tmp_path / "sweep"
    arguments = [
        sys.executable, "-m", "finermoe_jax", "sweep", f"--config={config}",
        f"--config={config}:slow", "--config.train.eval_every=2", "--seeds=1",
        f"--workdir={folder}",
    ]  # fmt: skip
    settings = {
        "env": os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}, "cwd": tmp_path,
        "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
    }  # fmt: skip
    with subprocess.Popen([*arguments, "--config.train.steps=400"], **settings) as first:
        metrics = folder / "base" / "seed0" / "metrics.jsonl"
        while first.poll() is None and not read_lines(metrics):
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        _, errors = first.communicate(timeout=300)
    assert first.returncode == 75, errors
    assert "The same command resumes the sweep" in errors and "Traceback" not in errors
    stopped = read_lines(metrics)[-1]["step"]
    assert 0 < stopped < 400
    other = command("sweep", *arguments[4:], "--list")
    assert_refused(command("sweep", *arguments[4:]), "another config of base", "train.steps: 400")
    assert f"step {stopped} of 4," in other.stdout

    steps = f"--config.train.steps={stopped + 2}"
    values = read_json(folder / "sweep.json")
    for variant in values.values():  # a sweep of fewer steps, so that it ends soon
        variant["train"]["steps"] = stopped + 2
    (folder / "sweep.json").write_text(json.dumps(values))
    run = folder / "base" / "seed0" / "config.json"
    run.write_text(run.read_text().replace('"steps": 400', f'"steps": {stopped + 2}'))
    done = subprocess.run([*arguments, steps], **settings, timeout=900)
    assert done.returncode == 0, done.stderr
    assert f"resumed from step {stopped}" in done.stdout
    summary = read_json(folder / "summary.json")
    assert {name: list(seeds) for name, seeds in summary.items()} == {"base": ["0"], "slow": ["0"]}
    for name, seeds in summary.items():
        assert seeds["0"] == read_history(folder / name / "seed0").final
    assert (folder / "comparison.png").stat().st_size > 10_000
    recorded = record.recorded(folder)["runs"]
    assert {name: list(seeds) for name, seeds in recorded.items()} == {
        "base": ["0"], "slow": ["0"]
    }  # fmt: skip
    for name, seeds in recorded.items():
        history = read_history(folder / name / "seed0")
        assert seeds["0"]["curve"]["loss"] == history.loss.tolist()
        assert seeds["0"]["parameters"] > 0 and seeds["0"]["step_seconds"] > 0
    assert "optimizer.learning_rate" in done.stdout
    listed = command("sweep", *arguments[4:], steps, "--list").stdout
    assert "2 of 2 runs done" in listed
    again = command("sweep", *arguments[4:], steps)  # nothing is trained again
    assert again.returncode == 0 and "run 1" not in again.stdout
