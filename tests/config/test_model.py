"""Validation and derived sizes of configs; the preset files."""

import dataclasses
import json
import math
import sys

import pytest

from finermoe_jax.cli.flags import Flags
from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.parse import default_config, preset, run_config
from finermoe_jax.config.presets import QWEN2P5
from finermoe_jax.config.run import PARTS, BalanceConfig
from finermoe_jax.errors import InputError
from tests.support import SMALL, command, load_preset


@pytest.mark.parametrize("size", ["0.5B", "1.5B", "7B"])
def test_published_presets_state_the_papers_recipe(size):
    config = load_preset("qwen" + size.replace(".", "p").lower())
    assert config.init_from == f"Qwen/Qwen2.5-{size}"
    assert config.dense == QWEN2P5[size]
    assert config.moe == MoEConfig(32, 2, 1, 2, 1)
    assert config.moe.num_experts == 128 and config.moe.num_active == 2
    assert (config.data.sequence_length, config.data.global_batch_size) == (8192, 2048)
    tokens = config.train.steps * 8192 * 2048
    assert abs(tokens / 50e9 - 1) < 0.001
    o = config.optimizer
    assert (o.learning_rate, o.final_learning_rate, o.warmup_fraction) == (1e-5, 1e-7, 0.01)
    assert (o.beta1, o.beta2, o.weight_decay, o.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert config.balance.weight == 0.001 and config.train.compute_dtype == "bfloat16"


@pytest.mark.parametrize("name", ["demo", "qwen0p5b", "qwen7b"])
def test_lean_variant_is_for_one_small_device(name):
    config = load_preset(name, "lean")
    assert config.optimizer.name == "adafactor" and config.train.param_dtype == "bfloat16"
    assert (config.data.global_batch_size, config.train.grad_accumulation) == (1, 1)
    assert config.data.sequence_length <= 2048 and config.train.remat == "full"
    assert config.moe is not None


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ({"name": "adafactor", "moment_dtype": "bfloat16"}, "set moment_dtype to float32"),
        ({"decay_fraction": 0.2}, "decay_fraction=0.2 applies to the schedule wsd only"),
        (
            {"schedule": "wsd", "warmup_fraction": 0.6, "decay_fraction": 0.5},
            "warmup_fraction=0.6 and optimizer.decay_fraction=0.5 add up to more than 1",
        ),
        ({"schedule": "wsd", "decay_fraction": -0.1}, "decay_fraction=-0.1 must be between 0"),
        ({"name": "muon", "learning_rate": -1.0}, "learning_rate=-1.0 must be between 0"),
        ({"final_learning_rate": -1.0}, "final_learning_rate=-1.0 must be between 0"),
        ({"schedule": "linear"}, "'cosine', 'wsd'"),
    ],
)
def test_optimizers_that_cannot_be_are_refused(optimizer, words):
    values = default_config().to_dict() | {"init_from": "somewhere"}
    values["optimizer"] |= optimizer
    with pytest.raises(InputError, match=words):
        run_config(values)


def test_moments_of_muon_may_be_narrow():
    values = default_config().to_dict() | {"init_from": "somewhere"}
    values["optimizer"] |= {"name": "muon", "moment_dtype": "bfloat16"}
    assert run_config(values).optimizer.moment_dtype == "bfloat16"


@pytest.mark.parametrize("name", ["demo", "smollm2_135m", "qwen0p5b", "qwen1p5b", "qwen7b"])
def test_ct_variant_is_dense_and_unknown_variants_are_refused(name):
    assert load_preset(name, "ct").moe is None
    with pytest.raises(InputError, match=r"unknown variant 'cx'.*c32a2, ct"):
        load_preset(name, "cx")


@pytest.mark.parametrize(
    ("moe", "kinds", "runs"),
    [
        (None, ["dense"] * 4, (((("dense",)), 4),)),
        (dict(), ["moe"] * 4, ((("moe",), 4),)),
        (dict(decoder_sparse_step=2), ["dense", "moe"] * 2, ((("dense", "moe"), 2),)),
        (
            dict(mlp_only_layers=(1,)),
            ["moe", "dense", "moe", "moe"],
            ((("moe", "dense"), 1), (("moe",), 2)),
        ),
        (dict(decoder_sparse_step=5), ["dense"] * 4, ((("dense",), 4),)),
    ],
)
def test_layers_fall_into_scanned_runs(moe, kinds, runs):
    moe = None if moe is None else MoEConfig(4, 2, 1, 2, 1, **moe)
    config = dataclasses.replace(SMALL, moe=moe)
    assert list(config.layer_kinds) == kinds
    flat = [k for pattern, repeats in config.layer_runs for k in pattern * repeats]
    assert flat == kinds
    if kinds != ["moe", "dense", "moe", "moe"]:
        assert config.layer_runs == runs


