"""The sums of one optimizer step, their dtype and the draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from finermoe_jax.data.packing import Batch
from finermoe_jax.layers.parameters import kinds
from finermoe_jax.model.decoder import parameter_shapes, with_shapes
from finermoe_jax.model.losses import cross_entropy_sum
from finermoe_jax.training.optimizer import optimizer
from finermoe_jax.training.step import batch_loss, rebuild, train_step
from tests.support import SMALL
from tests.support.training import (
    MOE,
    mixture_model,
    random_tokens,
    relative_distances,
    small_run,
)


def _taking(updates):
    """An optimizer that keeps the gradient, and updates every parameter by `updates`."""

    def update(grads, state, params):
        counted = optax.ScaleByScheduleState(state[0].count + 1)
        return jax.tree.map(lambda p: jnp.full_like(p, updates), params), (counted, grads)

    start = optax.ScaleByScheduleState(jnp.int32(0))
    return optax.GradientTransformation(lambda params: (start, params), update)


def _dense(value=None):
    """One dense layer in bfloat16, of `value` or random: it compiles fast."""
    config, rng = dataclasses.replace(SMALL, num_hidden_layers=1), np.random.default_rng(0)
    params = {
        path: (np.full(shape, value) if value else 0.3 * rng.standard_normal(shape)).astype(
            jnp.bfloat16
        )
        for path, shape in parameter_shapes(config).items()
    }
    return nnx.split(with_shapes(config))[0], nnx.traversals.unflatten_mapping(params)


def test_every_layers_balancing_loss_counts():
    graphdef, state = nnx.split(mixture_model())
    config = small_run(4, aux_loss_weight=0.5)
    total, told = jax.jit(lambda p, b: batch_loss(graphdef, config, p, b))(
        nnx.to_pure_dict(state), Batch(random_tokens(4))
    )
    layers = np.asarray(told["layer_aux_loss"])
    assert len(layers) == 2 and layers.min() > 0.5
    np.testing.assert_allclose(total, told["loss"] + 0.5 * layers.sum(), rtol=1e-6)


def test_bfloat16_gradients_of_many_microbatches_are_summed_in_float32():
    """The same row in every microbatch: the mean gradient is that of one, however many."""
    graphdef, params = _dense()
    row, parts, tx = np.asarray(random_tokens(1)), 64, _taking(0.0)
    config = small_run(parts, grad_accumulation=parts)

    @jax.jit
    def gradients(params):
        batch = Batch(jnp.asarray(np.repeat(row, parts, axis=0)))
        _, (_, grads), _ = train_step(graphdef, config, tx, params, tx.init(params), batch)
        alone, _ = jax.grad(batch_loss, argnums=2, has_aux=True)(
            graphdef, config, params, Batch(jnp.asarray(row))
        )
        return grads, alone

    grads, alone = jax.tree.map(lambda g: np.asarray(g, np.float32), gradients(params))
    # A sum of 64 in bfloat16, which has 8 binary digits, is wrong by more than 1e-3.
    distances = relative_distances(grads, alone)
    assert max(distances.values()) < 1e-3, distances


def test_every_update_of_bfloat16_weights_is_rounded_by_a_draw_of_its_own():
    graphdef, params = _dense(1.0)
    tx = _taking(2.0**-9)  # a quarter of the distance to the neighbour above
    config, batch = small_run(2), Batch(random_tokens(2))

    @jax.jit
    def step(params, count):
        opt_state = optax.ScaleByScheduleState(count), params
        return train_step(graphdef, config, tx, params, opt_state, batch)[0]

    def moved(count):
        """Which entries of the embedding an update moves that `count` others went before."""
        return np.asarray(step(params, np.int32(count))["embed"]["weight"], np.float32) > 1

    first, again, next_one = moved(0), moved(0), moved(1)
    assert 0.2 < first.mean() < 0.3
    np.testing.assert_array_equal(again, first)
    assert 0.3 < (next_one != first).mean() < 0.45  # 2 / 4 * 3 / 4 of independent draws


def test_the_loss_of_bfloat16_activations_is_summed_in_float32():
    """Logits, loss and the gradient of lm_head against float64, from the same rounded numbers."""
    graphdef, params = _dense()
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 32)).astype(jnp.bfloat16)
    # Positive: their sum over all tokens grows far beyond each.
    hidden = jnp.asarray(rng.uniform(0.5, 1.0, (4, 256, 32)).astype(jnp.bfloat16))
    targets = jnp.asarray(rng.integers(0, 2, (4, 256)).astype(np.int32))

    def loss(weight):
        changed = params | {"lm_head": {"weight": weight}}
        mask = jnp.ones(targets.shape, bool)
        return cross_entropy_sum(rebuild(graphdef, changed), hidden, targets, mask, 4)

    got, gradient = jax.jit(jax.value_and_grad(loss))(weight)
    h, w = np.asarray(hidden, np.float64).reshape(-1, 32), weight.astype(np.float64)
    logits = h @ w.T
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.eye(64)[np.asarray(targets).ravel()]
    np.testing.assert_allclose(got, -(log_p * chosen).sum(), rtol=1e-5)
    wanted = (np.exp(log_p) - chosen).T @ h
    # Each entry is rounded once at the end, to 8 binary digits, and each product's factor before.
    error = np.abs(np.asarray(gradient, np.float64) - wanted)[:2] / np.abs(wanted[:2])
    assert error.max() < 2**-8


def test_masked_experts_return_and_a_resumed_run_masks_the_same():
    """psr in the middle of its schedule; one program serves all of its steps."""
    moe = dataclasses.replace(MOE.moe, experts_across=2)
    model = mixture_model(dataclasses.replace(MOE, moe=moe))
    config = dataclasses.replace(small_run(8), moe=moe)
    settings = dict(psr="linear", psr_start=0.1, psr_end=0.5, psr_mask="foreign")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    tx = optimizer(config.optimizer, config.train.steps, kinds(model))
    batch = Batch(random_tokens(8))
    compiled = []

    def steps(params, opt_state, count):
        step = jax.jit(functools.partial(train_step, graphdef, config, tx))
        tokens = []
        for _ in range(count):
            params, opt_state, metrics = step(params, opt_state, batch)
            tokens.append(np.asarray(metrics["expert_tokens"]).reshape(2, -1, 2))
        compiled.append(step._cache_size())
        return params, opt_state, tokens

    whole = steps(params, tx.init(params), 6)
    half = steps(params, tx.init(params), 3)
    resumed = steps(*jax.tree.map(jnp.asarray, jax.device_get(half[:2])), 3)
    for a, b in zip(jax.tree.leaves(whole[:2]), jax.tree.leaves(resumed[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(whole[2], half[2] + resumed[2])
    foreign = [np.mean([t[0, :, 1].sum(), t[1, :, 0].sum()]) for t in whole[2]]
    assert foreign[0] == foreign[1] == 0 < foreign[3] < foreign[5]
    assert compiled == [1, 1, 1]
