"""Runs that are killed, stopped, damaged, short of room, or fed what breaks them."""

import dataclasses
import json
import math
import random
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import kill_campaign
from benchmarks.kill_campaign import (
    arrays,
    assert_same,
    disk,
    interrupt,
    kill_once,
    lines,
    logged,
    straight,
)
from finermoe_jax.config.run import MeshConfig
from finermoe_jax.data import batches as data
from finermoe_jax.data.packing import Batch
from finermoe_jax.data.tokenizers import open_tokenizer
from finermoe_jax.errors import InputError, RunEnded
from finermoe_jax.layers import sharding
from finermoe_jax.layers.parameters import kinds
from finermoe_jax.runtime.files import find
from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.runtime.locks import Lock
from finermoe_jax.runtime.preemption import stop_requests
from finermoe_jax.training.checkpoints import TrainingCheckpoints, skipped_in_a_row
from finermoe_jax.training.optimizer import optimizer
from finermoe_jax.training.run import train
from finermoe_jax.training.step import batch_loss, init_optimizer, jit_step
from finermoe_jax.training.workdir import claim, fill_workdir
from finermoe_jax.weights.checkpoint import load_checkpoint, save_checkpoint
from finermoe_jax.weights.integrity import damage, saved_steps
from tests.support.processes import Process
from tests.support.training import (
    MOE,
    TINY,
    mixture_model,
    random_tokens,
    silent,
    small_run,
    tiny_run,
)

# --- processes that end -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory for runs; processes start as forks, with one cache of compiled programs."""
    starts = SimpleNamespace(**vars(subprocess) | {"Popen": Process})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kill_campaign, "subprocess", starts)
        yield tmp_path_factory.mktemp("killed")


@pytest.mark.nightly
def test_killed_and_stopped_runs_end_as_the_straight_one(folder):
    """The short form of benchmarks/kill_campaign.py."""
    chance, steps = random.Random(0), 60
    whole = straight(folder, "straight", steps)
    assert [line["step"] for line in lines(whole)] == list(range(1, steps + 1))
    found = kill_once(folder, folder / "ended", steps, "saving", 0, chance)
    assert not found["done"] and logged(folder / "ended") >= 25
    interrupt(folder, folder / "ended", steps, [(30, signal.SIGTERM, 1)], chance)
    assert_same(folder / "ended", whole)
    said = (folder / "ended.0.log").read_text()
    stopped = next(line for line in said.splitlines() if line.startswith("stopped on request"))
    step = stopped.split()[5].rstrip(".")
    assert f"Resume from step {step} with --workdir={folder / 'ended'}" in stopped
    assert f"resumed from step {step} of {steps}" in said


@pytest.mark.nightly
def test_a_full_disk_is_said_and_what_is_saved_stays(folder):
    # Step 0, whose moments are zeros, has room on it; step 25 finds out while it is written.
    found = disk(folder, 30, "2600k")
    if found is None:
        pytest.skip("needs to mount a tmpfs (unshare -rm), which this system refuses")
    first, second, copy = found
    assert (first, second) == (1, 0)
    said = (folder / "disk.0.log").read_text()
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert "could not be written: the disk of" in said and "Complete checkpoints: step 0." in said
    assert "resumed from step 0 of 30" in said
    assert [line["step"] for line in lines(copy)] == list(range(1, 31))
    assert len(arrays(copy)) > 0


