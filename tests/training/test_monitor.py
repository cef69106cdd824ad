"""Load figures, and what one run tells: files, TensorBoard, W&B, a profile, what it compiles."""

import dataclasses
import gzip
import importlib.util
import json
import math
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from finermoe_jax.config.flops import training_flops
from finermoe_jax.config.model import MoEConfig
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.training import monitor as metrics
from finermoe_jax.training.monitor import Telemetry, check, load_of, read_steps
from finermoe_jax.training.run import train
from finermoe_jax.training.workdir import Log
from finermoe_jax.weights.source import open_model
from tests.support import load_preset
from tests.support.training import silent, tiny_run

MOE = MoEConfig(2, 2, 1, 2, 1)  # 8 experts: groups of 2, two candidates in each of two slots


def test_load_of_known_counts():
    tokens = np.array([[3] * 8, [12, 0, 0, 0, 6, 2, 4, 0]])
    load = load_of(tokens, np.array([1.0, 2.0]), MOE)
    np.testing.assert_allclose(load.entropy[0], 1.0)
    share = np.array([12, 6, 2, 4]) / 24
    np.testing.assert_allclose(load.entropy[1], -(share * np.log(share)).sum() / math.log(8))
    np.testing.assert_allclose(load.max_over_mean, [1.0, 4.0])
    np.testing.assert_array_equal(load.dead, [0, 4])
    np.testing.assert_allclose(load.candidates[1], [[1.0, 0.0], [8 / 12, 4 / 12]])
    # Of groups: [12, 0], [0, 0] (without a token), [6, 2] and [4, 0].
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    np.testing.assert_allclose(load.group_entropy[1], [[0, 0], [entropy, 0]], atol=1e-12)
    np.testing.assert_allclose(load.group_max_over_mean[1], [[2, 0], [1.5, 2]])
    np.testing.assert_array_equal(load.group_dead[1], [[1, 2], [0, 1]])
    np.testing.assert_allclose(load.group_entropy[0], 1.0)


def test_load_of_a_pool():
    """Layers 0 and 1 share 2 experts each: p = 2 e + j."""
    moe = MoEConfig(2, 1, 1, 1, 1, experts_across=2)
    tokens = np.array([[30, 5, 65, 0], [30, 5, 65, 0]])
    load = load_of(tokens, np.zeros(2), moe)
    np.testing.assert_allclose(load.foreign, [0.05, 0.95])
    np.testing.assert_allclose(load.starved, [0.25, 0.25])
    assert load_of(tokens, np.zeros(2), MoEConfig(4, 1, 1, 1, 1)).foreign is None
    np.testing.assert_array_equal(load_of(0 * tokens, np.zeros(2), moe).foreign, 0)


def test_load_of_a_pool_whose_layers_are_candidates():
    """Two slots, each with two candidate groups of two layers: p = 2 e + j."""
    moe = dataclasses.replace(MOE, experts_across=2, pooled_as="candidates")
    tokens = np.zeros((2, 16), int)
    tokens[0, [0, 2, 3, 5]] = 8, 4, 3, 1  # slot 0: experts 0 and 1 of layer 0; 1 and 2 of layer 1
    tokens[1, [8, 9, 10, 15]] = 1, 2, 3, 2  # slot 1: 4 and 5 of layer 0; 4 and 7 of layer 1
    load = load_of(tokens, np.zeros(2), moe)
    # Candidate groups in order: experts 0 and 1 of layer 0, of layer 1, 2 and 3 of layer 0, …
    wanted = np.array([[[12, 3, 0, 1], [0, 0, 0, 0]], [[0, 0, 0, 0], [4, 2, 0, 2]]])
    np.testing.assert_allclose(
        load.candidates, wanted / np.maximum(wanted.sum(2, keepdims=True), 1)
    )
    np.testing.assert_array_equal(load.group_dead[0, 0], [0, 1, 2, 1])
    np.testing.assert_allclose(load.group_max_over_mean[1, 1], [1.5, 2, 0, 2])
    assert len(metrics._load_scalars(load)) == 2 * (6 + 8 * 4)


def test_load_of_one_expert_and_of_no_token():
    one = load_of(np.array([[5], [0]]), np.zeros(2), MoEConfig(1, 1, 1, 1, 1))
    np.testing.assert_array_equal(one.entropy, [1.0, 0.0])
    assert np.isfinite(load_of(np.zeros((1, 8), int), np.zeros(1), MOE).entropy).all()


@pytest.mark.parametrize("text", ["3", "a:b", "0:2", "5:4", "1:2:3", "-1:2"])
def test_ranges_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="must be FIRST:LAST"):
        read_steps(text)


