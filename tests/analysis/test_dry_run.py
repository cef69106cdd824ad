"""A run's needs as a dry run states them, against the run itself."""

import collections
import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from finermoe_jax.analysis import dry_run as dry
from finermoe_jax.analysis.dry_run import dry_run
from finermoe_jax.config.run import MeshConfig
from finermoe_jax.errors import InputError
from finermoe_jax.training.run import train
from finermoe_jax.weights.checkpoint import load_checkpoint
from tests.support import command
from tests.support.training import silent, tiny_run


@pytest.mark.nightly
def test_it_counts_what_the_run_holds_and_writes_nothing(tmp_path):
    config, said = dataclasses.replace(tiny_run(), mesh=MeshConfig(2, 2, 2, 1)), []
    needs = dry_run(config, tmp_path / "run", 1e9, said.append)
    assert not (tmp_path / "run").exists() and needs.fits
    train(config, tmp_path / "run", silent)
    model = load_checkpoint(tmp_path / "run")
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(nnx.state(model)))
    # float32 weights and two moments; the step count is a few bytes.
    assert 3 * 4 * size <= needs.checkpoint < 3 * 4 * size + 64
    arrays = (tmp_path / "run" / "checkpoints" / "4").rglob("*")
    stored = sum(path.stat().st_size for path in arrays if path.is_file())
    assert 0.2 * needs.checkpoint < stored < 3 * needs.checkpoint  # compressed; and a tokenizer
    # Replicas on the data axis, and what fsdp does not cut, are counted on every device.
    held = needs.memory["parameters"]
    assert 2 * 4 * size <= held <= 8 * 4 * size
    assert needs.memory["optimizer state"] == pytest.approx(2 * held, rel=0.01)
    text = "\n".join(said)
    assert "compiling the training step …" in text and "FITS" in text
    assert needs.memory["a checkpoint while it is saved"] == needs.checkpoint
    assert f"may reach {2 * needs.total / 2**30:.1f} GiB" in text
    assert "a step: 128 tokens" in text and "all 4 steps: 512 tokens" in text
    assert "time per step: at least" in text


@pytest.mark.nightly
def test_a_full_disk_does_not_fit(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(dry.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    said = []
    assert not dry_run(tiny_run(), tmp_path / "run", None, said.append).fits
    assert said[-1] == "DOES NOT FIT" and "--peak_tflops gives a bound" in "\n".join(said)


@pytest.mark.nightly
def test_wrong_input_is_refused_as_by_the_run(tmp_path):
    config = tiny_run()
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, path="no.txt"))
    with pytest.raises(InputError, match=r"no\.txt"):
        dry_run(wrong, tmp_path / "run", None, silent)
    train(config, tmp_path / "run", silent)
    with pytest.raises(InputError, match="another config"):
        dry_run(tiny_run(steps=6), tmp_path / "run", None, silent)
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*"))
    dry_run(tiny_run(steps=6), tmp_path / "run", None, silent, ["train.steps"])
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")) == before


def test_a_peak_that_may_exceed_memory_is_said():
    needs = dry.Needs({"parameters": 6}, 10, 1, 1, 1, 2.0)
    assert needs.fits and not needs.surely_fits
    assert needs._replace(slack=1.0).surely_fits and needs._replace(limit=None).surely_fits
    assert dry._files(needs, tiny_run(), Path("/tmp"))[-1] == "MAY NOT FIT"


@pytest.mark.parametrize(("limit", "code"), [(3, 0), (1, 1), (None, 0)])
def test_the_command(tmp_path, monkeypatch, limit, code):
    def needs(config, place, peak, allow_changes):
        assert (place, peak, allow_changes) == (tmp_path / "run", 2e12, ["train.steps"])
        return dry.Needs({"parameters": 2}, limit, 1, 1, 1)

    monkeypatch.setattr(dry, "dry_run", needs)
    flags = ["--allow_changes=train.steps", "--peak_tflops=2", "--dry_run"]
    assert command("train", f"--workdir={tmp_path / 'run'}", *flags).returncode == code
