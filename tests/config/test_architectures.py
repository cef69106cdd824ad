"""The paper's architectures by name, and the settings that contradict their starts."""

import dataclasses
import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import finermoe_jax as fm
from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.parse import default_config, run_config
from finermoe_jax.config.presets import ARCHITECTURES, architecture
from finermoe_jax.config.run import BalanceConfig, MeshConfig
from finermoe_jax.config.upcycle import UpcycleConfig
from finermoe_jax.data.packing import Batch
from finermoe_jax.errors import InputError
from finermoe_jax.layers import sharding
from finermoe_jax.model.counts import true_counts
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.training.optimizer import run_optimizer
from finermoe_jax.training.run import train
from finermoe_jax.training.step import init_optimizer, jit_step
from finermoe_jax.weights import upcycle_variants as starts
from finermoe_jax.weights.convert import convert
from tests.support import ROOT, SMALL, command, load_preset

# G_I, G_O, R_I, R_O, T_I, whether there is a shared expert, the experts that a token uses.
NUMBERS = {
    "c32a2": (1, 1, 32, 1, 2, False, 2),
    "s16a4": (16, 1, 1, 1, 4, False, 4),
    "du": (1, 1, 8, 1, 2, False, 2),
    "nvshard": (8, 1, 8, 1, 8, False, 8),
    "no_fg": (1, 1, 1, 2, 1, True, 1),
    "inter_fg": (32, 1, 1, 2, 1, True, 1),
    "out_fg": (1, 2, 1, 2, 1, True, 2),
    "inter_out_fg": (32, 2, 1, 2, 1, True, 2),
    "separate_routers": (32, 2, 1, 2, 1, True, 2),
    "add_concat_proj": (32, 2, 1, 2, 1, True, 2),
    "no_shared_expert": (32, 2, 1, 2, 1, False, 2),
}


def _numbers(moe):
    return dataclasses.astuple(moe)[:5]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_name_is_the_papers_architecture_in_every_preset(name):
    qwen, demo = load_preset("qwen1p5b", name), load_preset("demo", name)
    assert (demo.moe, demo.upcycle) == (qwen.moe, qwen.upcycle)
    if name in ("pt", "ct"):
        assert qwen.moe is None
        return
    *numbers, shared, active = NUMBERS[name]
    assert _numbers(qwen.moe) == tuple(numbers) and qwen.moe.num_active == active
    assert (qwen.moe.shared_expert_intermediate_size is None) == shared
    # One logit's softmax is constant: its router would never learn.
    assert qwen.moe.pre_softmax == (active == 1)
    assert qwen.moe.plain_top_k == (name in ("no_fg", "inter_fg"))
    assert qwen.moe.separate_routers == (name == "separate_routers")
    assert qwen.moe.concat_proj == ("routed" if name == "add_concat_proj" else "none")
    drop, groups = 0.5 * (name == "du"), name == "nvshard"
    assert qwen.upcycle == UpcycleConfig(drop_ratio=drop, virtual_groups=groups)


def test_numbers_are_architectures_and_variants_combine():
    assert load_preset("demo", "32,2,4,2").moe == MoEConfig(32, 2, 4, 2, 1)
    assert load_preset("qwen7b", "32,2,1,2,4").moe == MoEConfig(32, 2, 1, 2, 4)
    lean = load_preset("qwen0p5b", "c32a2+lean")
    assert lean == load_preset("qwen0p5b", "lean+c32a2")
    assert lean.moe == ARCHITECTURES["c32a2"].moe and lean.optimizer.name == "adafactor"
    # A start keeps the preset's own granularities.
    demo = load_preset("demo", "function_preserving")
    assert demo.upcycle.function_preserving and demo.moe == load_preset("demo").moe
    assert _numbers(demo.moe) == (8, 2, 1, 2, 1)
    pooled = load_preset("demo", "16,1,1,1,4+rex4").moe
    assert _numbers(pooled) == (16, 1, 1, 1, 4) and pooled.experts_across == 4
    assert load_preset("demo", "rex2") == dataclasses.replace(
        load_preset("demo"), moe=dataclasses.replace(load_preset("demo").moe, experts_across=2)
    )
    ahead = load_preset("demo", "ahead2+rex2").moe
    assert (ahead.route_ahead, ahead.experts_across) == (2, 2)
    assert dataclasses.replace(ahead, route_ahead=0) == load_preset("demo", "rex2").moe