def test_steps_that_are_not_run_and_missing_packages_are_named(monkeypatch):
    assert read_steps("") is None and read_steps("4:9") == (4, 9)
    with pytest.raises(InputError, match="0:4 must be within this run's 1:10"):
        check(Telemetry(profile_steps=(0, 4)), steps=10)
    with pytest.raises(InputError, match="9:11 must be within this run's 1:10"):
        check(Telemetry(profile_steps=(9, 11)), steps=10)
    with pytest.raises(InputError, match="--peak_tflops=0 must be positive"):
        check(Telemetry(peak_flops=0.0), 10)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--tensorboard needs tensorboardX.*finermoe-jax\[tens"):
        check(Telemetry(tensorboard=True), 10)
    with pytest.raises(InputError, match=r"--wandb=mine needs wandb.*'finermoe-jax\[wandb\]'"):
        check(Telemetry(wandb="mine"), 10)


def test_a_resumed_run_drops_later_records_and_json_knows_no_nan(tmp_path):
    log = Log(tmp_path)
    for step in (1, 10, 20):
        log.append("expert_load.jsonl", {"step": step, "entropy": [float("nan"), 0.5]})
    log.cut(10)
    assert read_lines(tmp_path / "expert_load.jsonl") == [
        {"step": 1, "entropy": [None, 0.5]}, {"step": 10, "entropy": [None, 0.5]},
    ]  # fmt: skip


def test_the_progress_line_where_nothing_can_be_overwritten(capsys):
    bar = metrics._progress(10, 4)
    bar.set_postfix_str("loss 1.000", refresh=False)
    bar.update(6)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert "4/10" in lines[0] and "10/10" in lines[-1] and lines[-1].endswith(", loss 1.000")


def test_speed_is_of_the_whole_interval_without_its_pauses(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    config = load_preset("demo_dense")
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, steps=5, log_every=2)
    )
    monitor = metrics.Monitor(
        tmp_path, config, config.dense, Telemetry(peak_flops=1e9), 0, devices=2
    )
    values = {"loss": np.float32(np.nan), "expert_tokens": np.zeros((0, 0), int)}
    values["tokens"] = 16 * 256

    def step(number):
        with monitor.waiting():
            now[0] += 0.5
        now[0] += 2.5
        monitor.step(number, values)

    step(1)
    with monitor.pause():
        now[0] += 1000
    for number in range(2, 6):
        step(number)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5]
    speed = 16 * 256 / 3
    for line, pause in zip(lines, (1000, 0, 0), strict=True):
        assert line["loss"] is None and "load_entropy" not in line
        assert line["step_seconds"] == pytest.approx(3) and line["pause_seconds"] == pause
        assert line["input_seconds"] == pytest.approx(0.5)
        assert line["tokens_per_second"] == pytest.approx(speed)
        mfu = speed * training_flops(config.dense, 256) / 2e9
        assert line["mfu"] == pytest.approx(mfu)
    assert not (tmp_path / "expert_load.jsonl").exists()


# --- one run that shows all of it -----------------------------------------------------------


class Run:
    """Broken off at step 6 with all that can be asked for, then resumed and finished."""

    def __init__(self, workdir):
        self.workdir, self.compiled, self.seen = workdir, [], 0
        tiny = tiny_run(steps=6, eval_every=2, checkpoint_every=2, load_every=4, remat="dots")
        self.config = dataclasses.replace(
            tiny,
            dense=dataclasses.replace(tiny.dense, num_hidden_layers=4),
            moe=MoEConfig(4, 2, 1, 2, 1),
            prompts=("Return the",),
            prompt_tokens=2,
            data=dataclasses.replace(tiny.data, sequence_length=32),
        )
        everything = Telemetry(True, "test", profile_steps=(3, 4), peak_flops=1e12)
        finished = metrics.Monitor.step

        def step(monitor, number, values):
            self.seen = number
            finished(monitor, number, values)

        def listen(name, seconds, **_):
            if name == "/jax/core/compile/backend_compile_duration":
                self.compiled.append(self.seen)

        metrics.Monitor.step = step
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            with pytest.raises(Stop):
                train(self.config, workdir, self.stop, everything)
        finally:
            metrics.Monitor.step = finished
            jax.monitoring.unregister_event_duration_listener(listen)
        # The same command goes on: steps 3 and 4 are not made again, nor traced.
        train(self.config, workdir, lambda _: None, everything)

    def stop(self, message):
        """Raises before step 6 is saved."""
        if message.startswith("held-out loss  step 6"):
            raise Stop


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    before = {k: os.environ.get(k) for k in ("WANDB_MODE", "WANDB_SILENT")}
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    yield Run(tmp_path_factory.mktemp("run") / "watched")
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.mark.nightly
def test_nothing_compiles_after_step_2(run):
    """Not at the second held-out score and the second save either."""
    assert run.compiled.count(0) > 10 and run.seen == 6
    assert [step for step in run.compiled if step >= 2] == []


