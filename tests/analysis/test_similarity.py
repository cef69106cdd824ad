"""The experts' similarity, against the mean over all pairs formed one by one."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx

import finermoe_jax as fm
from finermoe_jax.analysis import similarity
from finermoe_jax.analysis.similarity import expert_similarity
from finermoe_jax.errors import InputError
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.weights import lazy
from finermoe_jax.weights.checkpoint import save_checkpoint
from tests.support import SMALL, invoke

# Two runs of layers, and a dense layer between them.
MIXED = dataclasses.replace(
    SMALL, num_hidden_layers=4, moe=fm.MoEConfig(4, 2, 1, 2, 1, mlp_only_layers=(1,))
)


def saved(directory, config, dtype="float32"):
    model = Decoder(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(3))
    save_checkpoint(model, directory)
    return model


def naive(model):
    """The mean cosine over pairs, from the layers' own experts in transformers' order."""
    values = []
    for layer, kind in enumerate(model.config.layer_kinds):
        if kind != "moe":
            continue
        place = 0
        for run, (pattern, repeats) in enumerate(model.config.layer_runs):
            if place <= layer < place + len(pattern) * repeats:
                repeat, inside = divmod(layer - place, len(pattern))
                moe = nnx.to_pure_dict(nnx.state(model))["runs"][run][inside]["moe"]
            place += len(pattern) * repeats
        flat = [
            np.concatenate([np.asarray(moe[n][repeat, e], np.float64).ravel() for n in
                            ("gate_up", "down")])
            for e in range(model.config.moe.num_experts)
        ]  # fmt: skip
        cosines = [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for a, b in itertools.combinations(flat, 2)
        ]
        values.append(np.mean(cosines))
    return values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_over_all_pairs(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(similarity, "_CHUNK", 100)
    monkeypatch.setattr(lazy, "BLOCK_BYTES", 5000)  # three experts of 16 at a time, then one
    model = saved(tmp_path / "mixed", MIXED, dtype)
    found = expert_similarity(str(tmp_path / "mixed"))
    assert found.layers == (0, 2, 3) and found.experts == 16
    expected = naive(model)
    np.testing.assert_allclose(found.values, expected, rtol=1e-9, atol=1e-12)
    assert len(set(np.round(expected, 8))) == 3 and found.mean == pytest.approx(np.mean(expected))


def test_copies_are_alike_and_the_command_shows_all(tmp_path, capsys):
    dense = Decoder(SMALL, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    numbers = {"No FG": (1, 1, 1, 2), "Inter FG": (4, 1, 1, 2), "Out FG": (1, 2, 1, 2)}
    for name, moe in numbers.items():
        model = fm.upcycle_model(dense, fm.MoEConfig(*moe, 1), jax.random.key(0))
        save = fm.save_hf if name == "Out FG" else save_checkpoint
        save(model, tmp_path / name)
    outputs = [f"--output={tmp_path / name}" for name in ("s.png", "s.json")]
    assert invoke("similarity", *(f"{name}={tmp_path / name}" for name in numbers), *outputs) == 0
    values = json.loads((tmp_path / "s.json").read_text())
    layers = SMALL.num_hidden_layers
    # Two copies of the FFN; of four slices each has one copy, and the slices have next to nothing
    # in common; of two slots' experts the larger part is the same.
    np.testing.assert_allclose(values["No FG"]["values"], [1.0] * layers, rtol=1e-6)
    np.testing.assert_allclose(values["Inter FG"]["values"], [1 / 7] * layers, atol=0.05)
    assert 0.5 < values["Out FG"]["mean"] < 0.95
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "layer    No FG  Inter FG   Out FG"
    assert len(lines) == layers + 2 and lines[-1].split()[:2] == ["mean", "1.0000"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{dense}"], "dense model"),
        (["{one}"], "one expert per layer"),
        (["{zero}"], "layer 1: the weights of expert 2 are zero"),
        (["{here}/nothing"], "nothing"),
        (["{zero}", "{here}/x/../zero"], "have the same label zero"),
        (["{zero}", "--output={here}/a.pdf"], "must end in .png or .json"),
        (["{zero}", "--output={here}/no/a.png"], "no does not exist"),
    ],
)
def test_what_cannot_be_compared(broken, capsys, arguments, words):
    assert invoke("similarity", *(argument.format(**broken) for argument in arguments)) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ") and words in said


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    here = tmp_path_factory.mktemp("broken")
    saved(here / "dense", SMALL)
    saved(here / "one", dataclasses.replace(SMALL, moe=fm.MoEConfig(1, 1, 1, 1, 1)))
    config = dataclasses.replace(SMALL, num_hidden_layers=2, moe=fm.MoEConfig(2, 2, 1, 1, 1))
    model = Decoder(config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(3))
    moe = model.runs[0][0].moe
    for weight in (moe.gate_up, moe.down):
        weight[...] = weight[...].at[1, 2].set(0)
    save_checkpoint(model, here / "zero")
    return {name: str(here / name) for name in ("dense", "one", "zero")} | {"here": str(here)}


def test_what_is_not_finite_is_named(broken):
    one = lazy.of_array(np.full((2, 4, 3), np.nan, np.float32))
    with pytest.raises(InputError, match="x: the weights of expert 0 are not finite"):
        similarity._layer_similarity([one, one], "x", lambda size: None)