def test_signals_are_remembered_and_handlers_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with stop_requests() as must_stop:
            assert not must_stop(1)
            signal.raise_signal(number)
            assert must_stop(2)
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_second_ctrl_c_ends_at_once():
    program = (
        "import signal\nfrom finermoe_jax.runtime.preemption import stop_requests\n"
        "with stop_requests() as must_stop:\n"
        "    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):\n"
        "        signal.raise_signal(number); print(must_stop(1), flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "True\n" * 3)


# --- checkpoints that are damaged -------------------------------------------------------------


def _largest(step, item):
    return max((step / item).rglob("*"), key=lambda p: p.stat().st_size * p.is_file())


def _flip(step):
    path = _largest(step, "params")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path, "has checksum"


def _truncate(step):
    path = _largest(step, "params")
    path.write_bytes(path.read_bytes()[:-1])
    return path, "bytes"


def _delete(step):
    path = _largest(step, "params")
    path.unlink()
    return path, "is missing"


def _delete_checksums(step):
    (step / "checksums.json").unlink()
    return step / "checksums.json", "is missing"


def _flip_config(step):
    path = step / "config" / "metadata"
    path.write_text(path.read_text().replace('"rope_theta": 1', '"rope_theta": 2'))
    return path, "has checksum"


@pytest.mark.nightly
@pytest.mark.parametrize("harm", [_flip, _truncate, _delete, _delete_checksums, _flip_config])
def test_readers_take_the_one_before_a_damaged_checkpoint(harm, finished, tmp_path, capfd):
    workdir = shutil.copytree(finished, tmp_path / "run")
    step = workdir / "checkpoints" / "4"
    path, words = harm(step)
    found = nnx.to_flat_state(nnx.state(load_checkpoint(workdir)))
    warning = capfd.readouterr().err
    assert "checkpoints/4 is damaged" in warning and path.name in warning and words in warning
    for (_, a), (_, b) in zip(
        found, nnx.to_flat_state(nnx.state(load_checkpoint(finished / "checkpoints" / "2"))),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(a[...], b[...])
    with pytest.raises(InputError, match=f"checkpoints/4 is damaged: .*{path.name}"):
        load_checkpoint(step)
    assert saved_steps(workdir / "checkpoints") == [0, 2, 4]  # a reader changes nothing


@pytest.mark.nightly
def test_damage_to_the_optimizer_is_the_runs_alone(finished, tmp_path, capfd):
    workdir = shutil.copytree(finished, tmp_path / "run")
    _largest(workdir / "checkpoints" / "4", "optimizer").write_bytes(b"")
    load_checkpoint(workdir)
    assert "damaged" not in capfd.readouterr().err
    assert damage(workdir / "checkpoints" / "4")


@pytest.mark.nightly
def test_checkpoints_from_before_checksums_are_read(finished, tmp_path):
    step = shutil.copytree(finished, tmp_path / "run") / "checkpoints" / "4"
    values = json.loads((step / "config" / "metadata").read_text())
    del values["checksums"]
    (step / "config" / "metadata").write_text(json.dumps(values))
    (step / "checksums.json").unlink()
    load_checkpoint(step)


@pytest.mark.slow
def test_a_converted_checkpoint_has_checksums(tmp_path):
    save_checkpoint(mixture_model(), tmp_path / "model")
    load_checkpoint(tmp_path / "model")
    _flip(tmp_path / "model")
    with pytest.raises(InputError, match="has checksum"):
        load_checkpoint(tmp_path / "model")


@pytest.mark.nightly
def test_a_run_goes_on_from_the_one_before_and_saves_the_step_again(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    steps = workdir / "checkpoints"
    path, _ = _flip(steps / "4")
    longer, said = tiny_run(steps=6), []
    with pytest.raises(InputError, match=r"--allow_changes=train\.steps"):
        train(longer, workdir, say=silent)
    train(longer, workdir, say=said.append, allow_changes=["train.steps"])
    warning = next(message for message in said if message.startswith("WARNING"))
    assert f"{path.name} has checksum" in warning and "when saved" in warning
    assert f"It was renamed to {steps / 'damaged-4'}. Step 2 is used instead." in warning
    assert "resumed from step 2 of 6" in said
    assert "train.steps changes from 4 to 6 after step 2" in said
    assert (steps / "damaged-4" / "params").is_dir() and saved_steps(steps) == [2, 4, 6]
    assert not damage(steps / "4")
    assert read_lines(workdir / "config_changes.jsonl") == [
        {"step": 2, "changes": {"train.steps": [4, 6]}}
    ]
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 6
    assert [line["step"] for line in lines(workdir)] == [1, 2, 3, 4, 5, 6]
    assert lines(workdir)[:2] == lines(finished)[:2]
    for step in (2, 4, 6):
        _flip(steps / str(step))
    for _ in range(2):  # nor does it begin anew when asked again
        with pytest.raises(InputError, match=r"no intact checkpoint: damaged-2, damaged-4, "):
            train(longer, workdir, say=silent)
    assert (steps / "damaged-4-2").is_dir()


@pytest.mark.slow
def test_the_best_are_kept_beside_the_newest(tmp_path):
    model = mixture_model()
    params = nnx.to_pure_dict(nnx.state(model))
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: math.nan, 5: None, 6: 4.0}
    keeper = TrainingCheckpoints(tmp_path, keep=1, keep_best=2)
    for step, loss in losses.items():
        keeper.save(step, model, params, {"count": jnp.int32(step)}, None, loss)
    keeper.close()
    assert saved_steps(tmp_path) == [2, 3, 6]
    again = TrainingCheckpoints(tmp_path, keep=1, keep_best=2)
    assert again.best_step() == 2 and again.latest_step() == 6
    again.save(7, model, params, {"count": jnp.int32(7)}, None, 1.5)
    again.close()
    assert saved_steps(tmp_path) == [2, 7]


def test_ranking_needs_scored_saves():
    with pytest.raises(InputError, match="needs held-out data"):
        tiny_run(TINY | {"data": TINY["data"] | {"eval_fraction": 0.0}}, keep_best=1)
    with pytest.raises(InputError, match="one a multiple of the other"):
        tiny_run(keep_best=1, steps=100, eval_every=33, checkpoint_every=10)


# --- whose workdir it is ----------------------------------------------------------------------


@pytest.mark.nightly
def test_a_busy_workdir_is_refused(finished):
    holder = Lock(finished, "--workdir")
    holder.take()
    with pytest.raises(InputError, match=r"in use by process \d+ on .*, since .*--workdir"):
        train(tiny_run(), finished, say=silent)
    load_checkpoint(finished)  # readers are welcome
    holder.close()
    again = Lock(finished, "--workdir")
    again.take()
    again.close()


def _claim(tmp_path, config, *allow):
    workdir = tmp_path / "run"
    if not workdir.exists():
        workdir.mkdir()
        fill_workdir(workdir, tiny_run(), find("demo/model"))
        (workdir / "checkpoints" / "0").mkdir()
    return claim(workdir, config, allow)


def test_changes_are_refused_field_by_field_unless_allowed(tmp_path):
    faster = dataclasses.replace(
        tiny_run(steps=9), optimizer=dataclasses.replace(tiny_run().optimizer, learning_rate=0.5)
    )
    assert _claim(tmp_path, tiny_run()) == {}
    with pytest.raises(InputError) as refused:
        _claim(tmp_path, faster, "optimizer")
    assert "learning_rate" not in str(refused.value)
    assert "train.steps: 4 in the run, 9 in the config" in str(refused.value)
    flag = str(refused.value).rpartition("--allow_changes=")[2]
    assert _claim(tmp_path, faster, *flag.split(",")) == {
        "optimizer.learning_rate": [0.01, 0.5],
        "train.steps": [4, 9],
    }
    assert _claim(tmp_path, dataclasses.replace(tiny_run(), mesh=MeshConfig(1, 1, 1, 1))) == {}


def test_what_a_checkpoint_is_made_of_cannot_change(tmp_path):
    wider = dataclasses.replace(
        tiny_run(), dense=dataclasses.replace(tiny_run().dense, vocab_size=4096)
    )
    with pytest.raises(InputError, match=r"dense.vocab_size: 2048 in.*cannot change") as refused:
        _claim(tmp_path, wider)
    assert "--allow_changes" not in str(refused.value)
    for name in ("dense", "dense.vocab_size", "optimizer.name", "train.param_dtype"):
        with pytest.raises(InputError, match=f"--allow_changes={name}: this field cannot change"):
            _claim(tmp_path, wider, name)
    with pytest.raises(InputError, match=r"no such field. Did you mean train.steps"):
        _claim(tmp_path, wider, "train.step")


def test_fields_that_are_newer_than_a_run_have_their_defaults(tmp_path):
    _claim(tmp_path, tiny_run())
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text())
    del values["train"]["keep_best"]
    path.write_text(json.dumps(values))
    assert _claim(tmp_path, tiny_run()) == {}
    assert _claim(tmp_path, tiny_run(keep_best=1, eval_every=2), "train") != {}


def test_a_workdir_of_a_run_killed_at_its_beginning_is_no_foreign_one(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    lock = Lock(tmp_path, "--workdir")
    lock.take()
    lock.close()
    assert claim(tmp_path, tiny_run()) == {}
    (tmp_path / "checkpoints" / "notes").write_text("")
    with pytest.raises(InputError, match="contains no run"):
        claim(tmp_path, tiny_run())


# --- what is not finite -----------------------------------------------------------------------


def _after(name, dtype, infinite=None):
    """A function from batches to the state after their steps, and which of them were left out.

    `infinite` is a token whose embedding is.
    """
    config = small_run(8)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name=name))
    model = mixture_model(dataclasses.replace(MOE, num_hidden_layers=1))
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    shardings, _ = sharding.param_shardings(model, mesh)
    graphdef, state = nnx.split(model)
    params = jax.tree.map(lambda x: x.astype(dtype), nnx.to_pure_dict(state))
    if infinite is not None:
        params["embed"]["weight"] = params["embed"]["weight"].at[infinite].set(jnp.inf)
    params = jax.device_put(params, shardings)
    tx = optimizer(config.optimizer, 10, kinds(model))
    opt_state = init_optimizer(tx, params, shardings, mesh)
    step, places = jit_step(graphdef, config, tx, params, opt_state, shardings, mesh)

    def after(batches):
        state = jax.device_put(jax.tree.map(jnp.copy, (params, opt_state)), places)
        skipped = []
        for batch in batches:
            *state, metrics = step(*state, Batch(batch))
            skipped.append(float(metrics["skipped"]))
        return jax.device_get(state), skipped

    return after


