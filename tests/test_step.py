"""What one optimizer step adds up, in which dtype, and with which draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from finermoe_jax.losses import cross_entropy_sum
from finermoe_jax.model import Decoder
from finermoe_jax.packing import Batch
from finermoe_jax.step import batch_loss, train_step
from tests.test_config import SMALL
from tests.test_training import _batch, _distances, _model, _run


def _taking(updates):
    """An optimizer that keeps the gradient, and updates every parameter by `updates`."""

    def update(grads, state, params):
        counted = optax.ScaleByScheduleState(state[0].count + 1)
        return jax.tree.map(lambda p: jnp.full_like(p, updates), params), (counted, grads)

    start = optax.ScaleByScheduleState(jnp.int32(0))
    return optax.GradientTransformation(lambda params: (start, params), update)


def _dense():
    """One dense layer in bfloat16: what a test of sums and draws needs; it compiles fast."""
    graphdef, state = nnx.split(_model(dataclasses.replace(SMALL, num_hidden_layers=1)))
    return graphdef, jax.tree.map(lambda p: p.astype(jnp.bfloat16), nnx.to_pure_dict(state))


def test_every_layers_balancing_loss_counts():
    graphdef, state = nnx.split(_model())
    config = _run(4, aux_loss_weight=0.5)
    total, told = jax.jit(lambda p, b: batch_loss(graphdef, config, p, b))(
        nnx.to_pure_dict(state), Batch(_batch(4))
    )
    layers = np.asarray(told["layer_aux_loss"])
    assert len(layers) == 2 and layers.min() > 0.5
    np.testing.assert_allclose(total, told["loss"] + 0.5 * layers.sum(), rtol=1e-6)


def test_bfloat16_gradients_of_many_microbatches_are_summed_in_float32():
    """The same row in every microbatch: the mean gradient is that of one, however many."""
    graphdef, params = _dense()
    tx = _taking(0.0)

    def gradient(parts):
        config = _run(parts, grad_accumulation=parts)
        batch = Batch(jnp.repeat(_batch(1), parts, axis=0))
        step = jax.jit(lambda p, o, b: train_step(graphdef, config, tx, p, o, b))
        _, (_, grads), _ = step(params, tx.init(params), batch)
        return jax.tree.map(lambda g: np.asarray(g, np.float32), grads)

    # A sum of 64 in bfloat16, which has 8 binary digits, is wrong by more than 1e-3.
    distances = _distances(gradient(64), gradient(2))
    assert max(distances.values()) < 1e-3, distances


def test_every_update_of_bfloat16_weights_is_rounded_by_a_draw_of_its_own():
    graphdef, params = _dense()
    params = jax.tree.map(jnp.ones_like, params)
    tx = _taking(2.0**-9)  # a quarter of the distance to the neighbour above

    @functools.partial(jax.jit, static_argnames="seed")
    def step(count, seed):
        opt_state = optax.ScaleByScheduleState(count), params
        config = _run(2, seed=seed)
        return train_step(graphdef, config, tx, params, opt_state, Batch(_batch(2)))[0]

    def moved(count, seed):
        """Which entries of the embedding an update moves that `count` others went before."""
        return np.asarray(step(jnp.int32(count), seed=seed)["embed"]["weight"]) > 1

    first = moved(0, 0)
    assert 0.2 < first.mean() < 0.3
    np.testing.assert_array_equal(moved(0, 0), first)
    for other in (moved(1, 0), moved(0, 1)):
        assert 0.3 < (other != first).mean() < 0.45  # 2 / 4 * 3 / 4 of independent draws


def test_the_loss_of_bfloat16_activations_is_summed_in_float32():
    """Logits, loss and the gradient of lm_head against float64, from the same rounded numbers."""
    config = dataclasses.replace(SMALL, num_hidden_layers=1)
    model = Decoder(config, dtype="bfloat16", param_dtype="bfloat16", rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((64, 32)), jnp.bfloat16)
    # Positive: their sum over all tokens grows far beyond each.
    hidden = jnp.asarray(rng.uniform(0.5, 1.0, (4, 256, 32)), jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, 2, (4, 256)), jnp.int32)
    graphdef, state = nnx.split(model)

    def loss(weight):
        params = nnx.to_pure_dict(state)
        params["lm_head"]["weight"] = weight
        decoder = nnx.merge(graphdef, nnx.State(params))
        return cross_entropy_sum(decoder, hidden, targets, jnp.ones(targets.shape, bool), 4)

    got, gradient = jax.jit(jax.value_and_grad(loss))(weight)
    h, w = (np.asarray(x, np.float64) for x in (hidden.reshape(-1, 32), weight))
    logits = h @ w.T
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.eye(64)[np.asarray(targets).ravel()]
    np.testing.assert_allclose(got, -(log_p * chosen).sum(), rtol=1e-5)
    wanted = (np.exp(log_p) - chosen).T @ h
    # Each entry is rounded once at the end, to 8 binary digits, and each product's factor before.
    error = np.abs(np.asarray(gradient, np.float64) - wanted)[:2] / np.abs(wanted[:2])
    assert error.max() < 2**-8
