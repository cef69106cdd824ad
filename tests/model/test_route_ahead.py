"""Routing ahead: routers that read the FFN input of an earlier layer (docs/route_ahead.md)."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import finermoe_jax as fm
from benchmarks.studies import ahead
from finermoe_jax.config.run import MeshConfig
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.model.decoder import parameter_shapes, with_params
from finermoe_jax.moe.psr import Reuse, first_kept
from finermoe_jax.training.initial import initial_model
from finermoe_jax.weights import lazy
from finermoe_jax.weights.convert import convert
from finermoe_jax.weights.hf_config import model_config_to_hf
from finermoe_jax.weights.upcycle import pooled_weights
from finermoe_jax.weights.verify import verify
from tests.oracles import naive, naive_decoder
from tests.support import ROOT, command, load_preset
from tests.support.models import config_of, weights
from tests.support.training import (
    MOE,
    assert_same_steps,
    mixture_model,
    random_tokens,
    small_run,
    take_steps,
)

DEMO = ROOT / "finermoe_jax" / "demo" / "model"
FOUR = dataclasses.replace(MOE, num_hidden_layers=4)
MIXED = dict(num_hidden_layers=5, mlp_only_layers=(0, 3))  # runs of one, two, one and one layers


def changed(config=FOUR, num_hidden_layers=None, **moe):
    layers = num_hidden_layers or config.num_hidden_layers
    moe = dataclasses.replace(config.moe, **moe)
    return dataclasses.replace(config, num_hidden_layers=layers, moe=moe)


@functools.cache
def base(**changes):
    return mixture_model(changed(**changes))


def ahead_of(model, distance):
    """The same weights, read as a model that routes ahead."""
    config = changed(model.config, route_ahead=distance)
    made = with_params(config, nnx.to_pure_dict(nnx.state(model)), dtype="float32")
    made.placement = model.placement
    return made


@functools.partial(jax.jit, static_argnames="graphdef")
def compiled(graphdef, state, ids, kept=None):
    psr = None if kept is None else Reuse(kept, jax.random.key(0), "foreign")
    return nnx.merge(graphdef, state).features(ids, psr=psr)


def features(model, *arrays):
    return compiled(*nnx.split(model), *arrays)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "distance"),
    [({}, 1), ({}, 2), (MIXED, 1), (MIXED, 2)],
    ids=["1", "2", "mixed 1", "mixed 2"],
)
def test_the_loop_over_layers_and_tokens(tmp_path, changes, distance):
    """With a dense layer before the first MoE layer, and with none."""
    model = ahead_of(base(**changes), distance)
    ids = random_tokens(1, 7)
    fm.save_hf(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    settings = naive.Settings(32, 64, G_I=4, G_O=2, R_I=1, R_O=2, T_I=1)
    got = np.asarray(model(ids).logits)
    loop = functools.partial(
        naive_decoder.decoder, ids[0], tensors, config_of(tmp_path / "out"), settings
    )
    np.testing.assert_allclose(got[0], loop(distance), atol=2e-4)
    assert np.abs(got[0] - loop(0)).max() > 0.1


@pytest.mark.slow
def test_blocks_that_add_nothing_make_all_distances_equal():
    params = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(base())))
    for path, leaf in params.items():
        if path[-2:] in (("attention", "out"), ("moe", "down"), ("shared", "down")):
            params[path] = jnp.zeros_like(leaf)
    still = with_params(FOUR, nnx.traversals.unflatten_mapping(params), dtype="float32")
    ids = random_tokens(2)
    wanted = features(still, ids)
    assert np.ptp(np.asarray(wanted.hidden)) > 0
    for distance in (1, 3):
        got = features(ahead_of(still, distance), ids)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_the_parameters_are_those_of_a_model_that_does_not():
    for distance in (1, 3):
        assert parameter_shapes(changed(route_ahead=distance)) == parameter_shapes(FOUR)


@pytest.mark.nightly
def test_generation_is_the_models_own_next_token():
    """With pools, and dense layers in a pattern."""
    model = ahead_of(base(num_hidden_layers=6, mlp_only_layers=(0, 3), experts_across=2), 2)
    ids, mask = random_tokens(2, 6), np.ones((2, 6), np.int32)
    mask[1, :2] = 0
    out = np.asarray(fm.generate(model, ids, mask, max_new_tokens=4))
    seen = np.concatenate([mask, np.ones((2, 4), np.int32)], axis=1)
    logits = np.asarray(model(out[:, :-1], seen[:, :-1]).logits)
    np.testing.assert_array_equal(out[:, 6:], logits[:, 5:].argmax(-1))


@pytest.mark.slow
def test_padding_and_packed_texts_do_not_matter():
    model, ids = ahead_of(base(), 1), random_tokens(1, 12)
    first = (jnp.arange(12)[None] < 5).astype(jnp.int32)
    alone = model(jnp.concatenate([ids, ids]), jnp.concatenate([first, 1 - first])).logits
    packed = model(
        ids,
        position_ids=jnp.asarray([[*range(5), *range(7)]]),
        segment_ids=2 - first,
    ).logits
    np.testing.assert_allclose(packed[0, :5], alone[0, :5], atol=1e-4)
    np.testing.assert_allclose(packed[0, 5:], alone[1, 5:], atol=1e-4)


@pytest.mark.nightly  # compiles three backward passes
def test_gradients_against_differences_recomputed_and_unrolled():
    model, ids = ahead_of(base(**MIXED), 2), random_tokens(2)
    graphdef, state = nnx.split(model)

    def loss(state, settings):
        out = nnx.merge(graphdef, state).features(ids, **dict(settings))
        return (out.hidden * jnp.cos(jnp.arange(32.0))[None, None]).sum() + out.aux_loss.sum()

    graded = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    wanted, gradients = graded(state, ())
    for settings in ((("remat", "full"),), (("unroll", 4),)):
        got, other = graded(state, settings)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(gradients), strict=True):
            assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)
    # In the direction of a router's gradient.
    router = np.asarray(gradients["runs"][1][0]["moe"]["router"][...])
    assert (np.linalg.norm(router, axis=(1, 2)) > 0).all()

    def moved(step):
        params = nnx.to_pure_dict(state)
        params["runs"][1][0]["moe"]["router"] += step * router / np.linalg.norm(router)
        return float(graded(nnx.State(params), ())[0])

    slope = (moved(1e-3) - moved(-1e-3)) / 2e-3
    np.testing.assert_allclose(slope, np.linalg.norm(router), rtol=2e-2)


@pytest.mark.nightly  # compiles two training steps
def test_eight_devices_compute_what_one_does():
    config = small_run(8, remat="full")
    model = changed(**MIXED, route_ahead=2)
    wanted = take_steps(config, MeshConfig(1, 1, 1, 1), 1, model)
    assert_same_steps(take_steps(config, MeshConfig(2, 1, 4, 1), 1, model), wanted)


@pytest.mark.nightly
def test_masks_biases_and_even_loads_act_on_the_choice_as_ever():
    ids = random_tokens(2, 16)
    alone = ahead_of(base(), 1)
    # Pools with all other layers' experts masked: bit for bit the layers alone.
    moe = dataclasses.replace(alone.config.moe, experts_across=2)
    source = lazy.of_params(nnx.to_pure_dict(nnx.state(alone)))
    config, made = pooled_weights(alone.config, source, moe, jax.random.key(5))
    assert config.moe.route_ahead == 1
    pooled = with_params(config, lazy.in_memory(made), dtype="float32")
    alone.placement = pooled.placement = Placement(kernel="reference")
    got = features(pooled, ids, jnp.int32(first_kept(moe)))
    wanted = features(alone, ids)
    np.testing.assert_array_equal(got.hidden, wanted.hidden)
    # Forced loads are even whatever the routers read.
    alone.placement = Placement(kernel="reference", force_balance=True)
    even = features(alone, ids)
    np.testing.assert_array_equal(even.expert_tokens, 2 * 2 * 16 / 16)
    # Biases add to the logits from the earlier input.
    biased = with_params(
        changed(route_ahead=1, selection_bias=True),
        with_biases(nnx.to_pure_dict(nnx.state(base()))),
        dtype="float32",
    )
    for layer, routing in enumerate(features(biased, ids).routing):
        assert (np.sort(routing.experts) == np.array([[[4, 12]]])).all(), layer
        assert routing.weights.std() > 0.01, layer


def with_biases(params):
    """Biases that leave each slot one candidate group and one expert of it."""
    moe = params["runs"][0][0]["moe"]
    moe["expert_bias"] = jnp.zeros((4, 16)).at[:, jnp.array([4, 12])].set(1e4)
    moe["group_bias"] = jnp.zeros((4, 4)).at[:, jnp.array([1, 3])].set(1e4)
    return params


@pytest.mark.nightly
def test_a_trained_model_routes_ahead_with_its_own_weights(tmp_path, capsys):
    """Converted there and back, exported, and at the start of a run."""
    demo = fm.upcycle(fm.load_hf(DEMO), intermediate_granularity=8)
    fm.save_checkpoint(demo, tmp_path / "trained", tokenizer=DEMO)
    source, run = str(tmp_path / "trained"), load_preset("demo", "ahead1")
    asked = dict(moe=run.moe, seed=0, stated=True)
    convert(source, tmp_path / "early", "orbax", **asked)
    early = fm.load_checkpoint(tmp_path / "early")
    assert early.config == changed(demo.config, route_ahead=1)
    for path, array in weights(demo).items():
        np.testing.assert_array_equal(weights(early)[path], array, err_msg=str(path))
    report = verify(source, tmp_path / "early", "orbax", **asked)
    assert report.copied and not (report.drawn or report.slices or report.recomputed)
    with pytest.raises(fm.InputError, match=r"moe.route_ahead: 1 there, 0 "):
        verify(source, tmp_path / "early", "orbax", **asked | {"moe": None})

    done = command("convert", f"--source={tmp_path}/early", f"--target={tmp_path}/hf", "--to=hf")
    assert done.returncode == 0 and "has route_ahead=1: only the code in it" in done.stderr
    assert config_of(tmp_path / "hf")["route_ahead"] == 1
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| layers by which routers read ahead | 1 |" in card
    assert "route_ahead" not in model_config_to_hf(demo.config, "float32")
    stated = dict(shared_expert_intermediate_size=512)
    assert fm.load_hf(tmp_path / "hf").config == changed(early.config, **stated)
    late = dataclasses.replace(run.moe, route_ahead=0)
    convert(str(tmp_path / "hf"), tmp_path / "late", "orbax", late, seed=0, stated=True)
    assert fm.load_checkpoint(tmp_path / "late").config == changed(demo.config, **stated)

    capsys.readouterr()
    ahead.main(source, DEMO.parent / "LICENSE.pydoc.txt", 2, 16, tmp_path / "shares.json")
    assert len(capsys.readouterr().out.splitlines()) == 1 + 3 * 2 + 2
    shares = json.loads((tmp_path / "shares.json").read_text())
    assert [shares[k]["layers"] for k in "123"] == [[1, 2, 3]] * 3
    np.testing.assert_array_equal(shares["2"]["same"][0], shares["1"]["same"][0])
    with pytest.raises(fm.InputError, match="fewer than 900 rows of 16"):
        ahead.first_tokens(DEMO.parent / "LICENSE.pydoc.txt", fm.load_tokenizer(DEMO), 900, 16)

    initial = initial_model(dataclasses.replace(run, init_from=source))
    assert initial.model.config == early.config and initial.dense is None
    upcycled = initial_model(run)
    assert upcycled.model.config == early.config and upcycled.dense is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(route_ahead=-1), ["route_ahead=-1", "at least 0"]),
        (dict(route_ahead=4), ["route_ahead=4", "which is 4", "at most 3"]),
        (dict(route_ahead=3, **MIXED), ["route_ahead=3", "which is 3", "at most 2"]),
        (dict(route_ahead=1, decoder_sparse_step=9), ["route_ahead=1", "which is 0", "at most 0"]),
    ],
)
def test_distances_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(fm.InputError) as error:
        changed(**changes)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.nightly
def test_agreement_of_the_choices():
    """The study's shares, beside loops over the choices of models that route ahead at one layer."""
    model, ids = base(**MIXED), np.asarray(random_tokens(3, 11))
    got = ahead.agreement(model, ids, 2)
    assert got.layers == (1, 2, 4)
    own = features(model, ids).routing
    # Layer 1 is the first MoE layer, so what it reads is the same in both models.
    early = features(ahead_of(model, 2), ids).routing
    same, group = np.zeros((3, 11, 2)), np.zeros((3, 11, 2))
    for place in np.ndindex(3, 11):
        for a in np.asarray(own[0].experts)[place]:
            for b in np.asarray(early[0].experts)[place]:
                if a // 8 == b // 8:
                    same[place][a // 8], group[place][a // 8] = a == b, a // 4 == b // 4
    np.testing.assert_allclose(got.same[0], same.mean((0, 1)))
    np.testing.assert_allclose(got.group[0], group.mean((0, 1)))
    assert (got.same <= got.group).all() and got.chance.min() > 0 and got.chance.max() < 1
    with pytest.raises(fm.InputError, match=r"route_ahead=2: give .* with route_ahead=0"):
        ahead.agreement(ahead_of(model, 2), ids, 1)
    assert "mean     1" in ahead.table({2: got})
