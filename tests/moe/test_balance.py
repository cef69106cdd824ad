"""The kinds of balancing against NumPy, on any sharding, with and without padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.run import MeshConfig
from finermoe_jax.layers import sharding
from finermoe_jax.moe.balance import (
    batch_load_balancing_loss,
    expert_tokens,
    load_balancing_loss,
    pool_balancing_loss,
    router_z_loss,
    updated_bias,
)
from finermoe_jax.moe.routing import SelectionBias, in_groups, out_of_groups, route
from tests.oracles import naive

MOE = MoEConfig(4, 2, 1, 2, 1, selection_bias=True)
SIZES = dict(hidden_size=8, intermediate_size=12)
SETTINGS = {
    "published": naive.Settings(**SIZES, G_I=4, G_O=2, R_I=1, R_O=2, T_I=1),
    "copies": naive.Settings(**SIZES, G_I=3, G_O=2, R_I=2, R_O=3, T_I=2),
    "one group": naive.Settings(**SIZES, G_I=4, G_O=1, R_I=1, R_O=1, T_I=2),
    "plain_top_k": naive.Settings(**SIZES, G_I=4, G_O=1, R_I=1, R_O=2, T_I=3, plain_top_k=True),
    "separate_routers": naive.Settings(
        **SIZES, G_I=4, G_O=2, R_I=1, R_O=2, T_I=1, separate_routers=True
    ),
}
every_setting = pytest.mark.parametrize("s", SETTINGS.values(), ids=SETTINGS)


def _moe(s):
    return MoEConfig(
        s.G_I, s.G_O, s.R_I, s.R_O, s.T_I, plain_top_k=s.plain_top_k,
        separate_routers=s.separate_routers, selection_bias=True,
    )  # fmt: skip


def _biases(s, rng, scale=1.0):
    """Random ones, float32: zero mean is the rule's work, not the choice's."""
    groups = None if s.plain_top_k else scale * rng.standard_normal(s.G_O * s.R_O)
    experts = scale * rng.standard_normal(s.N)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), SelectionBias(experts, groups))


@pytest.mark.slow
def test_aux_loss_of_uniform_routing_is_one_and_ignores_padding():
    logits = jnp.zeros((2, 8, 4))
    experts = jnp.broadcast_to(jnp.array([[0, 2], [1, 3]]).repeat(4, 0), (2, 8, 2))
    mask = jnp.ones((2, 8), bool)
    for loss in (load_balancing_loss, batch_load_balancing_loss):
        assert loss(logits, experts, mask) == pytest.approx(1.0)
        padded = (
            jnp.concatenate([logits, jnp.full((2, 3, 4), 7.0)], 1),
            jnp.concatenate([experts, jnp.zeros((2, 3, 2), int)], 1),
            jnp.arange(11)[None] < 8,
        )
        assert loss(*padded[:2], jnp.broadcast_to(padded[2], (2, 11))) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [load_balancing_loss, batch_load_balancing_loss])
def test_aux_loss_gradient_flows_through_the_probabilities_only(loss):
    logits = jnp.array([[[0.5, -0.5, 1.0, 0.0], [2.0, 0.0, -1.0, 1.0]]])
    experts = jnp.array([[[0, 2], [0, 3]]])
    grad = jax.grad(loss)(logits, experts, jnp.ones((1, 2), bool))
    f = np.array([2, 0, 1, 1]) * 4 / (2 * 2)
    p = np.asarray(jax.nn.softmax(logits[0], -1))
    for t in range(2):
        expected = (p[t] * (f - (f * p[t]).sum())) / 2
        np.testing.assert_allclose(grad[0, t], expected, rtol=1e-5)


def _batch(seed=0, rows=8, tokens=6):
    """Logits, the experts that they choose, and a mask with one row of padding alone."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(0, 2, (rows, tokens, MOE.num_experts)), jnp.float32)
    mask = jnp.asarray(rng.random((rows, tokens)) < 0.7).at[3].set(False)
    return logits, route(logits, MOE, jnp.float32)[0].experts, mask


