"""Routing against the published code's decisions, and the ways it can be asked wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.errors import InputError
from finermoe_jax.moe.routing import route
from tests.support import GOLDEN


def _cases():
    return json.loads((GOLDEN / "router_unit" / "golden.json").read_text())


def _moe(case, **variants):
    return MoEConfig(case["G_I"], case["G_O"], case["R_I"], case["R_O"], case["T_I"], **variants)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(10))
def test_published_model(index):
    case = _cases()[index]
    data = load_file(GOLDEN / "router_unit" / "golden.safetensors")
    routing, slot_order = route(jnp.asarray(data[f"{index}.logits"]), _moe(case), jnp.float32)
    np.testing.assert_array_equal(
        np.sort(routing.experts, -1), np.sort(data[f"{index}.selected_experts"], -1)
    )
    order = np.argsort(data[f"{index}.selected_experts"], -1)
    ours = np.argsort(np.asarray(routing.experts), -1)
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(routing.weights), ours, -1),
        np.take_along_axis(data[f"{index}.weights"], order, -1),
        rtol=1e-4,
    )
    logits = np.take_along_axis(data[f"{index}.logits"], np.asarray(routing.experts), -1)
    assert (np.diff(logits) <= 0).all(), "experts are reported by falling logit"
    in_slots = np.take_along_axis(np.asarray(routing.experts), np.asarray(slot_order), -1)
    per_slot = case["num_experts"] // case["G_O"]
    slots = np.repeat(np.arange(case["G_O"]), case["T_I"])
    np.testing.assert_array_equal(in_slots // per_slot, np.broadcast_to(slots, in_slots.shape))


@pytest.mark.parametrize("index", [6, 7, 8])
def test_published_training_code(index):
    case = _cases()[index]
    data = load_file(GOLDEN / "router_unit" / "golden.safetensors")
    moe = _moe(case, plain_top_k=True, pre_softmax=case["megatron_pre_softmax"])
    routing, _ = route(jnp.asarray(data[f"{index}.logits"]), moe, jnp.float32)
    dense = np.zeros_like(data[f"{index}.logits"])
    np.put_along_axis(dense, np.asarray(routing.experts), np.asarray(routing.weights), -1)
    wanted = data[f"{index}.megatron_dense_weights"]
    np.testing.assert_array_equal(dense != 0, wanted != 0)
    np.testing.assert_allclose(dense, wanted, rtol=1e-4)


def test_ties_take_the_lowest_index():
    moe = MoEConfig(4, 2, 1, 2, 2)
    routing, _ = route(jnp.zeros((1, 16)), moe, jnp.float32)
    np.testing.assert_array_equal(np.sort(routing.experts[0]), [0, 1, 8, 9])
    np.testing.assert_array_equal(routing.experts[0], [0, 1, 8, 9])


def test_weights_are_rounded_once():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, (500, 16)), jnp.float32)
    moe = MoEConfig(4, 2, 1, 2, 1)
    exact, rounded = (route(logits, moe, dtype)[0].weights for dtype in (jnp.float32, jnp.bfloat16))
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


def test_candidates_are_chosen_by_the_sum_of_all_raw_logits():
    # The second candidate holds the largest logit; the first has the larger sum.
    logits = jnp.asarray([[1.0, 1.0, 1.5, -3.0]])
    routing, _ = route(logits, MoEConfig(2, 1, 1, 2, 1), jnp.float32)
    assert routing.experts.tolist() == [[0]]


def test_one_active_expert_has_weight_one_and_no_gradient():
    moe = MoEConfig(8, 1, 1, 1, 1)

    def weight(logits):
        return route(logits, moe, jnp.float32)[0].weights.sum()

    logits = jnp.arange(8.0)[None]
    assert weight(logits) == 1
    np.testing.assert_array_equal(jax.grad(weight)(logits), 0)


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        (dict(output_expansion=0), ["output_expansion=0", "at least 1"]),
        (dict(intermediate_expansion=0), ["intermediate_expansion=0"]),
        (dict(active_per_group=33), ["active_per_group=33", "32"]),
        (dict(plain_top_k=True), ["output_granularity=1", "2"]),
        (dict(pre_softmax=True, norm_topk_prob=True), ["pre_softmax", "norm_topk_prob"]),
        (dict(shared_expert_intermediate_size=-1), ["-1"]),
        (dict(decoder_sparse_step=0), ["decoder_sparse_step=0"]),
    ],
)
def test_bad_settings(settings, values):
    with pytest.raises(InputError) as error:
        MoEConfig(**settings)
    assert all(value in str(error.value) for value in values), error.value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbers", "plain"),
    [
        ((4, 2, 1, 2, 1), False),
        ((4, 2, 2, 2, 3), False),
        ((1, 1, 8, 1, 2), False),
        ((2, 4, 1, 1, 2), False),
        ((4, 1, 1, 2, 6), True),
    ],
)
def test_even_routing_loads_all_experts_alike(numbers, plain):
    moe = MoEConfig(*numbers, plain_top_k=plain)
    tokens = 3, moe.output_expansion * moe.group_size * 2
    logits = jax.random.normal(jax.random.key(0), (*tokens, moe.num_experts))
    routing, slot_order = route(logits, moe, jnp.float32, even=True)
    loads = np.bincount(np.asarray(routing.experts).ravel(), minlength=moe.num_experts)
    assert len(set(loads)) == 1
    # As in any routing: by falling logit, T_I different experts in each slot. Of one group, unless
    # the top-k is plain.
    chosen = np.take_along_axis(np.asarray(logits), np.asarray(routing.experts), -1)
    assert (np.diff(chosen) <= 0).all()
    np.testing.assert_allclose(routing.weights, jax.nn.softmax(chosen, -1), rtol=1e-5)
    in_slots = np.take_along_axis(np.asarray(routing.experts), np.asarray(slot_order), -1)
    by_slot = in_slots.reshape(-1, moe.output_granularity, moe.active_per_group)
    per_slot = moe.num_experts // moe.output_granularity
    assert (by_slot // per_slot == np.arange(moe.output_granularity)[:, None]).all()
    if not plain:
        assert (by_slot // moe.group_size == by_slot[..., :1] // moe.group_size).all()
    assert all(
        len(set(slot)) == moe.active_per_group for slot in by_slot.reshape(-1, by_slot.shape[-1])
    )