@pytest.mark.nightly
def test_lines_and_records_agree(run):
    lines = read_lines(run.workdir / "metrics.jsonl")
    records = read_lines(run.workdir / "expert_load.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records] == [1, 4, 6]
    needed = training_flops(open_model(run.workdir).config, 32)
    for line in lines:
        speed = line["tokens_per_second"]
        assert speed * line["step_seconds"] == pytest.approx(8 * 32)
        devices = jax.device_count()
        assert line["tokens_per_second_per_device"] == pytest.approx(speed / devices)
        assert line["mfu"] == pytest.approx(speed * needed / (devices * 1e12))
        assert line["input_seconds"] >= 0 and 0.1 < line["memory_gib"] < 100
    # What comes after a save and a held-out score says how long they took.
    assert lines[2]["pause_seconds"] > 0 == lines[1]["pause_seconds"]
    moe = run.config.moe
    for record in records:
        tokens, line = np.array(record["tokens"]), lines[record["step"] - 1]
        assert tokens.shape == (4, moe.num_experts)
        np.testing.assert_array_equal(tokens.sum(axis=1), 8 * 32 * moe.num_active)
        assert line["dead_experts"] == (tokens == 0).sum() == sum(record["dead"])
        assert line["load_entropy"] == pytest.approx(min(record["entropy"]), abs=1e-4)
        assert line["load_max_over_mean"] == pytest.approx(max(record["max_over_mean"]), abs=1e-4)
        assert line["aux_loss"] == pytest.approx(sum(record["aux_loss"]), abs=1e-3)
        np.testing.assert_allclose(np.sum(record["candidates"], axis=2), 1.0, atol=2e-4)


def events(path):
    """The events of a TensorBoard file: records of length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, found = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


@pytest.mark.nightly
def test_tensorboard_shows_each_step_once(run):
    first, second = (events(p) for p in sorted((run.workdir / "tensorboard").iterdir()))
    # From here on what the first file says is not shown.
    assert [e.step for e in second if e.HasField("session_log")] == [5]
    shown = [e for e in first if e.step < 5] + second
    scalars = {(v.tag, e.step): v.simple_value for e in shown for v in e.summary.value}
    for line in read_lines(run.workdir / "metrics.jsonl"):
        assert scalars["train/loss", line["step"]] == pytest.approx(line["loss"], rel=1e-6)
    for record in read_lines(run.workdir / "expert_load.jsonl"):
        value = scalars["load_entropy/layer_03", record["step"]]
        assert value == pytest.approx(record["entropy"][3], abs=1e-4)
    assert {step for tag, step in scalars if tag == "held_out/loss"} == {0, 2, 4, 6}


@pytest.mark.nightly
def test_weights_and_biases_goes_on_with_the_same_run(run):
    name = (run.workdir / "wandb_run_id").read_text().strip()
    parts = sorted((run.workdir / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and all(part.name.endswith(name) for part in parts)
    for part in parts:
        data = (part / f"run-{name}.wandb").read_bytes()
        assert b"train/loss" in data and b"load_entropy/layer_00" in data


@pytest.mark.nightly
def test_the_profile_holds_the_steps_that_were_asked_for(run):
    (place,) = (run.workdir / "profile" / "plugins" / "profile").iterdir()
    assert list(place.glob("*.xplane.pb"))
    trace = json.loads(gzip.decompress((place / "perfetto_trace.json.gz").read_bytes()))
    steps = [e["args"]["step_num"] for e in trace["traceEvents"] if e.get("name") == "train"]
    assert sorted(map(int, steps)) == [3, 4]


@pytest.mark.nightly
def test_forced_balance_is_even_and_marked_in_every_line(run, tmp_path):
    settings = dataclasses.replace(run.config.train, steps=2, force_balance=True)
    train(dataclasses.replace(run.config, train=settings, prompts=()), tmp_path / "run", silent)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["force_balance"] for line in lines] == [True, True]
    for record in read_lines(tmp_path / "run" / "expert_load.jsonl"):
        assert {count for layer in record["tokens"] for count in layer} == {32}  # 256 · 2 / 16
    assert "force_balance" not in read_lines(run.workdir / "metrics.jsonl")[0]
