"""Pools, experts that neighbouring layers share: routing, the model, masks."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import finermoe_jax as fm
from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.config.run import TrainConfig
from finermoe_jax.layers.sharding import ONE_DEVICE, Placement
from finermoe_jax.model import stack
from finermoe_jax.model.decoder import with_params
from finermoe_jax.moe.bank import bank_of_layer
from finermoe_jax.moe.layer import FineRMoE
from finermoe_jax.moe.psr import Reuse, first_kept, reuse_at
from finermoe_jax.moe.routing import home, route
from finermoe_jax.weights import lazy
from finermoe_jax.weights.upcycle import pooled_weights
from tests.oracles import naive, naive_decoder, naive_pool
from tests.support import SMALL
from tests.support.models import config_of
from tests.support.training import MOE, mixture_model, random_tokens

POOLED = ("copies", "candidates")
FOUR = dataclasses.replace(MOE, num_hidden_layers=4)
# The CPU's kernel takes blocks of rows, whose sizes depend on the number of experts.
PLAIN = Placement(kernel="reference")


@functools.cache
def base():
    """A model of four MoE layers, each with its own experts."""
    model = mixture_model(FOUR)
    model.placement = PLAIN
    return model


@functools.cache
def pooled(pooled_as="copies", across=2):
    """`base` with its experts shared; the other layers' rows of the routers are drawn."""
    moe = dataclasses.replace(FOUR.moe, experts_across=across, pooled_as=pooled_as)
    weights = lazy.of_params(nnx.to_pure_dict(nnx.state(base())))
    config, made = pooled_weights(base().config, weights, moe, jax.random.key(5))
    # As large as a layer's own rows, so that tokens take other layers' experts.
    params = nnx.traversals.flatten_mapping(lazy.in_memory(made))
    rng = np.random.default_rng(3)
    for path, array in params.items():
        if path[-1] == "router":
            apart = np.array(array).reshape(array.shape[0], -1, across, array.shape[2])
            foreign = np.arange(across) != path[2] % across
            apart[:, :, foreign] = 0.3 * rng.standard_normal(apart[:, :, foreign].shape)
            params[path] = jnp.asarray(apart.reshape(array.shape))
    model = with_params(config, nnx.traversals.unflatten_mapping(params), dtype="float32")
    model.placement = PLAIN
    return model


@functools.partial(jax.jit, static_argnums=(0, 3))
def features(graphdef, state, ids, mask=None, kept=None):
    psr = None if mask is None else Reuse(kept, jax.random.key(3), mask)
    return nnx.merge(graphdef, state).features(ids, psr=psr)


# --- routing --------------------------------------------------------------------------------

SETTINGS = {
    "published": {},
    "no shared expert": dict(shared=False),
    "pre_softmax": dict(pre_softmax=True),
    "plain_top_k": dict(plain_top_k=True, G_O=1),
    "separate routers": dict(separate_routers=True),
}


def pool_config(s, across, pooled_as, **moe):
    return ModelConfig(
        vocab_size=1,
        hidden_size=s.hidden_size,
        intermediate_size=s.intermediate_size,
        num_hidden_layers=across,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        max_position_embeddings=1,
        tie_word_embeddings=False,
        moe=MoEConfig(
            *(s.G_I, s.G_O, s.R_I, s.R_O, s.T_I),
            shared_expert_intermediate_size=None if s.shared else 0,
            plain_top_k=s.plain_top_k,
            pre_softmax=s.pre_softmax,
            separate_routers=s.separate_routers,
            experts_across=across,
            pooled_as=pooled_as,
            **moe,
        ),
    )


def interleaved(arrays):
    """[r][N, ...] as the pool has them, [N * r, ...]."""
    return np.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["all", "some masked"])
