"""Checkpoints and logs that are gone, moved, unreadable, or removed while they are read."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from flax import nnx

from finermoe_jax.errors import InputError
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.runtime.files import find
from finermoe_jax.training.checkpoints import logged_bytes
from finermoe_jax.training.run import train
from finermoe_jax.training.workdir import Log, claim, fill_workdir
from finermoe_jax.weights import checkpoint, integrity
from finermoe_jax.weights import source as model_source
from finermoe_jax.weights.checkpoint import load_checkpoint, save_checkpoint
from finermoe_jax.weights.convert import convert
from finermoe_jax.weights.hf_weights import write_hf
from finermoe_jax.weights.integrity import saved_steps, set_aside_damaged, write_checksums
from finermoe_jax.weights.source import open_model, open_with_tokenizer, read_model
from tests.support.training import silent, tiny_run


def _files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- gone or moved ----------------------------------------------------------------------------


@pytest.mark.nightly
def test_a_run_whose_checkpoints_are_gone_is_refused(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").mkdir()
    before = _files(workdir)
    with pytest.raises(InputError, match=r"has logged 4 steps.* new --workdir.*remove metrics"):
        train(tiny_run(), workdir, say=silent)
    after = _files(workdir)
    assert {path: after[path] for path in before if path.name != ".lock"} == {
        path: data for path, data in before.items() if path.name != ".lock"
    }
    for file in Log.CUT:  # the way out that is named
        (workdir / file).unlink(missing_ok=True)
    assert claim(workdir, tiny_run()) == {}


def test_a_run_that_ended_before_its_first_checkpoint_blocks_nothing(tmp_path):
    fill_workdir(tmp_path, tiny_run(steps=9), find("demo/model"))
    (tmp_path / "tokenizer" / "merges.txt").write_text("of another tokenizer")
    (tmp_path / "checkpoints" / "0.orbax-checkpoint-tmp").mkdir()
    Log(tmp_path).append("evals.jsonl", {"name": "step 0", "step": 0, "loss": 1.0})
    assert claim(tmp_path, tiny_run(steps=4)) == {}
    fill_workdir(tmp_path, tiny_run(steps=4), find("demo/model"))
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 4
    assert not (tmp_path / "tokenizer" / "merges.txt").exists()


@pytest.mark.nightly
def test_a_checkpoint_knows_its_step(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    steps = workdir / "checkpoints"
    (steps / "4").rename(steps / "5")
    for read in (
        lambda: train(tiny_run(), workdir, say=silent),
        lambda: load_checkpoint(workdir),
        lambda: load_checkpoint(steps / "5"),
        lambda: open_model(steps),
    ):
        with pytest.raises(InputError, match=r"5 holds step 4: .*Rename it to .*checkpoints/4"):
            read()
    assert saved_steps(steps) == [0, 2, 5]
    (steps / "5").rename(tmp_path / "2024")  # a copy elsewhere may have any name
    load_checkpoint(tmp_path / "2024")
    (steps / "2").rename(steps / "4")
    (tmp_path / "2024").rename(steps / "2")
    with pytest.raises(InputError, match=r"4 holds step 2"):
        train(tiny_run(), workdir, say=silent)


@pytest.mark.nightly
def test_a_checkpoint_from_before_steps_were_stated_is_read(finished, tmp_path):
    step = shutil.copytree(finished, tmp_path / "run") / "checkpoints" / "4"
    values = json.loads((step / "config" / "metadata").read_text())
    del values["step"], values["logged"]
    (step / "config" / "metadata").write_text(json.dumps(values))
    write_checksums(step)
    set_aside_damaged(step.rename(step.with_name("6")).parent, pytest.fail)
    load_checkpoint(step.parent.parent)
    assert Log(step.parent.parent).lost(logged_bytes(step.with_name("6"))) == ""


@pytest.mark.nightly
def test_logs_that_were_shortened_are_told_once(finished, tmp_path):
    workdir, said = shutil.copytree(finished, tmp_path / "run"), []
    logged = logged_bytes(workdir / "checkpoints" / "4")
    assert Log(workdir).lost(logged) == ""
    assert logged["metrics.jsonl"] == (workdir / "metrics.jsonl").stat().st_size
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:9])
    (workdir / "evals.jsonl").unlink()
    train(tiny_run(), workdir, say=said.append)
    told = [message for message in said if message.startswith("WARNING")]
    assert len(told) == 1
    kept, whole = sum(map(len, lines[:3])), logged["metrics.jsonl"]
    assert f"metrics.jsonl has {kept} of {whole} bytes" in told[0]
    assert f"evals.jsonl has 0 of {logged['evals.jsonl']} bytes" in told[0]


# --- removed while it is read -----------------------------------------------------------------


@pytest.fixture
def training(tmp_path):
    """The steps of a run that keeps one checkpoint, and its next save."""
    steps = tmp_path / "run" / "checkpoints"
    steps.mkdir(parents=True)
    model = Decoder(tiny_run().dense, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    save_checkpoint(model, steps / "1", tokenizer=find("demo/model"))

    def save(*_):
        newest = saved_steps(steps)[-1]
        shutil.copytree(steps / str(newest), tmp_path / "next")
        (tmp_path / "next").rename(steps / str(newest + 1))
        shutil.rmtree(steps / str(newest))

    return steps, save


def _first(call, before, times=1):
    """`call`, with `before` called before it the first times."""
    left, lock = [times], threading.Lock()

    def wrapped(*arguments, **options):
        with lock:
            if left[0]:
                left[0] -= 1
                before()
        return call(*arguments, **options)

    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "name"),
    [
        (integrity, "_hash"),
        (checkpoint, "read_description"),
        (checkpoint.orbax_files, "read"),
        (checkpoint, "assembled"),
    ],
)
def test_a_reader_takes_the_newer_one(place, name, training, monkeypatch, capfd):
    steps, save = training
    monkeypatch.setattr(place, name, _first(getattr(place, name), save, 2))
    load_checkpoint(steps.parent)
    assert saved_steps(steps) == [3] and "damaged" not in capfd.readouterr().err


def test_evaluation_and_generation_take_the_newer_one(training, monkeypatch, capfd):
    steps, save = training
    loads = _first(model_source.open_tokenizer, save)
    monkeypatch.setattr(model_source, "open_tokenizer", loads)
    source, _, ends = open_with_tokenizer(steps.parent)
    assert source.files == steps / "2" / "tokenizer" and ends
    save()
    read_model(source, steps.parent)
    monkeypatch.setattr(checkpoint.lazy, "in_memory", _first(checkpoint.lazy.in_memory, save))
    read_model(open_model(steps.parent), steps.parent)
    assert saved_steps(steps) == [4] and "damaged" not in capfd.readouterr().err


def test_a_reader_that_is_always_too_slow_is_told_so(training, monkeypatch):
    steps, save = training
    monkeypatch.setattr(integrity, "damage", _first(integrity.damage, save, 1000))
    with pytest.raises(
        InputError, match="a running training removed the checkpoint while it was read, 10 times"
    ):
        load_checkpoint(steps.parent)


def test_one_checkpoint_that_is_removed_is_not_called_damaged(training, monkeypatch, tmp_path):
    steps, save = training
    source = open_model(steps / "1")
    save()
    with pytest.raises(InputError, match="was removed while it was read"):
        read_model(source, steps / "1")
    monkeypatch.setattr(integrity, "_hash", _first(integrity._hash, save))
    with pytest.raises(InputError, match="2 was removed while it was read"):
        load_checkpoint(steps / "2")
    monkeypatch.setattr("finermoe_jax.weights.convert.write_hf", _first(write_hf, save))
    with pytest.raises(
        InputError, match=r"was removed while it was read.* copy one of its checkpoints"
    ):
        convert(str(steps.parent), tmp_path / "target", "hf", None, seed=0)
    assert not (tmp_path / "target").exists()


# --- unreadable -------------------------------------------------------------------------------


@contextlib.contextmanager
def _failing(monkeypatch, number, part):
    """Files below `part` cannot be opened."""
    with monkeypatch.context() as patched:
        opened = open

        def fails(file, *arguments, **options):
            if part in str(file):
                raise OSError(number, os.strerror(number), str(file))
            return opened(file, *arguments, **options)

        patched.setattr("io.open", fails)
        yield


@pytest.mark.nightly
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES])
@pytest.mark.parametrize("part", ["/4/config/metadata", "/4/params/", "/4/checksums.json"])
def test_what_cannot_be_read_is_not_called_damaged(
    number, part, finished, monkeypatch
):  # fmt: skip
    steps = finished / "checkpoints"
    for read in (
        lambda: set_aside_damaged(steps, pytest.fail),
        lambda: load_checkpoint(finished),
        lambda: load_checkpoint(steps / "4"),
    ):
        with (
            _failing(monkeypatch, number, part),
            pytest.raises(InputError, match=r"4 cannot be read \(.*Nothing was changed") as error,
        ):
            read()
        assert os.strerror(number) in str(error.value) and "damaged" not in str(error.value)
    assert saved_steps(steps) == [0, 2, 4]


@pytest.mark.nightly
def test_a_checkpoint_without_permissions_is_left_where_it_is(finished):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        steps = Path(shutil.copytree(finished / "checkpoints", f"{folder}/checkpoints"))
        largest = max((steps / "4" / "params").rglob("*"), key=lambda path: path.stat().st_size)
        for path in (largest, steps / "4" / "params"):
            path.chmod(0)
            user = os.geteuid()
            if user == 0:
                os.seteuid(65534)  # nothing is unreadable to root
            try:
                with pytest.raises(InputError, match=r"4 cannot be read \(.*Permission denied"):
                    set_aside_damaged(steps, pytest.fail)
            finally:
                os.seteuid(user)
            path.chmod(0o755)
        assert saved_steps(steps) == [0, 2, 4]
