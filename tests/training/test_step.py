"""The sums of one optimizer step, their dtype and the draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.data.packing import Batch
from finermoe_jax.layers.parameters import kinds, trained_kinds
from finermoe_jax.model.decoder import parameter_shapes, with_shapes
from finermoe_jax.model.losses import cross_entropy_sum
from finermoe_jax.training.optimizer import optimizer
from finermoe_jax.training.step import batch_loss, rebuild, train_step
from tests.oracles import naive
from tests.support import SMALL
from tests.support.training import MOE, mixture_model, random_tokens, relative_distances, small_run

ONE_LAYER = dataclasses.replace(MOE, num_hidden_layers=1)


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


@pytest.mark.slow
def test_every_layers_balancing_loss_counts():
    graphdef, state = nnx.split(mixture_model())
    config = small_run(4, balance=dict(weight=0.5))
    total, told = jax.jit(lambda p, b: batch_loss(graphdef, config, p, b))(
        nnx.to_pure_dict(state), Batch(random_tokens(4))
    )
    layers = np.asarray(told["layer_aux_loss"])
    assert len(layers) == 2 and layers.min() > 0.5
    np.testing.assert_allclose(total, told["loss"] + 0.5 * layers.sum(), rtol=1e-6)


@pytest.mark.slow
def test_only_the_kinds_with_a_loss_add_it():
    graphdef, state = nnx.split(mixture_model(ONE_LAYER))

    @jax.jit
    def losses(params):
        balance = dict(weight=0.5, z_loss=0.25)
        runs = [small_run(2, balance=dict(kind=kind, **balance)) for kind in ("none", "bias")]
        return [batch_loss(graphdef, run, params, Batch(random_tokens(2))) for run in runs]

    for total, told in losses(nnx.to_pure_dict(state)):
        assert told["layer_aux_loss"].min() > 0.5  # logged all the same
        np.testing.assert_allclose(total, told["loss"] + 0.25 * told["z_loss"].sum(), rtol=1e-6)


@pytest.mark.nightly
def test_batch_balancing_counts_the_earlier_microbatches():
    """Losses are means over the microbatches, f of Eq. 11 is a running mean over their counts."""
    graphdef, state = nnx.split(mixture_model())
    balance = dict(kind="batch", weight=0.5, z_loss=0.01)
    config = small_run(6, balance=balance, grad_accumulation=3)
    tokens, tx = random_tokens(6), _taking(0.0)

    @jax.jit
    def chosen(params):
        model = rebuild(graphdef, params)
        return model.features(tokens[:, :-1]).routing

    routing = jax.device_get(chosen(nnx.to_pure_dict(state)))
    counts = np.zeros((2, MOE.moe.num_experts))
    before, losses = [], []  # [3, 2, E], [3, 2]
    for part in range(3):
        layers = [jax.tree.map(lambda rows, part=part: rows[part::3], each) for each in routing]
        before.append(np.float32(counts))
        for count, each in zip(counts, layers, strict=True):
            np.add.at(count, each.experts.reshape(-1), 1)
        shares = [np.exp(each.logits) for each in layers]
        shares = [(e / e.sum(-1, keepdims=True)).mean(axis=(0, 1)) for e in shares]
        fractions = counts.shape[1] * counts / counts.sum(axis=1, keepdims=True)
        losses.append((fractions * shares).sum(axis=1))

    @jax.jit
    def both(params, before):
        step = train_step(graphdef, config, tx, params, tx.init(params), Batch(tokens))

        def alone(part):
            part, counts = part
            loss = jax.value_and_grad(batch_loss, argnums=2, has_aux=True)
            return loss(graphdef, config, params, Batch(part), tokens_before=counts)

        parts = jax.lax.map(alone, (jnp.stack([tokens[part::3] for part in range(3)]), before))
        return step[1][1], step[2], parts

    grads, metrics, ((_, of_parts), parts) = both(nnx.to_pure_dict(state), np.stack(before))
    np.testing.assert_allclose(metrics["layer_aux_loss"], np.mean(losses, axis=0), rtol=1e-5)
    mean = jax.tree.map(lambda each: each.mean(axis=0), parts)
    assert max(relative_distances(grads, mean).values()) < 1e-5
    for name, total in (("layer_aux_loss", "aux_loss"), ("z_loss", "z_loss")):
        found = np.asarray(of_parts[name])
        np.testing.assert_allclose(metrics[total], np.mean(found, axis=0).sum(), rtol=1e-6)
        assert np.abs(found[0] - found[1]).max() > 1e-3
    np.testing.assert_array_equal(metrics["expert_tokens"], counts)
    np.testing.assert_array_equal(counts, of_parts["expert_tokens"].sum(axis=0))


@pytest.mark.nightly
def test_selection_biases_move_after_the_step_and_outside_of_the_optimizer():
    """In layers of several runs; a step that is not finite moves none."""
    moe = MoEConfig(4, 2, 1, 2, 1, mlp_only_layers=(2,), selection_bias=True)
    model = mixture_model(dataclasses.replace(SMALL, moe=moe))
    graphdef, state = nnx.split(model)
    config = small_run(4, balance=dict(kind="bias", bias_rate=0.1), grad_accumulation=2)
    tx = optimizer(config.optimizer, 10, trained_kinds(model))
    flat = nnx.traversals.flatten_mapping
    state_paths = {path for path, kind in kinds(model).items() if kind.state}
    assert len(state_paths) == 4  # experts and groups of two runs: layers 0 and 1, and layer 3

    params = flat(nnx.to_pure_dict(state))
    rng = np.random.default_rng(0)
    for path in state_paths:
        params[path] = jnp.asarray(0.3 * rng.standard_normal(params[path].shape), jnp.float32)
    params = nnx.traversals.unflatten_mapping(params)
    opt_state = tx.init(params)
    moments = flat(optax.tree.get(opt_state, "mu"))
    assert moments.keys() == flat(params).keys() - state_paths

    step = jax.jit(lambda p, o, b: train_step(graphdef, config, tx, p, o, b))
    batch = Batch(random_tokens(4))
    after, _, metrics = step(params, opt_state, batch)
    before, after = flat(params), flat(after)
    s = naive.Settings(hidden_size=32, intermediate_size=64, G_I=4, G_O=2, R_I=1, R_O=2, T_I=1)
    places = [(0, 0), (0, 1), (2, 0)]  # run and repeat of each MoE layer
    for layer, (run, repeat) in enumerate(places):
        paths = [("runs", run, 0, "moe", f"{name}_bias") for name in ("expert", "group")]
        wanted = naive.moved_biases(
            *(before[path][repeat] for path in paths), metrics["expert_tokens"][layer], s, 0.1
        )
        for path, biases in zip(paths, wanted, strict=True):
            assert after[path].dtype == jnp.float32
            np.testing.assert_allclose(after[path][repeat], biases, atol=1e-6)

    spoilt = jax.tree.map(lambda leaf: leaf, params)
    spoilt["final_norm"]["scale"] = spoilt["final_norm"]["scale"] * jnp.nan
    after, _, metrics = step(spoilt, opt_state, batch)
    assert metrics["skipped"] == 1
    for path in state_paths:
        np.testing.assert_array_equal(flat(after)[path], before[path])


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.nightly
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
    step = jax.jit(functools.partial(train_step, graphdef, config, tx))

    def steps(params, opt_state, count):
        tokens = []
        for _ in range(count):
            params, opt_state, metrics = step(params, opt_state, batch)
            tokens.append(np.asarray(metrics["expert_tokens"]).reshape(2, -1, 2))
        return params, opt_state, tokens

    whole = steps(params, tx.init(params), 6)
    half = steps(params, tx.init(params), 3)
    resumed = steps(*jax.tree.map(jnp.asarray, jax.device_get(half[:2])), 3)
    for a, b in zip(jax.tree.leaves(whole[:2]), jax.tree.leaves(resumed[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(whole[2], half[2] + resumed[2])
    foreign = [np.mean([t[0, :, 1].sum(), t[1, :, 0].sum()]) for t in whole[2]]
    assert foreign[0] == foreign[1] == 0 < foreign[3] < foreign[5]
    assert step._cache_size() == 1
