"""Routing ahead: routers that read the FFN input of an earlier layer (docs/route_ahead.md)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import finermoe_jax as fm
from finermoe_jax.model.decoder import parameter_shapes, with_params
from tests.oracles import naive, naive_decoder
from tests.support.models import config_of
from tests.support.training import MOE, mixture_model, random_tokens

FOUR = dataclasses.replace(MOE, num_hidden_layers=4)
MIXED = dict(num_hidden_layers=5, mlp_only_layers=(0, 3))  # runs of one, two, one and one layers


def changed(config=FOUR, num_hidden_layers=None, **moe):
    layers = num_hidden_layers or config.num_hidden_layers
    moe = dataclasses.replace(config.moe, **moe)
    return dataclasses.replace(config, num_hidden_layers=layers, moe=moe)


@functools.cache
def base(**changes):
    return mixture_model(changed(**changes))


def ahead_of(model, ahead, **moe):
    """The same weights, read as a model that routes ahead."""
    config = changed(model.config, route_ahead=ahead, **moe)
    made = with_params(config, nnx.to_pure_dict(nnx.state(model)), dtype="float32")
    made.placement = model.placement
    return made


@functools.partial(jax.jit, static_argnames=("graphdef", "settings"))
def compiled(graphdef, state, ids, settings=(), **arrays):
    return nnx.merge(graphdef, state).features(ids, **arrays, **dict(settings))


def features(model, ids, settings=(), **arrays):
    return compiled(*nnx.split(model), ids, tuple(settings), **arrays)


def experts(features):
    return [np.asarray(each.experts) for each in features.routing]


@pytest.mark.parametrize(
    ("changes", "ahead"),
    [({}, 1), ({}, 2), (MIXED, 1), (MIXED, 2), (dict(decoder_sparse_step=2), 1)],
    ids=["1", "2", "mixed 1", "mixed 2", "every other"],
)
def test_the_loop_over_layers_and_tokens(tmp_path, changes, ahead):
    """With a dense layer before the first MoE layer, and with none."""
    model = ahead_of(base(**changes), ahead)
    ids = random_tokens(2, 7)
    fm.save_hf(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    settings = naive.Settings(32, 64, G_I=4, G_O=2, R_I=1, R_O=2, T_I=1)
    got = np.asarray(model(ids).logits)
    for row in range(2):
        wanted = naive_decoder.decoder(
            ids[row], tensors, config_of(tmp_path / "out"), settings, ahead
        )
        np.testing.assert_allclose(got[row], wanted, atol=2e-4)
    other = np.asarray(base(**changes)(ids).logits)
    assert np.abs(other - got).max() > 0.1


def test_blocks_that_add_nothing_make_all_distances_equal():
    params = nnx.to_pure_dict(nnx.state(base()))
    for path, leaf in nnx.traversals.flatten_mapping(params).items():
        if path[-2:] in (("attention", "out"), ("moe", "down"), ("shared", "down")):
            target = params
            for name in path[:-1]:
                target = target[name]
            target[path[-1]] = jnp.zeros_like(leaf)
    still = with_params(FOUR, params, dtype="float32")
    ids = random_tokens(2)
    wanted = features(still, ids)
    assert np.ptp(np.asarray(wanted.hidden)) > 0
    for ahead in (1, 3):
        jax.tree.map(np.testing.assert_array_equal, features(ahead_of(still, ahead), ids), wanted)


def test_the_parameters_are_those_of_a_model_that_does_not():
    for ahead in (1, 3):
        assert parameter_shapes(changed(route_ahead=ahead)) == parameter_shapes(FOUR)


@pytest.mark.parametrize("changes", [{}, MIXED, dict(experts_across=2)], ids=["", "mixed", "pool"])
def test_generation_is_the_models_own_next_token(changes):
    model = ahead_of(base(**changes), 2)
    ids, mask = random_tokens(2, 6), np.ones((2, 6), np.int32)
    mask[1, :2] = 0
    out = np.asarray(fm.generate(model, ids, mask, max_new_tokens=4))
    seen = np.concatenate([mask, np.ones((2, 4), np.int32)], axis=1)
    logits = np.asarray(model(out[:, :-1], seen[:, :-1]).logits)
    np.testing.assert_array_equal(out[:, 6:], logits[:, 5:].argmax(-1))


def test_padding_and_packed_texts_do_not_matter():
    model, ids = ahead_of(base(), 1), random_tokens(1, 12)
    alone = [np.asarray(model(part).logits) for part in (ids[:, :5], ids[:, 5:])]
    segments = jnp.asarray([[1] * 5 + [2] * 7])
    positions = jnp.asarray([[*range(5), *range(7)]])
    packed = model(ids, position_ids=positions, segment_ids=segments).logits
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), atol=1e-4)
    mask = jnp.asarray([[0] * 5 + [1] * 7])
    np.testing.assert_allclose(model(ids, mask).logits[:, 5:], alone[1], atol=1e-4)


def loss_of(graphdef, ids, settings, state):
    out = nnx.merge(graphdef, state).features(ids, **dict(settings))
    return (out.hidden * jnp.cos(jnp.arange(32.0))[None, None]).sum() + out.aux_loss.sum()


@pytest.mark.parametrize("changes", [{}, MIXED], ids=["", "mixed"])
def test_remat_and_unrolled_loops_change_nothing(changes):
    model, ids = ahead_of(base(**changes), 2), random_tokens(2)
    graphdef, state = nnx.split(model)
    value = {
        settings: jax.jit(jax.value_and_grad(functools.partial(loss_of, graphdef, ids, settings)))(
            state
        )
        for settings in ((), (("remat", "full"),), (("unroll", 4),))
    }
    wanted, gradients = value.pop(())
    for got, other in value.values():
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(gradients), strict=True):
            assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


def test_a_routers_gradient_against_differences():
    """In the direction of the gradient itself."""
    model, ids = ahead_of(base(), 1), random_tokens(2)
    graphdef, state = nnx.split(model)
    loss = jax.jit(functools.partial(loss_of, graphdef, ids, ()))
    gradient = jax.grad(loss)(state)
    router = np.asarray(gradient["runs"][0][0]["moe"]["router"][...])
    assert (np.linalg.norm(router, axis=(1, 2)) > 0).all()
    direction = router / np.linalg.norm(router)

    def moved(step):
        params = nnx.to_pure_dict(state)
        params["runs"][0][0]["moe"]["router"] += step * direction
        return float(loss(nnx.State(params)))

    slope = (moved(1e-3) - moved(-1e-3)) / 2e-3
    np.testing.assert_allclose(slope, np.linalg.norm(router), rtol=2e-2)