@pytest.mark.parametrize(
    "arm",
    [
        "",
        "rex2",
        "rex4+psr",
        "psr",
        "wide",
        "rex2+depth",
        "fine+rex2+candidates",
        "upcycled+rex2+foreign",
    ],
)
def test_every_arm_of_the_study_of_pools(arm):
    """All arms of a form share data, steps, active experts and, except wide, expert parameters."""
    form = next((name for name in ("fine", "upcycled") if name in arm), "")
    base, got = (load_preset("studies/rex_arms", name) for name in (form, arm))
    assert got.data == base.data and got.optimizer == base.optimizer
    assert got.train.steps == base.train.steps and got.moe.num_active == base.moe.num_active
    assert got.moe.num_experts == base.moe.num_experts * (2 if arm == "wide" else 1)
    assert got.moe.experts_across == (4 if "rex4" in arm else 2 if "rex2" in arm else 1)
    assert got.train.psr == ("linear" if "psr" in arm or "foreign" in arm else "none")


@pytest.mark.parametrize(
    ("study", "variants", "apart"),
    [
        (
            "smollm2",
            [
                "",
                "lr1",
                "lr3",
                "muon",
                "muon+lr1",
                "ahead1",
                "ahead3",
                "rex2",
                "rex2+foreign",
                "ct",
            ],
            {"optimizer", "moe", "train"},
        ),
        (
            "upcycled",
            [
                "inter_out_fg",
                "ct",
                "s16a4",
                "nvshard",
                "du",
                "c32a2",
                "drop",
                "noise",
                "inter_out_fg+lr3",
            ],
            {"optimizer", "moe", "upcycle"},
        ),
    ],
)
def test_arms_of_a_study_differ_in_one_thing(study, variants, apart):
    """Data, seeds and steps are equal, and no two arms are."""
    first, *others = (load_preset(f"studies/{study}", variant) for variant in variants)
    for other in others:
        fields = {field.name for field in dataclasses.fields(first)}
        assert {name for name in fields if getattr(first, name) != getattr(other, name)} <= apart
        assert first.train.steps == other.train.steps and first.train.seed == other.train.seed
    assert len({repr(one) for one in (first, *others)}) == len(variants)


def test_granularities_use_equally_many_parameters():
    cells = [f"{slices}x{slots}" for slices in (8, 32) for slots in (1, 2, 4)]
    runs = [load_preset("studies/upcycled", cell) for cell in cells]
    counts = [true_counts(dataclasses.replace(run.dense, moe=run.moe)).active for run in runs]
    assert max(counts) < 1.02 * min(counts)


def test_rates_and_lengths_of_a_study_hold_in_any_place():
    """A cell of granularity sets a rate and a length of its own."""
    for variant in ("lr1+steps65+32x2", "32x2+steps65+lr1"):
        run = load_preset("studies/upcycled", variant)
        assert (run.optimizer.learning_rate, run.train.steps) == (1e-4, 65)