def test_compiled_pieces_do_not_grow_with_depth():
    for step in (1, 2, 3):
        moe = MoEConfig(4, 2, 1, 2, 1, decoder_sparse_step=step)
        sizes = {
            sum(
                len(pattern)
                for pattern, _ in dataclasses.replace(
                    SMALL, moe=moe, num_hidden_layers=layers
                ).layer_runs
            )
            for layers in (12, 24, 48)
        }
        assert sizes == {step}


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        (dict(intermediate_size=66, moe=MoEConfig(4, 2, 1, 2, 1)), ["66", "4"]),
        (dict(hidden_size=40, moe=MoEConfig(4, 16, 1, 2, 1)), ["hidden_size=40", "16"]),
        (dict(num_key_value_heads=3), ["4", "3"]),
        (dict(hidden_size=34), ["34", "4"]),
        (dict(vocab_size=0), ["vocab_size=0"]),
        (dict(moe=MoEConfig(4, 2, 1, 2, 1, mlp_only_layers=(9,))), ["9", "num_hidden_layers=4"]),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, values):
    with pytest.raises(InputError) as error:
        dataclasses.replace(SMALL, **changes)
    assert all(value in str(error.value) for value in values), error.value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("train.step", 3, ["train has no field 'step'", "steps"]),
        ("train.steps", "many", ["train.steps='many'", "int"]),
        ("train.steps", True, ["train.steps=True"]),
        ("train.remat", "ful", ["full"]),
        ("data.eval_fraction", 1.5, ["1.5"]),
        ("train.grad_accumulation", 3, ["2048", "3"]),
        ("init_from", "", ["init_from", "dense"]),
        ("balance.kind", "sequnce", ["balance.kind='sequnce'", "'sequence', 'batch', 'bias'"]),
        ("balance.weight", -0.1, ["balance.weight=-0.1 must be between 0"]),
        ("balance.z_loss", -1.0, ["balance.z_loss=-1.0"]),
        ("balance.bias_rate", -0.001, ["balance.bias_rate=-0.001"]),
        ("balance.bias_rate", math.nan, ["balance.bias_rate=nan"]),
        ("balance.wieght", 0.1, ["balance has no field 'wieght'", "Did you mean weight?"]),
        ("train.aux_loss_weight", -0.1, ["balance.weight=-0.1 must be between 0"]),
        ("train.aux_loss_weight", "a", ["balance.weight='a' must be a number"]),
        ("train.freeze", ["norms", "rooter"], ["no part 'rooter'", "Did you mean router?"]),
        ("train.freeze", PARTS, ["train.freeze=embedding,", "lm_head names all parts"]),
        ("train.freeze", "router", ["train.freeze='router'", "list"]),
    ],
)
def test_bad_fields_are_named(path, value, words):
    values = default_config().to_dict() | {"init_from": "somewhere"}
    *groups, field = path.split(".")
    target = values
    for group in groups:
        target = target[group]
    target[field] = value
    with pytest.raises(InputError) as error:
        run_config(values)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("train", "moe", "words"),
    [
        (dict(psr_start=0.9), {}, ["psr_start=0.9", "psr_end=0.6"]),
        (dict(psr_end=1.5), {}, ["psr_end=1.5", "between 0 and 1"]),
        (dict(psr="linear"), None, ["psr=linear", "config.moe is None"]),
        (dict(psr="linear", psr_mask="foreign"), {}, ["psr_mask=foreign", "experts_across=1"]),
        (
            dict(psr="stepwise"),
            dict(intermediate_granularity=4, active_per_group=3),
            ["begins with 2 experts", "active_per_group=3"],
        ),
    ],
)
def test_masks_that_do_not_fit_the_experts_are_refused(train, moe, words):
    values = default_config().to_dict() | {"init_from": "somewhere"}
    values["train"] |= train
    values["moe"] = moe if moe is None else values["moe"] | moe
    with pytest.raises(InputError) as error:
        run_config(values)
    assert [word for word in words if word not in str(error.value)] == [], error.value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"balance": {"kind": "bias", "over": "pool"}}, ["over=pool", "kind=bias"]),
        ({"balance": {"kind": "bias"}, "train": {"psr": "linear"}}, ["kind=bias", "psr=linear"]),
    ],
)
def test_balancing_that_does_not_fit_pools_is_refused(changes, words):
    values = default_config().to_dict() | {"init_from": "somewhere"}
    values["moe"]["experts_across"] = 2
    for group, fields in changes.items():
        values[group] |= fields
    with pytest.raises(InputError) as error:
        run_config(values)
    assert [word for word in words if word not in str(error.value)] == [], error.value


def test_presets_by_name():
    assert run_config(preset("configs/demo.py:ct").to_dict()).moe is None
    assert preset("configs/qwen0p5b.py:lean").optimizer.name == "adafactor"
    with pytest.raises(InputError, match=r"configs/dmo\.py does not exist"):
        preset("configs/dmo.py")