@pytest.mark.parametrize(
    ("name", "pooled_as"),
    # plain_top_k with candidates is refused (test_pools_that_do_not_fit_are_refused).
    [each for each in itertools.product(SETTINGS, POOLED) if each != ("plain_top_k", "candidates")],
)
def test_layers_of_a_pool_compute_what_the_loop_does(name, pooled_as, masked):
    r, tokens = 3, 5
    s = naive.Settings(
        **dict(hidden_size=12, intermediate_size=12, G_I=3, G_O=2, R_I=2, R_O=2, T_I=2)
        | SETTINGS[name]
    )
    config = pool_config(s, r, pooled_as, depth_vector=True)
    rng = np.random.default_rng(7)
    layers = naive_pool.random_pool(rng, s, r)
    x = rng.standard_normal((r, tokens, s.hidden_size))
    depth = rng.standard_normal(s.hidden_size)
    fused = [np.concatenate([w["experts_gate"], w["experts_up"]], axis=1) for w in layers]
    bank = [
        jnp.asarray(interleaved(arrays), jnp.float32)
        for arrays in (fused, [w["experts_down"].swapaxes(1, 2) for w in layers])
    ]
    for place in (0, 2):
        module = FineRMoE(config, "float32", nnx.Rngs(0), place)
        assert hasattr(module, "gate_up") == (place == 0)
        own = layers[place]
        module.router[...] = own["gate"].reshape(-1, s.hidden_size)
        module.depth_vector[...] = depth
        if s.separate_routers:
            rows = own["group_gate"] if pooled_as == "candidates" else own["group_gate"][:, 0]
            module.group_router[...] = rows.reshape(-1, s.hidden_size)
        if s.shared:
            module.shared_gate[...] = own["shared_expert_gate"][0]
            for part in ("gate", "up", "down"):
                getattr(module.shared, part)[...] = own[f"shared_{part}_proj"]
        module.bank = bank_of_layer(*bank, ONE_DEVICE)
        allowed = None
        if masked:
            kept = jnp.int32(first_kept(config.moe) + (pooled_as == "copies"))
            module.allowed = Reuse(kept, jax.random.key(place), "random").allowed(
                config.moe, place, place
            )
            allowed = np.asarray(module.allowed).reshape(s.N, r)
            assert 0 < allowed.sum() < allowed.size
        y, routing, _ = module(
            jnp.asarray(x[place][None], jnp.float32), jnp.ones((1, tokens), bool)
        )
        wanted, experts, weights = naive_pool.layer(
            x[place], own["gate"], layers, own, s, pooled_as, allowed, depth
        )
        np.testing.assert_array_equal(routing.experts[0], experts)
        np.testing.assert_allclose(routing.weights[0], weights, rtol=1e-5)
        np.testing.assert_allclose(y[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_slot_and_one_candidate_are_a_plain_top_k():
    """G_O = R_O = 1: ReXMoE's own top-K over r * N."""
    grouped = MoEConfig(8, 1, 1, 1, 4, experts_across=4)
    plain = dataclasses.replace(grouped, plain_top_k=True)
    logits = jax.random.normal(jax.random.key(0), (2, 50, 32))
    for moe in (grouped, plain):
        routing, _ = route(logits, moe, "float32")
        wanted = np.argsort(-np.asarray(logits), axis=-1)[..., :4]
        np.testing.assert_array_equal(routing.experts, wanted)


@pytest.mark.parametrize("pooled_as", POOLED)
def test_even_loads_cover_the_pool(pooled_as):
    moe = MoEConfig(4, 2, 1, 2, 2, experts_across=2, pooled_as=pooled_as)
    tokens = moe.pool_candidates * moe.pool_group_size
    routing, order = route(jnp.zeros((1, tokens, moe.pool_size)), moe, "float32", even=True)
    loads = np.bincount(np.asarray(routing.experts).ravel(), minlength=moe.pool_size)
    np.testing.assert_array_equal(loads, loads[0])
    by_slot = np.take_along_axis(np.asarray(routing.experts), np.asarray(order), -1)
    np.testing.assert_array_equal(by_slot.reshape(-1, 2, 2) // 16, [[[0, 0], [1, 1]]] * tokens)


def test_home():
    assert home(7) == (0, 7)
    assert home(7, experts_across=2, layer=4) == home(7, 2, 5) == (5, 3)
    layer, expert = fm.home(jnp.arange(8), experts_across=4, layer=2)
    np.testing.assert_array_equal(layer, [0, 1, 2, 3, 0, 1, 2, 3])
    np.testing.assert_array_equal(expert, [0, 0, 0, 0, 1, 1, 1, 1])


# --- the model ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pooled_as", POOLED)
def test_without_foreign_experts_the_model_is_that_of_layers_alone(pooled_as):
    """Masked at N_t = N: bit for bit."""
    model, ids = pooled(pooled_as), random_tokens(2)
    kept = jnp.int32(first_kept(model.config.moe))
    alone = features(*nnx.split(base()), ids)
    got = features(*nnx.split(model), ids, "foreign", kept)
    np.testing.assert_array_equal(got.hidden, alone.hidden)
    for layer, (pool, own) in enumerate(zip(got.routing, alone.routing, strict=True)):
        np.testing.assert_array_equal(pool.experts, 2 * own.experts + layer % 2)
        np.testing.assert_array_equal(pool.weights, own.weights)
    np.testing.assert_allclose(got.aux_loss, alone.aux_loss, rtol=1e-5)
    free = features(*nnx.split(model), ids)
    assert not np.array_equal(free.hidden, alone.hidden)
    for layer, routing in enumerate(free.routing):
        assert np.mean(np.asarray(routing.experts) % 2 != layer % 2) > 0.1  # foreign ones


@pytest.mark.slow
@pytest.mark.parametrize("pooled_as", POOLED)
def test_the_loop_over_layers_and_tokens(tmp_path, pooled_as):
    """Which pool a layer reads, and which of its routers' rows are whose: four layers in NumPy."""
    model, ids = pooled(pooled_as), random_tokens(1, 6)
    fm.save_hf(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    settings = naive.Settings(32, 64, G_I=4, G_O=2, R_I=1, R_O=2, T_I=1)
    loop = functools.partial(
        naive_decoder.decoder, ids[0], tensors, config_of(tmp_path / "out"), settings, 0, 2
    )
    got = np.asarray(model(ids).logits[0])
    np.testing.assert_allclose(got, loop(pooled_as), atol=2e-4)
    other = next(each for each in POOLED if each != pooled_as)
    assert np.abs(got - loop(other)).max() > 0.1


@pytest.mark.slow
def test_a_layers_experts_serve_its_group_alone():
    """A changed expert of layer 2 changes layers 2 and 3, never 0 and 1."""
    model, ids = pooled(), random_tokens(2)
    graphdef, state = nnx.split(model)
    before = features(graphdef, state, ids)
    params = nnx.to_pure_dict(state)
    chosen = np.asarray(before.routing[3].experts)
    expert = int(chosen[chosen % 2 == 0][0])  # an expert of layer 2 that layer 3 uses
    assert home(expert, 2, 3) == (2, expert // 2)
    down = params["runs"][0][0]["moe"]["down"]
    params["runs"][0][0]["moe"]["down"] = down.at[1, expert].set(0.0)
    changed = with_params(model.config, params, dtype="float32")
    changed.placement = PLAIN
    after = features(*nnx.split(changed), ids)
    for layer in (0, 1, 2):  # a router sees what the layers before it computed
        np.testing.assert_array_equal(before.routing[layer].logits, after.routing[layer].logits)
    assert not np.array_equal(before.hidden, after.hidden)


@pytest.mark.slow
def test_the_gradient_of_an_expert_that_two_layers_use():
    """Against differences, and against layers that each have a copy of the bank."""
    model, ids = pooled(), random_tokens(2)
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    routing = features(graphdef, state, ids).routing
    both = set(np.asarray(routing[0].experts).ravel()) & set(np.asarray(routing[1].experts).ravel())
    expert = int(min(both))

    def loss(bank):
        given = jax.tree.map(lambda leaf: leaf, params)
        given["runs"][0][0]["moe"]["gate_up"], given["runs"][0][0]["moe"]["down"] = bank
        made = nnx.merge(graphdef, nnx.State(given))
        return (made.features(ids).hidden * jnp.cos(jnp.arange(32.0))[None, None]).sum()

    bank = tuple(params["runs"][0][0]["moe"][name] for name in ("gate_up", "down"))
    got = jax.jit(jax.grad(loss))(bank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "_bank", lambda *_: None)
        wanted = jax.jit(jax.grad(lambda bank: loss(bank)))(bank)
    value = jax.jit(lambda bank: loss(bank))
    for place, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)
        assert np.linalg.norm(a[0, expert]) > 0
        direction = np.zeros(b.shape, np.float32)
        direction[0, expert] = np.asarray(b)[0, expert] / np.linalg.norm(np.asarray(b)[0, expert])
        moved = [list(bank), list(bank)]
        step = 1e-2
        moved[0][place] += step * direction
        moved[1][place] -= step * direction
        slope = (value(tuple(moved[0])) - value(tuple(moved[1]))) / (2 * step)
        np.testing.assert_allclose(np.sum(np.asarray(a) * direction), slope, rtol=1e-2)


@pytest.mark.slow
def test_generation_is_the_models_own_next_token():
    model = pooled()
    ids = random_tokens(2, 6)
    out = np.asarray(fm.generate(model, ids, max_new_tokens=3))
    logits = np.asarray(model(out[:, :-1]).logits)
    np.testing.assert_array_equal(out[:, 6:], logits[:, 5:].argmax(-1))


def test_patterns_hold_whole_groups():
    dense = dict(decoder_sparse_step=2)
    for layers, across, more, runs in (
        (8, 2, {}, ((("moe", "moe"), 4),)),
        (8, 4, {}, ((("moe",) * 4, 2),)),
        (8, 2, dense, ((("dense", "moe") * 2, 2),)),
        (5, 2, dict(mlp_only_layers=(0,)), ((("dense",), 1), (("moe", "moe"), 2))),
        (6, 4, dict(mlp_only_layers=(2, 5)), ((("moe", "moe", "dense") * 2, 1),)),
        (5, 2, dict(mlp_only_layers=(2,)), ((("moe",) * 2, 1), (("dense",), 1), (("moe",) * 2, 1))),
    ):
        moe = MoEConfig(4, 2, 1, 2, 1, experts_across=across, **more)
        config = dataclasses.replace(SMALL, num_hidden_layers=layers, moe=moe)
        assert config.layer_runs == runs
        for pattern, _ in runs:
            places = [place for place in config.pool_places(pattern) if place is not None]
            assert places == list(range(across)) * (len(places) // across)


SIZES = dict(intermediate_granularity=4, output_granularity=2, output_expansion=2)


@pytest.mark.parametrize(
    ("layers", "moe", "words"),
    [
        (4, dict(experts_across=3), ["experts_across=3", "4", "use 1, 2, 4"]),
        (5, dict(experts_across=2), ["experts_across=2", "5", "use 1, 5"]),
        (7, dict(experts_across=2, mlp_only_layers=(3,)), ["experts_across=2", "3", "use 1, 3"]),
        (4, dict(experts_across=0), ["experts_across=0"]),
        (4, dict(experts_across=2, decoder_sparse_step=9), ["have no", "use 1"]),
        (
            4,
            dict(experts_across=2, pooled_as="candidates", plain_top_k=True, output_granularity=1),
            ["plain_top_k=True", "pooled_as=copies"],
        ),
    ],
)
def test_pools_that_do_not_fit_are_refused(layers, moe, words):
    with pytest.raises(fm.InputError) as error:
        dataclasses.replace(SMALL, num_hidden_layers=layers, moe=MoEConfig(**SIZES | moe))
    assert [word for word in words if word not in str(error.value)] == [], error.value


# --- progressive scaling of routing ---------------------------------------------------------


def kept_at(step, moe, steps=100, **train):
    train = TrainConfig(steps=steps, **{"psr": "linear", **train})
    return int(reuse_at(jnp.int32(step), train, moe).kept)


def test_the_number_of_experts_grows_as_in_the_paper():
    moe = MoEConfig(8, 1, 1, 1, 2, experts_across=4)
    for step in (0, 20, 21, 33, 40, 59, 60, 99):
        share = min(max((step - 20) / 40, 0), 1)
        assert kept_at(step, moe) == int((1 + 3 * share) * 8 + 1e-9), step
    # The paper's stepwise variant: 64, 128, 192, 256 of 64 * 4 experts at 10k, 20k, 30k.
    paper = MoEConfig(64, 1, 1, 1, 8, experts_across=4)
    stepwise = dict(psr="stepwise", steps=48, psr_start=10 / 48, psr_end=30 / 48)
    found = [kept_at(step, paper, **stepwise) for step in (0, 9, 10, 19, 20, 29, 30, 47)]
    assert found == [64, 64, 128, 128, 192, 192, 256, 256]
    # With two layers stepwise is a single step, at psr_start.
    two = dataclasses.replace(moe, experts_across=2)
    found = [kept_at(step, two, psr="stepwise") for step in (0, 19, 20, 59, 60, 99)]
    assert found == [8, 8, 16, 16, 16, 16]
    # Without pools, the control: from half of the layer's own experts to all.
    alone = MoEConfig(16, 1, 1, 1, 2)
    assert [kept_at(step, alone) for step in (0, 20, 40, 60)] == [8, 8, 12, 16]
    assert reuse_at(jnp.int32(0), TrainConfig(), moe) is None


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["random", "foreign"])
@pytest.mark.parametrize("pooled_as", POOLED)
def test_every_group_loses_the_same_number(pooled_as, mask):
    moe = MoEConfig(4, 2, 1, 2, 1, experts_across=2, pooled_as=pooled_as)
    train = TrainConfig(steps=100, psr="linear", psr_mask=mask)
    masks = {}
    for step in (0, 40, 60):
        psr = reuse_at(jnp.int32(step), train, moe)
        for layer in (0, 1):
            allowed = np.asarray(psr.allowed(moe, layer, layer)).reshape(2, 2, 4, 2)
            masks[step, layer] = allowed
            counts = {0: 4, 40: 6, 60: 8}[step]
            if pooled_as == "copies":
                np.testing.assert_array_equal(allowed.sum((2, 3)), counts)
            else:  # whole candidate groups: 2, 3 or 4 of each slot
                np.testing.assert_array_equal(allowed.sum((1, 2, 3)), counts * 2)
                assert (allowed.all(2) == allowed.any(2)).all()
            if mask == "foreign":
                assert allowed[..., layer].all()
    assert masks[60, 0].all()
    if mask == "random":
        assert not np.array_equal(masks[0, 0], masks[0, 1])
    again = reuse_at(jnp.int32(40), train, moe).allowed(moe, 1, 1)
    np.testing.assert_array_equal(masks[40, 1].ravel(), again)