def test_arms_that_are_none_are_named():
    with pytest.raises(InputError, match=r"rex5.*rex2, rex4"):
        load_preset("studies/rex_arms", "rex5")
    for both, words in (("rex4+rex2", "rex2 and rex4"), ("foreign+psr", "psr and foreign")):
        with pytest.raises(InputError, match=f"has {words}: choose one"):
            load_preset("studies/rex_arms", both)


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("c32a", ["'c32a'", "Did you mean c32a2?"]),
        ("du+nvshard", ["du", "nvshard"]),
        ("32,2,1,2+16,2,1,2", ["32,2,1,2", "16,2,1,2"]),
        ("du+", ["''"]),
        ("32,2,1", ["32,2,1", "3 numbers", "T_I"]),
        ("4,2,1,2,5", ["active_per_group=5", "4 experts"]),
        ("32,2,0,2", ["intermediate_expansion=0"]),
        ("ct+function_preserving", ["function_preserving=True", "moe=None"]),
        ("c32a2+function_preserving", ["function_preserving=True", "size=0"]),
        ("ct+rex2", ["rex2", "no experts"]),
        ("rex2+rex4", ["rex2 and rex4", "choose one"]),
        ("ct+ahead1+rex2", ["ahead1 and rex2", "no experts"]),
        ("ahead3+rex2+ahead1", ["ahead3 and ahead1", "choose one"]),
        ("ahead4", ["'ahead4'", "Did you mean ahead"]),
    ],
)
def test_variants_that_cannot_be_are_named(variant, words):
    with pytest.raises(InputError) as error:
        load_preset("demo", variant)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("upcycle", "moe", "words"),
    [
        (dict(drop_ratio=1.5), {}, ["drop_ratio=1.5"]),
        (dict(drop_ratio=float("nan")), {}, ["drop_ratio=nan"]),
        (dict(copy_noise=-0.1), {}, ["copy_noise=-0.1"]),
        (dict(concat_proj_std=-1.0), {}, ["concat_proj_std=-1.0"]),
        (dict(concat_proj_std=0.0), {}, ["concat_proj_std=0.0", "concat_proj=none"]),
        (dict(drop_ratio=0.5, function_preserving=True), {}, ["drop_ratio=0.5", "=True"]),
        (
            dict(concat_proj_std=0.0, function_preserving=True),
            dict(concat_proj="routed"),
            ["concat_proj_std=0.0", "function_preserving=True"],
        ),
        (dict(function_preserving=True), dict(concat_proj="all"), ["=True", "concat_proj=all"]),
        (dict(virtual_groups=True), {}, ["virtual_groups=True", "size=None"]),
        (
            dict(virtual_groups=True),
            dict(shared_expert_intermediate_size=0),
            ["virtual_groups=True", "output_granularity=2"],
        ),
        (
            dict(virtual_groups=True),
            dict(shared_expert_intermediate_size=0, output_granularity=1),
            ["active_per_group=1", "intermediate_granularity=32"],
        ),
    ],
)
def test_starts_that_do_not_go_with_the_experts_are_refused(upcycle, moe, words):
    values = default_config().to_dict() | {"init_from": "somewhere"}
    values["upcycle"] |= upcycle
    values["moe"] |= moe
    with pytest.raises(InputError) as error:
        run_config(values)
    assert all(word in str(error.value) for word in words), error.value


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense model's HF directory."""
    path = tmp_path_factory.mktemp("dense") / "model"
    config = dataclasses.replace(SMALL, num_hidden_layers=2, initializer_range=0.3)
    fm.save_hf(Decoder(config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0)), path)
    return path


