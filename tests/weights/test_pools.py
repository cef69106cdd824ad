"""Conversion to pools: upcycled, from a trained model, to HF and back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import finermoe_jax as fm
from finermoe_jax.config.parse import run_config
from finermoe_jax.config.upcycle import UpcycleConfig
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.model.decoder import with_params
from finermoe_jax.moe.psr import Reuse, first_kept
from finermoe_jax.training.initial import initial_model
from finermoe_jax.weights import lazy
from finermoe_jax.weights.convert import convert
from finermoe_jax.weights.upcycle import pooled_weights
from finermoe_jax.weights.verify import verify
from tests.recorded.before_pools import make as before_pools
from tests.support import DATA, GOLDEN, invoke
from tests.support.models import weights

DENSE = GOLDEN / "upcycle" / "dense_untied"
ALONE = fm.MoEConfig(4, 2, 2, 2, 2)
POOLED = dataclasses.replace(ALONE, experts_across=2)
IDS = np.random.default_rng(0).integers(0, 90, (2, 9)).astype(np.int32)


def at_start(model, foreign=True):
    """Hidden states while other layers' experts are masked."""
    model.placement = Placement(kernel="reference")
    psr = None
    if foreign and model.config.moe.experts_across > 1:
        kept = jnp.int32(first_kept(model.config.moe))
        psr = Reuse(kept, jax.random.key(0), "foreign")
    graphdef, state = nnx.split(model)

    @jax.jit
    def hidden(state, ids):
        return nnx.merge(graphdef, state).features(ids, psr=psr).hidden

    return np.asarray(hidden(state, jnp.asarray(IDS)))


@pytest.fixture(scope="module")
def dense():
    return fm.load_hf(DENSE)


@pytest.fixture(scope="module")
def alone(dense):
    return fm.upcycle_model(dense, ALONE, jax.random.key(1))


def experts_of(model):
    """Each layer's experts, [L][E]: gate_up and down."""
    runs = nnx_runs(model)
    across, moe = model.config.moe.experts_across, []
    for name in ("gate_up", "down"):
        bank = runs[name]
        apart = bank.reshape(bank.shape[0], -1, across, *bank.shape[2:])
        moe.append(np.moveaxis(apart, 2, 1).reshape(-1, *apart.shape[1:2], *bank.shape[2:]))
    return moe


def nnx_runs(model):
    return {p[-1]: a for p, a in weights(model).items() if p[:3] == ("runs", 0, 0) and len(p) == 5}


@pytest.mark.nightly
def test_models_without_pools_are_those_of_the_code_before():
    """A checkpoint that names no pools is read, and what was drawn then is drawn now: all bits."""
    place = DATA / "before_pools"
    assert "experts_across" not in (place / "checkpoint" / "config" / "metadata").read_text()
    old, now = fm.load_checkpoint(place / "checkpoint"), before_pools.scratch()
    assert old.config == now.config and old.config.moe.experts_across == 1
    then, drawn = weights(old), weights(now)
    assert then.keys() == drawn.keys()
    for path, array in then.items():
        np.testing.assert_array_equal(drawn[path], array, err_msg=str(path))
    digest = (place / "upcycled.sha256").read_text().strip()
    assert before_pools.digest(before_pools.upcycled()) == digest