@pytest.mark.slow
def test_batch_loss_and_z_loss_against_numpy():
    logits, experts, mask = _batch()
    wanted = naive.batch_aux_loss(logits, experts, mask, SETTINGS["published"])
    got = batch_load_balancing_loss(logits, experts, mask)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert abs(got - load_balancing_loss(logits, experts, mask)) > 1e-3
    # With earlier microbatches, f is a mean over all of them.
    earlier = _batch(seed=1)
    before = expert_tokens(*earlier[1:], MOE.num_experts).sum(axis=0)
    counts = np.zeros(MOE.num_experts)
    for chosen, real in ((earlier[1], earlier[2]), (experts, mask)):
        np.add.at(counts, np.asarray(chosen)[np.asarray(real)].reshape(-1), 1)
    shares = np.asarray(jax.nn.softmax(logits), np.float64)[np.asarray(mask)].mean(axis=0)
    wanted = MOE.num_experts * (counts / counts.sum() * shares).sum()
    running = batch_load_balancing_loss(logits, experts, mask, before=before)
    np.testing.assert_allclose(running, wanted, rtol=1e-5)
    assert abs(running - got) > 1e-3
    # One row: both losses are the same.
    np.testing.assert_allclose(
        batch_load_balancing_loss(logits[:1], experts[:1], mask[:1]),
        load_balancing_loss(logits[:1], experts[:1], mask[:1]),
        rtol=1e-6,
    )
    real = np.asarray(logits, np.float64)[np.asarray(mask)]
    squares = np.log(np.exp(real).sum(-1)) ** 2
    np.testing.assert_allclose(router_z_loss(logits, mask), squares.mean(), rtol=1e-5)
    for loss in (router_z_loss(logits, mask & False),):
        assert loss == 0


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 1, 1), MeshConfig(2, 2, 2, 1)])
def test_batch_balancing_is_the_same_on_any_sharding(mesh):
    """One device against eight: loss, gradient, counts and moved biases."""
    logits, experts, mask = _batch()
    bias = _biases(SETTINGS["published"], np.random.default_rng(1))

    @jax.jit
    def balance(logits, experts, mask):
        loss, grad = jax.value_and_grad(batch_load_balancing_loss)(logits, experts, mask)
        tokens = expert_tokens(experts, mask, MOE.num_experts).astype(jnp.int32).sum(axis=0)
        return loss, grad, tokens, updated_bias(bias, tokens, MOE, 0.5)

    placed = NamedSharding(sharding.make_mesh(mesh), PartitionSpec(sharding.RULES["batch"]))
    one = balance(logits, experts, mask)
    eight = balance(*jax.device_put((logits, experts, mask), placed))
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(eight[1], one[1], rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(eight[2], one[2])
    jax.tree.map(np.testing.assert_array_equal, eight[3], one[3])


@pytest.mark.slow
@every_setting
def test_biases_change_the_choice_but_not_the_weights(s):
    rng = np.random.default_rng(2)
    logits = jnp.asarray(rng.normal(0, 1, (50, s.N)), jnp.float32)
    second = None
    if s.separate_routers:
        second = jnp.asarray(rng.normal(0, 1, (50, s.G_O * s.R_O)), jnp.float32)
    bias = _biases(s, rng)
    routed = jax.jit(functools.partial(route, moe=_moe(s), weight_dtype=jnp.float32))
    routing, _ = routed(logits, candidate_logits=second, bias=bias)
    without, _ = routed(logits, candidate_logits=second)
    assert (np.asarray(routing.experts) != without.experts).any()
    np.testing.assert_array_equal(routing.logits, logits)
    for t in range(len(logits)):
        biases = (bias.experts, bias.groups)
        of_token = None if second is None else second[t]
        experts, weights, scale = naive.route(logits[t], s, of_token, biases)
        assert routing.experts[t].tolist() == experts
        scaled = weights * scale[np.asarray(experts) // (s.N // s.G_O)]
        np.testing.assert_allclose(routing.weights[t], scaled, rtol=1e-5)
    zero = jax.tree.map(jnp.zeros_like, bias)
    jax.tree.map(
        np.testing.assert_array_equal,
        routed(logits, candidate_logits=second, bias=zero),
        routed(logits, candidate_logits=second),
    )


@pytest.mark.slow
@every_setting
def test_biases_move_against_the_load_error(s):
    rng = np.random.default_rng(3)
    bias, rate = _biases(s, rng, 0.1), 0.01
    move = jax.jit(functools.partial(updated_bias, moe=_moe(s), rate=rate))
    wanted = bias.experts, bias.groups
    for _ in range(3):
        tokens = rng.integers(0, 5, s.N)
        bias = move(bias, jnp.asarray(tokens, jnp.int32))
        wanted = naive.moved_biases(*wanted, tokens, s, rate)
        np.testing.assert_allclose(bias.experts, wanted[0], atol=1e-6)
        if s.plain_top_k:
            assert bias.groups is None
        else:
            np.testing.assert_allclose(bias.groups, wanted[1], atol=1e-6)
            means = np.asarray(bias.experts).reshape(s.G_O * s.R_O, -1).mean(axis=1)
            np.testing.assert_allclose(means, 0, atol=1e-7)


@pytest.mark.slow
def test_an_even_load_moves_no_bias_and_large_counts_do_not_overflow():
    zero = SelectionBias(jnp.zeros(16), jnp.zeros(4))
    for count in (0, 1, 3, 10**8):
        moved = updated_bias(zero, jnp.full(16, count, jnp.int32), MOE, 1.0)
        assert not moved.experts.any() and not moved.groups.any()
    one_more = jnp.full(16, 10**8, jnp.int32).at[5].add(1)
    moved = updated_bias(zero, one_more, MOE, 1.0)
    assert np.argmin(moved.experts) == 5 and np.argmin(moved.groups) == 1
    # Other groups' experts and the other slot stay.
    assert not moved.experts[8:].any() and not moved.groups[2:].any()
    np.testing.assert_allclose(moved.groups[:2], [2.0, -2.0])  # sqrt(4 experts of a group)


@pytest.mark.slow
def test_the_bias_evens_out_a_skewed_router():
    """Experts that the logits never choose get tokens, and the load ends near the mean."""
    moe = dataclasses.replace(MOE, active_per_group=1)
    rng = np.random.default_rng(4)
    skew = rng.normal(0, 1, moe.num_experts)
    logits = jnp.asarray(skew + rng.normal(0, 0.5, (4096, moe.num_experts)), jnp.float32)

    @jax.jit
    def step(bias):
        routing, _ = route(logits, moe, jnp.float32, bias=bias)
        tokens = jnp.zeros(moe.num_experts, jnp.int32).at[routing.experts].add(1)
        return updated_bias(bias, tokens, moe, 0.02), tokens

    bias = SelectionBias(jnp.zeros(16), jnp.zeros(4))
    _, before = step(bias)
    for _ in range(400):
        bias, tokens = step(bias)
    assert np.max(before) / np.mean(before) > 2.5
    assert np.max(tokens) / np.mean(tokens) < 1.3


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["all", "some masked"])
def test_losses_of_a_pool_against_numpy(masked):
    """Of one layer over the allowed experts, and of two layers together."""
    rng = np.random.default_rng(0)
    moe = MoEConfig(4, 1, 1, 1, 2, experts_across=2)
    mask = np.arange(5)[None] < np.array([[5], [3], [0]])
    logits = rng.standard_normal((2, 3, 5, 8))
    allowed = np.ones((2, 8), bool)
    if masked:
        allowed[0, [1, 4]] = allowed[1, [0, 7]] = False
    layers, running, shares = [], [], {"sequence": [], "batch": []}
    for layer in range(2):
        open_to = jnp.asarray(allowed[layer]) if masked else None
        routing, _ = route(jnp.asarray(logits[layer]), moe, jnp.float32, allowed=open_to)
        before = rng.integers(0, 5, 8) * allowed[layer]
        layers.append((routing, open_to, jnp.float32(before)))
        experts, choices = np.asarray(routing.experts), allowed[layer].sum()
        assert allowed[layer][experts].all()
        odds = np.where(allowed[layer], np.exp(logits[layer]), 0)
        odds = odds / odds.sum(-1, keepdims=True)
        for kind, rows in (("sequence", [[0], [1]]), ("batch", [[0, 1]])):
            found = []
            for these in rows:
                real = mask[these]
                count = np.bincount(experts[these][real].ravel(), minlength=8)
                f = choices / (2 * real.sum()) * count
                found.append((f, odds[these][real].mean(0)))
            if kind == "batch":  # with the choices of earlier microbatches
                f = choices * (count + before) / (2 * real.sum() + before.sum())
                running.append((f, found[0][1]))
            shares[kind].append(found)
        for kind, loss in (("sequence", load_balancing_loss), ("batch", batch_load_balancing_loss)):
            wanted = np.mean([f @ p for f, p in shares[kind][-1]])
            got = loss(routing.logits, routing.experts, jnp.asarray(mask), open_to)
            np.testing.assert_allclose(got, wanted, rtol=1e-5)
        squares = np.log(np.where(allowed[layer], np.exp(logits[layer]), 0).sum(-1)) ** 2
        got = router_z_loss(routing.logits, jnp.asarray(mask), open_to)
        np.testing.assert_allclose(got, squares[mask].mean(), rtol=1e-5)
    for kind, (one, other) in shares.items():
        wanted = np.mean(
            [((f + g) / 2) @ ((p + q) / 2) for (f, p), (g, q) in zip(one, other, strict=True)]
        )
        alone = [(routing, open_to, None) for routing, open_to, _ in layers]
        got = pool_balancing_loss(alone, jnp.asarray(mask), kind)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    (f, p), (g, q) = running
    got = pool_balancing_loss(layers, jnp.asarray(mask), "batch")
    np.testing.assert_allclose(got, ((f + g) / 2) @ ((p + q) / 2), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pooled_as", ["copies", "candidates"])
def test_biases_of_a_pool_move_inside_its_groups(pooled_as):
    moe = MoEConfig(2, 2, 1, 2, 1, experts_across=2, pooled_as=pooled_as, selection_bias=True)
    pool = jnp.arange(moe.pool_size)
    grouped = in_groups(pool, moe)
    np.testing.assert_array_equal(out_of_groups(grouped, moe), pool)
    # p = 2 e + j; e runs over 2 slots, 2 candidates, 2 slices.
    slot, candidate, _, layer = np.unravel_index(np.asarray(grouped), (2, 2, 2, 2))
    assert (slot == np.arange(2).reshape(2, 1, 1)).all()
    one_layer = (layer == layer[..., :1]).all()
    assert one_layer == (pooled_as == "candidates") and (candidate == candidate[..., :1]).all()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 9, 16))
    zeros = SelectionBias(jnp.zeros(16), jnp.zeros(moe.output_granularity * moe.pool_candidates))
    moved = updated_bias(zeros, tokens, moe, 0.5)
    for place in np.ndindex(grouped.shape[:2]):
        load = np.asarray(tokens)[np.asarray(grouped)[place]]
        steps = 0.5 * np.sign(load.mean() - load)
        got = np.asarray(moved.experts)[np.asarray(grouped)[place]]
        np.testing.assert_allclose(got, steps - steps.mean(), atol=1e-6)
    loads = np.asarray(tokens)[np.asarray(grouped)].sum(-1)
    steps = np.sign(loads.mean(1, keepdims=True) - loads) * 0.5 * np.sqrt(moe.pool_group_size)
    got = np.asarray(moved.groups).reshape(loads.shape)
    np.testing.assert_allclose(got, steps - steps.mean(1, keepdims=True), atol=1e-6)