def _upcycled(name, dense):
    one = ARCHITECTURES[name]
    return fm.upcycle_model(fm.load_hf(dense), one.moe, jax.random.key(0), one.upcycle)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "name", ["c32a2", "du", "nvshard", "no_fg", "separate_routers", "add_concat_proj"]
)
def test_an_architecture_upcycles_and_its_routers_learn_from_the_text(name, dense):
    config = load_preset("demo", name)
    # Without the balancing loss: what moves a router is the text alone.
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, global_batch_size=4, sequence_length=16),
        optimizer=dataclasses.replace(config.optimizer, warmup_fraction=0.0),
        train=dataclasses.replace(config.train, remat="none"),
        balance=BalanceConfig(weight=0.0),
    )
    model = _upcycled(name, dense)
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    shardings, _ = sharding.param_shardings(model, mesh)
    graphdef, state = nnx.split(model)
    params = jax.device_put(nnx.to_pure_dict(state), shardings)
    tx = run_optimizer(config, model)
    opt_state = init_optimizer(tx, params, shardings, mesh)
    step, places = jit_step(graphdef, config, tx, params, opt_state, shardings, mesh)
    params, opt_state = jax.device_put((params, opt_state), places)
    tokens = np.random.default_rng(0).integers(0, 64, (4, 17)).astype(np.int32)
    batch = jax.device_put(Batch(jnp.asarray(tokens)), sharding.batch_sharding(mesh))
    losses = []
    for _ in range(5):
        params, opt_state, metrics = step(params, opt_state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    # Adam's mean of the gradients; one active expert has one because its weight is pre_softmax's.
    learned = optax.tree.get(opt_state, "mu")["runs"][0][0]["moe"]
    assert {"router", "gate_up", "down"} <= learned.keys()
    for path, mean in jax.tree_util.tree_leaves_with_path(learned):
        assert float(jnp.abs(mean).max()) > 0, path


@pytest.mark.slow
def test_the_command_drop_upcycles_as_the_library_in_memory(dense, tmp_path):
    target = tmp_path / "du"
    flags = (f"--source={dense}", f"--target={target}", "--config=configs/demo.py:du")
    assert command("convert", *flags, cwd=ROOT).returncode == 0
    converted = nnx.to_pure_dict(nnx.state(fm.load_checkpoint(target)))["runs"][0][0]["moe"]
    upcycled = nnx.to_pure_dict(nnx.state(_upcycled("du", dense)))["runs"][0][0]["moe"]
    for name in ("gate_up", "down"):
        np.testing.assert_array_equal(converted[name], upcycled[name])
    # Drawn by compiled code, which the tests do not optimise.
    np.testing.assert_allclose(converted["router"], upcycled["router"], rtol=1e-5)


@pytest.mark.slow
def test_an_expert_in_several_blocks_is_made_once(dense, tmp_path, monkeypatch):
    """Blocks are made by threads; those of one expert wait for the one that makes it."""
    monkeypatch.setattr("finermoe_jax.weights.lazy.BLOCK_BYTES", 1024)
    wanted = nnx.to_pure_dict(nnx.state(_upcycled("du", dense)))["runs"][0][0]["moe"]
    calls, running, most, lock, drop = [], 0, 0, threading.Lock(), starts.drop

    def counted(name, *rest):
        nonlocal running, most
        with lock:
            calls.append(name)
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        made = drop(name, *rest)
        with lock:
            running -= 1
        return made

    monkeypatch.setattr(starts, "drop", counted)
    found = architecture("du")
    convert(str(dense), tmp_path / "du", "orbax", found.moe, upcycling=found.upcycle, seed=0)
    converted = nnx.to_pure_dict(nnx.state(fm.load_checkpoint(tmp_path / "du")))
    for name in ("gate_up", "down"):
        array = converted["runs"][0][0]["moe"][name]
        layers, experts, *shape = array.shape
        assert math.prod(shape) * array.dtype.itemsize > 2 * 1024, "blocks cut this expert"
        # Threads may have gone on to the next expert before its last block was read.
        assert layers * experts <= calls.count(name) <= 1.5 * layers * experts
        np.testing.assert_array_equal(array, wanted[name])
    assert most == 1


@pytest.mark.nightly
def test_a_run_starts_as_its_variant_says(tmp_path):
    config = load_preset("demo", "function_preserving")
    config = dataclasses.replace(
        config,
        prompts=(),
        data=dataclasses.replace(
            config.data, global_batch_size=8, sequence_length=32, eval_windows=8
        ),
        train=dataclasses.replace(config.train, steps=1),
    )
    train(config, tmp_path / "run", say=lambda _: None)
    losses = {e["name"]: e["loss"] for e in read_lines(tmp_path / "run" / "evals.jsonl")}
    assert abs(losses["step 0"] - losses["dense base"]) < 1e-4
