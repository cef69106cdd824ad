"""The experts' similarity, against the mean over all pairs formed one by one."""

import dataclasses
import itertools
import json
import re

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
    """Mean cosines over all pairs, copies, same slices and other slices, of each layer.

    From the layers' own experts in transformers' order.
    """
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
        cosines, config = {"copies": [], "same": [], "other": []}, model.config.moe
        for (i, a), (j, b) in itertools.combinations(enumerate(flat), 2):
            # Expert numbers run over slots, candidates, copies and slices, the last one fastest.
            same_slice = i % config.intermediate_granularity == j % config.intermediate_granularity
            per_slot = config.num_experts // config.output_granularity
            kind = (
                "other"
                if not same_slice
                else "copies"
                if i // per_slot == j // per_slot
                else "same"
            )
            cosines[kind].append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        parts = [np.mean(each) if each else None for each in cosines.values()]
        values.append([np.mean([*itertools.chain(*cosines.values())]), *parts])
    return values


@pytest.mark.slow
def test_a_pool_is_compared_as_a_whole(tmp_path):
    """Its experts as one layer's: twice the copies of a slice."""
    pooled = dataclasses.replace(SMALL, moe=fm.MoEConfig(4, 2, 1, 2, 1, experts_across=2))
    saved(tmp_path / "pooled", pooled)
    found = expert_similarity(str(tmp_path / "pooled"))
    assert (found.experts, found.layers) == (32, (0, 2))
    model = fm.load_checkpoint(tmp_path / "pooled")
    moe = nnx.to_pure_dict(nnx.state(model))["runs"][0][0]["moe"]
    for place, of_pool in enumerate(zip(found.values, found.copies, strict=True)):
        flat = np.concatenate(
            [np.asarray(moe[n][place], np.float64).reshape(32, -1) for n in ("gate_up", "down")], 1
        )
        unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        cosines = unit @ unit.T
        # Pool expert 2 e + j; e runs over 2 slots, 2 candidates, 4 slices.
        slot, _, piece, _ = np.unravel_index(np.arange(32), (2, 2, 4, 2))
        same = (slot == slot[:, None]) & (piece == piece[:, None])
        others = ~np.eye(32, dtype=bool)
        wanted = [cosines[others].mean(), cosines[others & same].mean()]
        np.testing.assert_allclose(of_pool, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_over_all_pairs(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(similarity, "_CHUNK", 100)
    monkeypatch.setattr(lazy, "BLOCK_BYTES", 5000)  # three experts of 16 at a time, then one
    model = saved(tmp_path / "mixed", MIXED, dtype)
    expected = np.array(naive(model))
    for limit in (0, 1 << 30):  # an expert at a time, and the whole layer
        monkeypatch.setattr(similarity, "_LAYER_BYTES", limit)
        found = expert_similarity(str(tmp_path / "mixed"))
        assert found.layers == (0, 2, 3) and found.experts == 16
        parts = [found.values, found.copies, found.same_slice, found.other_slices]
        np.testing.assert_allclose(np.transpose(parts), expected, rtol=1e-9, atol=1e-12)
        assert len(set(np.round(expected[:, 0], 8))) == 3
        assert [found.mean, *found.parts.values()] == pytest.approx(list(expected.mean(axis=0)))


@pytest.mark.slow
def test_parts_without_pairs_are_empty(tmp_path):
    for numbers, absent in (((1, 2, 1, 2), "other slices"), ((4, 2, 1, 1), "copies")):
        config = dataclasses.replace(SMALL, moe=fm.MoEConfig(*numbers, 1))
        model = saved(tmp_path / absent, config)
        found = expert_similarity(str(tmp_path / absent))
        assert [name for name, value in found.parts.items() if value is None] == [absent]
        parts = [found.values, found.copies, found.same_slice, found.other_slices]
        for layer, expected in enumerate(naive(model)):
            assert [each[layer] for each in parts] == [
                None if value is None else pytest.approx(value) for value in expected
            ]


@pytest.mark.slow
def test_a_run_over_its_steps(tmp_path, capsys):
    config = dataclasses.replace(SMALL, moe=fm.MoEConfig(4, 2, 1, 2, 1))
    dense = Decoder(SMALL, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    start = fm.upcycle_model(dense, config.moe, jax.random.key(0))
    save_checkpoint(start, tmp_path / "checkpoints" / "0")
    saved(tmp_path / "checkpoints" / "20", config)  # drawn at random: copies have parted
    outputs = [f"--output={tmp_path / name}" for name in ("s.png", "s.json")]
    assert invoke("similarity", tmp_path, "--over_steps", *outputs) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["step", "all", "pairs", "copies", "same", "slice", "other", "slices"]
    assert lines[1][0] == "0" and lines[1][2] == "1.0000"
    assert lines[2][0] == "20" and abs(float(lines[2][2])) < 0.05
    assert set(json.loads((tmp_path / "s.json").read_text())) == {"0", "20"}
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
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
    assert re.split(r"\s{2,}", lines[0].strip()) == ["layer", *numbers]
    assert len(lines) == layers + 5 and lines[-4].split()[:2] == ["mean", "1.0000"]
    parts = {line[:12].strip(): line[12:].split() for line in lines[-3:]}
    assert parts["copies"] == ["1.0000", "1.0000", "1.0000"]
    assert len(parts["same slice"]) == len(parts["other slices"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{dense}"], "dense model"),
        (["{one}"], "one expert per layer"),
        (["{zero}"], "layer 1: the weights of expert 2 are zero"),
        (["{here}/nothing"], "nothing"),
        (["{zero}", "{here}/x/../zero"], "have the same label zero"),
        (["{zero}", "--output={here}/a.pdf"], "must end in .png or .json"),
        (["{zero}", "--output={here}/no/a.png"], "its directory does not exist"),
        (["{zero}", "{one}", "--over_steps"], "--over_steps takes one workdir, but 2 are given"),
        (["{zero}", "--over_steps"], "holds no checkpoints of a run"),
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
        similarity._layer_similarity([one, one], fm.MoEConfig(1, 1, 1, 2), "x", lambda size: None)