def _assert_bits(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "dtype"), [("adamw", "float32"), ("adafactor", "bfloat16")])
def test_a_step_that_is_not_finite_changes_no_bit(name, dtype):
    token = 63
    after = _after(name, dtype, infinite=token)
    good = jnp.where(random_tokens(8) == token, 0, random_tokens(8))
    bad = good.at[3, 5].set(token)
    with_bad, skipped = after([good, bad, bad, good])
    assert skipped == [0, 1, 1, 0]
    without, _ = after([good, good])
    _assert_bits(with_bad, without)
    assert np.isfinite(without[0]["lm_head"]["weight"].astype("float32")).all()


@pytest.mark.nightly
def test_loss_and_balance_and_gradient_each_leave_a_step_out(monkeypatch):
    """The first token of a batch says which of the three is infinite; the others are finite."""

    def spoilt(graphdef, config, params, batch, count=None, psr=None):
        total, told = batch_loss(graphdef, config, params, batch, count, psr)
        spoils = [jnp.where(batch.tokens[0, 0] == place, jnp.inf, 0.0) for place in range(3)]
        told["loss"] += spoils[0]
        told["layer_aux_loss"] += spoils[1]
        return total + spoils[2] * params["final_norm"]["scale"].sum(), told

    monkeypatch.setattr("finermoe_jax.training.step.batch_loss", spoilt)
    after = _after("adamw", "float32")
    batches = [random_tokens(8).at[0, 0].set(first) for first in (9, 0, 1, 2, 9)]
    found, skipped = after(batches)
    assert skipped == [0, 1, 1, 1, 0]
    _assert_bits(found, after([batches[0], batches[4]])[0])