def test_the_former_weight_of_the_balancing_loss_is_read(tmp_path):
    values = default_config().to_dict() | {"init_from": "x"}
    assert run_config(values).balance == BalanceConfig(weight=0.001)
    assert "aux_loss_weight" not in values["train"]
    former = {"init_from": "x", "train": {"aux_loss_weight": 0.5, "steps": 3}}
    config = run_config(former)
    assert config.balance.weight == 0.5 and config.train.steps == 3
    assert former["train"] == {"aux_loss_weight": 0.5, "steps": 3}  # not changed in place
    config = run_config(former | {"balance": {"kind": "batch"}})
    assert config.balance == BalanceConfig(kind="batch", weight=0.5)
    both = r"aux_loss_weight is the former name of config\.balance\.weight.*0\.5 and 0\.25.*remove"
    with pytest.raises(InputError, match=both):
        run_config(former | {"balance": {"weight": 0.25}})
    path = tmp_path / "run.py"
    path.write_text(
        "import finermoe_jax as fm\n"
        "def get_config():\n"
        "    config = fm.default_config()\n"
        "    config.init_from = 'x'\n"
        "    config.train.aux_loss_weight = 0.25\n"
        "    return config\n"
    )
    assert preset(str(path)).balance.weight == 0.25
    flag = "--config.train.aux_loss_weight=0.125"
    result = command("train", f"--config={path}", flag, "--print_config")
    assert result.returncode == 0 and json.loads(result.stdout)["balance"]["weight"] == 0.125


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.aux_loss_weight=0.1", "balance.weight=0.001"], "former name of.*also given"),
        (["balance.weight=0.2", "train.aux_loss_weight=0.1"], "former name of.*also given"),
        (["train.freeze=", "optimizer.freeze_backbone"], "former name of.*train.freeze.*also"),
        (["balance=bias"], r"group of fields; set one, as --config\.balance\.FIELD"),
        ([":ct", "moe.experts_across=2"], r"moe\.experts_across: config\.moe is None"),
    ],
)
def test_overrides_that_contradict_each_other(monkeypatch, overrides, words):
    """Also if one of them states a default."""
    variant = "".join(each for each in overrides if each.startswith(":"))
    given = [f"--config.{each}" for each in overrides if each != variant]
    monkeypatch.setattr(sys, "argv", ["train", f"--config=demo{variant}", *given])
    with pytest.raises(InputError, match=words):
        Flags().read(lambda flags: flags.add_config())


def test_a_run_with_biases_has_them_in_its_model():
    values = {"init_from": "x", "balance": {"kind": "bias"}}
    assert run_config(values | {"moe": {}}).moe.selection_bias
    assert run_config(values | {"moe": None}).moe is None
    assert not run_config({"init_from": "x", "moe": {}}).moe.selection_bias
    frozen = {"train": {"freeze": ["router", "norms"]}}
    with pytest.raises(InputError, match=r"train\.freeze=norms,router freezes it: remove router"):
        run_config(values | frozen)
    assert run_config({"init_from": "x", **frozen}).train.freeze == ("norms", "router")


def test_the_former_name_of_dense_is_read(tmp_path):
    values = default_config().to_dict()
    shape = dataclasses.asdict(SMALL)
    assert run_config(values | {"model": shape}).dense == SMALL
    assert run_config({"model": None, "init_from": "x"}).dense is None  # a config.json of before
    with pytest.raises(InputError, match=r"former name of config\.dense"):
        run_config(values | {"model": shape, "dense": shape})
    path = tmp_path / "run.py"
    path.write_text(
        "import finermoe_jax as fm\n"
        "def get_config():\n"
        "    config = fm.default_config()\n"
        f"    config.model = {dict(shape, moe=None)!r}\n"
        "    return config\n"
    )
    assert run_config(preset(str(path))).dense == SMALL


BACKBONE = ("attention", "dense_ffn", "lm_head")


def test_freeze_backbone_is_read_as_its_parts(tmp_path):
    """From a config.json and a config file of before."""
    for former, now in ((True, BACKBONE), (False, ())):
        values = {"init_from": "x", "optimizer": {"beta1": 0.8, "freeze_backbone": former}}
        config = run_config(values)
        assert (config.train.freeze, config.optimizer.beta1) == (now, 0.8)
    values["train"] = {"freeze": ["router"]}
    with pytest.raises(InputError, match=r"former name of config\.train\.freeze"):
        run_config(values)
    path = tmp_path / "run.py"
    path.write_text(
        "import finermoe_jax as fm\n"
        "def get_config():\n"
        "    config = fm.default_config()\n"
        "    config.init_from = 'x'\n"
        "    config.optimizer.freeze_backbone = True\n"
        "    return config\n"
    )
    assert run_config(preset(str(path))).train.freeze == BACKBONE


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("--config.optimizer.freeze_backbone=true", BACKBONE),
        ("--config.optimizer.freeze_backbone", BACKBONE),
        ("--config.optimizer.freeze_backbone=false", ()),
        ("--config.train.freeze=lm_head, router", ("router", "lm_head")),
        ("--config.train.freeze=('lm_head','router')", ("router", "lm_head")),
        ("--config.train.freeze=", ()),
    ],
)
def test_frozen_parts_on_the_command_line(monkeypatch, override, parts):
    monkeypatch.setattr(sys, "argv", ["train", "--config=demo", override])
    flags = Flags()
    assert flags.read(lambda flags: flags.add_config())
    assert flags.run_config().train.freeze == parts