@pytest.mark.slow
@pytest.mark.parametrize("start", ["random", "zero"])
@pytest.mark.parametrize("pooled_as", ["copies", "candidates"])
def test_upcycled_pools_start_as_layers_alone(dense, alone, pooled_as, start):
    """With other layers' experts masked: bit for bit."""
    moe = dataclasses.replace(POOLED, pooled_as=pooled_as)
    upcycling = UpcycleConfig(reuse_start=start)
    model = fm.upcycle_model(dense, moe, jax.random.key(1), upcycling)
    for got, wanted in zip(experts_of(model), experts_of(alone), strict=True):
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(at_start(model), at_start(alone))
    routers = [np.asarray(block.moe.router[...])[0] for block in model.runs[0]]
    for place, router in enumerate(routers):
        apart = router.reshape(ALONE.num_experts, 2, -1)
        own = np.asarray(alone.runs[0][0].moe.router[...])[place]
        np.testing.assert_array_equal(apart[:, place], own)
        foreign = apart[:, 1 - place]
        assert np.isclose(foreign.std(), 0.0 if start == "zero" else 0.02, rtol=0.1)
    if start == "random":
        assert not np.array_equal(at_start(model, foreign=False), at_start(alone))
        assert not np.array_equal(
            routers[0].reshape(ALONE.num_experts, 2, -1)[:, 1],
            routers[1].reshape(ALONE.num_experts, 2, -1)[:, 0],
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "least", "most"),
    [(UpcycleConfig(drop_ratio=0.5), 0.2, 0.8), (UpcycleConfig(copy_noise=0.1), 0.99, 1.0)],
)
def test_a_pools_experts_are_drawn_as_those_of_layers_alone(dense, alone, start, least, most):
    pool, layers = (fm.upcycle_model(dense, m, jax.random.key(1), start) for m in (POOLED, ALONE))
    for got, wanted, whole in zip(*map(experts_of, (pool, layers, alone)), strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert least <= (wanted != whole).mean() <= most


@pytest.mark.slow
@pytest.mark.parametrize("pooled_as", ["copies", "candidates"])
def test_a_pool_keeps_the_biases_of_its_layers(dense, pooled_as):
    """Other layers' experts, and candidate groups, get none; the first steps are the source's."""
    moe = dataclasses.replace(ALONE, selection_bias=True)
    source = fm.upcycle_model(dense, moe, jax.random.key(1))
    biases, rng = {}, np.random.default_rng(5)
    for name in ("expert_bias", "group_bias"):
        parameter = getattr(source.runs[0][0].moe, name)
        biases[name] = rng.normal(size=parameter.shape).astype(np.float32)
        parameter[...] = jnp.asarray(biases[name])
    given = lazy.of_params(nnx.to_pure_dict(nnx.state(source)))
    pool = dataclasses.replace(moe, experts_across=2, pooled_as=pooled_as)
    config, made = pooled_weights(source.config, given, pool, jax.random.key(2))
    model = with_params(config, lazy.in_memory(made), dtype="float32")
    for place, block in enumerate(model.runs[0]):
        experts = np.asarray(block.moe.expert_bias[...])[0].reshape(-1, 2)
        np.testing.assert_array_equal(experts[:, place], biases["expert_bias"][place])
        assert not experts[:, 1 - place].any()
        groups = np.asarray(block.moe.group_bias[...])[0]
        if pooled_as == "candidates":
            assert not groups.reshape(-1, 2)[:, 1 - place].any()
            groups = groups.reshape(-1, 2)[:, place]
        np.testing.assert_array_equal(groups, biases["group_bias"][place])
    if pooled_as == "candidates":
        np.testing.assert_array_equal(at_start(model), at_start(source))


@pytest.mark.slow
def test_from_a_trained_model_to_hugging_face_and_back(alone, tmp_path, capsys):
    fm.save_hf(alone, tmp_path / "trained")
    upcycling = UpcycleConfig(reuse_start="zero")
    asked = dict(upcycling=upcycling, seed=3, stated=True)
    source = str(tmp_path / "trained")
    convert(source, tmp_path / "pooled", "orbax", POOLED, **asked)
    pooled = fm.load_checkpoint(tmp_path / "pooled")
    np.testing.assert_array_equal(at_start(pooled), at_start(alone))
    report = verify(source, tmp_path / "pooled", "orbax", POOLED, **asked)
    assert (report.drawn, report.slices) == (2, 0)  # the routers
    with pytest.raises(fm.InputError, match="differ"):
        verify(
            source, tmp_path / "pooled", "orbax", POOLED, **asked | {"upcycling": UpcycleConfig()}
        )

    # A run with pools that starts from the trained model has the same weights.
    moe = dataclasses.asdict(POOLED)
    values = {"init_from": source, "moe": moe, "upcycle": {"reuse_start": "zero"}}
    initial = initial_model(run_config(values | {"train": {"seed": 3}}))
    assert initial.model.config == pooled.config and initial.dense is None
    own = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = initial.place(jax.tree.map(lambda _: own, nnx.to_pure_dict(nnx.state(initial.model))))
    for path, array in nnx.traversals.flatten_mapping(placed).items():
        np.testing.assert_array_equal(weights(pooled)[path], array, err_msg=str(path))

    places = (f"--source={tmp_path / 'pooled'}", f"--target={tmp_path / 'hf'}")
    assert invoke("convert", *places, "--to=hf") == 0
    notice = "has experts_across=2, pooled_as=copies: only the code in it"
    assert notice in capsys.readouterr().err
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("trained", "hf"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith("mlp.gate.weight"):
            assert after[name].shape == (2 * tensor.shape[0], tensor.shape[1])
        else:
            np.testing.assert_array_equal(tensor, after[name], err_msg=name)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["experts_across"], config["pooled_as"]) == (2, "copies")
    assert "experts_across" not in json.loads((tmp_path / "trained" / "config.json").read_text())
    again = fm.load_hf(tmp_path / "hf")
    for path, array in weights(pooled).items():
        np.testing.assert_array_equal(weights(again)[path], array, err_msg=str(path))
    assert verify(str(tmp_path / "pooled"), tmp_path / "hf", "hf", None).drawn == 0


@pytest.mark.slow
def test_what_does_not_fit_is_refused(dense, alone, tmp_path):
    fm.save_hf(alone, tmp_path / "trained")
    other = dataclasses.replace(POOLED, output_expansion=1)
    with pytest.raises(fm.InputError, match=r"differ(.|\n)*output_expansion"):
        convert(str(tmp_path / "trained"), tmp_path / "a", "orbax", other, seed=0, stated=True)
    with pytest.raises(fm.InputError, match="would have no effect"):
        convert(
            str(tmp_path / "trained"), tmp_path / "b", "orbax", POOLED, seed=0, stated=True,
            upcycling=UpcycleConfig(drop_ratio=0.5),
        )  # fmt: skip
    key = jax.random.key(0)
    with pytest.raises(fm.InputError, match=r"reuse_start=zero.*experts_across=1"):
        fm.upcycle_model(dense, ALONE, key, UpcycleConfig(reuse_start="zero"))
    grouped = fm.MoEConfig(4, 1, 2, 1, 4, shared_expert_intermediate_size=0, experts_across=2)
    with pytest.raises(fm.InputError, match=r"virtual_groups=True.*experts_across=2"):
        fm.upcycle_model(dense, grouped, key, UpcycleConfig(virtual_groups=True))
    depth = dataclasses.replace(POOLED, depth_vector=True)
    with pytest.raises(fm.InputError, match="depth_vector=True"):
        fm.save_hf(fm.upcycle_model(dense, depth, key), tmp_path / "c")
    deep = fm.upcycle_model(dense, dataclasses.replace(ALONE, depth_vector=True), key)
    fm.save_checkpoint(deep, tmp_path / "deep")
    with pytest.raises(fm.InputError, match=r"moe\.depth_vector: True there, False"):
        convert(str(tmp_path / "deep"), tmp_path / "d", "orbax", POOLED, seed=0, stated=True)
    assert not (tmp_path / "d").exists()