@pytest.mark.nightly
def test_a_poisoned_run_leaves_steps_out_and_ends_with_their_batches(tmp_path):
    """A weight is infinite that only some windows use: a real run, from a real checkpoint."""
    config = tiny_run(
        TINY | {"data": TINY["data"] | {"eval_fraction": 0.0}}, steps=40, max_skipped_steps=2
    )
    tokenizer = open_tokenizer(find("demo/model"), 2048)
    windows = data.open_data(config.data, tokenizer, find("demo/model"), 2048).train
    batches = data.train_batches(windows, config.data, 0, range(8))
    seen = [set(next(batches).tokens.reshape(-1).tolist()) for _ in range(40)]
    # A token that comes once, then in two steps in a row.
    hits = {t: [i + 1 for i in range(40) if t in seen[i]][:3] for t in set.union(*seen) - seen[0]}
    end, once, token = min(
        (s[2], s[0], t) for t, s in hits.items() if len(s) == 3 and s[0] + 1 < s[1] == s[2] - 1
    )

    model = load_checkpoint(_saved(tmp_path / "sound", config))
    model.embed.weight[...] = model.embed.weight[...].at[token].set(jnp.inf)
    save_checkpoint(model, tmp_path / "poisoned", tokenizer=find("demo/model"))
    config = dataclasses.replace(config, dense=None, init_from=str(tmp_path / "poisoned"))
    said, workdir = [], tmp_path / "run"
    with pytest.raises(RunEnded, match=f"2 steps in a row, {end - 1} … {end}:") as ended:
        train(config, workdir, say=said.append)
    assert ended.value.code == 1 and f"step-{end}.npz" in str(ended.value)

    logged = read_lines(workdir / "metrics.jsonl")
    assert [m["step"] for m in logged] == list(range(1, end + 1))
    assert [m["step"] for m in logged if m["loss"] is None] == [once, end - 1, end]
    left_out = [(n >= once) + (n >= end - 1) + (n == end) for n in range(1, end + 1)]
    assert [m["skipped"] for m in logged] == left_out
    # The schedule goes by the updates made: a step left out and the next one have the same rate.
    rates = {m["step"]: m["learning_rate"] for m in logged}
    assert [n for n in range(1, end - 1) if rates[n] == rates[n + 1]] == [once]
    assert sum("was skipped: loss" in message for message in said) == 3
    # Each save holds an update more than the one before.
    assert saved_steps(workdir / "checkpoints") == list(range(0, end, 2))[-3:]
    for step in (once, end - 1, end):
        identity = json.loads((workdir / "nonfinite" / f"step-{step}.json").read_text())
        rows = windows.read([row["index"] for row in identity["rows"]]).tokens
        batch = next(data.train_batches(windows, config.data, step - 1, range(8))).tokens
        np.testing.assert_array_equal(rows, batch)
        assert all(row["first_token"] == 16 * row["index"] for row in identity["rows"])
    np.testing.assert_array_equal(
        np.load(workdir / "nonfinite" / f"step-{end}.npz")["tokens"], batch
    )
    # Going on meets the same batches, and goes on counting; now one of them is enough.
    said.clear()
    stricter = dataclasses.replace(config.train, max_skipped_steps=1)
    with pytest.raises(RunEnded, match="in 1 steps in a row"):
        train(
            dataclasses.replace(config, train=stricter), workdir, say=said.append,
            allow_changes=["train.max_skipped_steps"],
        )  # fmt: skip
    assert f"resumed from step {range(0, end, 2)[-1]} of 40" in said
    counted = [m["skipped"] for m in read_lines(workdir / "metrics.jsonl")]
    assert len(counted) >= end - 1 and counted == left_out[: len(counted)]
    _counts_across_a_restart(config, tmp_path / "two", end)


def _counts_across_a_restart(config, workdir, end):
    """A run that is broken off between the steps end - 1 and end, both left out: two in a row."""
    shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=end - 1))
    train(shorter, workdir, say=silent)
    newest = workdir / "checkpoints" / str(end - 1)
    assert skipped_in_a_row(newest) == 1
    with pytest.raises(RunEnded, match=f"2 steps in a row, {end - 1} … {end}:"):
        train(config, workdir, say=silent, allow_changes=["train.steps"])
    # Checkpoints of before do not tell it.
    metadata = newest / "config" / "metadata"
    values = json.loads(metadata.read_text())
    assert values.pop("skipped_in_a_row") == 1
    metadata.write_text(json.dumps(values))
    assert skipped_in_a_row(newest) == 0


def _saved(path, config):
    """A checkpoint of a model as training from scratch draws it."""
    from finermoe_jax.model.decoder import Decoder

    model = Decoder(config.dense, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    save_checkpoint(model, path)
    return path
