"""Small models, runs and steps that tests of training share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.parse import run_config
from finermoe_jax.config.run import BalanceConfig, MeshConfig, RunConfig
from finermoe_jax.data.packing import Batch
from finermoe_jax.layers import sharding
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.training.optimizer import learning_rate, run_optimizer
from finermoe_jax.training.step import init_optimizer, jit_step, rebuild
from tests.support import SMALL, load_preset

# Qwen2's biases and Qwen3's norms together: every parameter that a layer can have.
MOE = dataclasses.replace(
    SMALL, moe=MoEConfig(4, 2, 1, 2, 1), num_hidden_layers=2, qk_norm=True, head_dim=12
)


def mixture_model(config=MOE):
    # Large weights, so that routing decisions are far from ties and gradients from zero.
    config = dataclasses.replace(config, initializer_range=0.3)
    return Decoder(config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(1))


def random_tokens(rows, length=17):
    return jnp.asarray(np.random.default_rng(0).integers(0, 64, (rows, length)), jnp.int32)


def small_run(rows, balance=None, **train_settings):
    values = dict(dense=dataclasses.asdict(SMALL), moe=None)
    config = run_config(values)
    settings = dict(steps=10, compute_dtype="float32", remat="none", loss_chunk_tokens=16)
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, **(settings | train_settings)),
        balance=BalanceConfig(**(balance or {})),
        data=dataclasses.replace(config.data, global_batch_size=rows, sequence_length=16),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-2, warmup_fraction=0.0),
    )


@functools.partial(jax.jit, static_argnums=0)
def _routing(graphdef, params, batch):
    return rebuild(graphdef, params).features(batch.tokens[:, :-1]).routing


def take_steps(config: RunConfig, mesh_config, count=3, model_config=MOE):
    """Losses [count, 3], the first step's gradients, the last parameters, the first routing.

    What each step says of its experts and of its rate is checked on the way.
    """
    model = mixture_model(model_config)
    size = np.prod([v for v in dataclasses.astuple(mesh_config)])
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:size])
    model.placement = Placement(mesh)
    shardings, _ = sharding.param_shardings(model, mesh)
    graphdef, state = nnx.split(model)
    # From the host: arrays of one device would be cut by programs, each of which is compiled.
    params = jax.device_put(jax.device_get(nnx.to_pure_dict(state)), shardings)
    rows = sharding.batch_sharding(mesh)
    batch = jax.device_put(Batch(random_tokens(config.data.global_batch_size)), rows)
    chosen = [np.asarray(routing.experts) for routing in _routing(graphdef, params, batch)]
    tx = run_optimizer(config, model)
    opt_state = init_optimizer(tx, params, shardings, mesh)
    step, places = jit_step(graphdef, config, tx, params, opt_state, shardings, mesh)
    params, opt_state = jax.device_put((params, opt_state), places)
    losses, grads = [], None
    for _ in range(count):
        params, opt_state, metrics = step(params, opt_state, batch)
        if not losses:
            tokens = [np.bincount(experts.ravel(), minlength=16) for experts in chosen]
            np.testing.assert_array_equal(metrics["expert_tokens"], tokens)
        rate = learning_rate(config.optimizer, config.train.steps)(len(losses))
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-5)
        np.testing.assert_allclose(metrics["layer_aux_loss"].sum(), metrics["aux_loss"], rtol=1e-6)
        losses.append([float(metrics[k]) for k in ("loss", "aux_loss", "grad_norm")])
        # Adam's first mean is a multiple of the gradient; Adafactor keeps none.
        if grads is None and config.optimizer.name == "adamw":
            grads = jax.device_get(optax.tree.get(opt_state, "mu"))
    return np.asarray(losses), grads, jax.device_get(params), chosen


def relative_distances(tree, reference):
    """Of each leaf, relative to its own norm."""
    return {
        jax.tree_util.keystr(path): np.linalg.norm(a - b) / np.linalg.norm(b)
        for (path, b), a in zip(
            jax.tree_util.tree_leaves_with_path(reference), jax.tree.leaves(tree), strict=True
        )
    }


def assert_same_steps(result, reference):
    losses, grads, params, chosen = result
    for a, b in zip(chosen, reference[3], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(losses[0], reference[0][0], rtol=1e-5)
    if grads is not None:
        distances = relative_distances(grads, reference[1])
        assert max(distances.values()) < 1e-5, distances
    np.testing.assert_allclose(losses, reference[0][: len(losses)], rtol=1e-4)
    if len(losses) == len(reference[0]):
        # Adam divides a gradient by its own size: noise in tiny ones is amplified.
        distances = relative_distances(params, reference[2])
        assert max(distances.values()) < 1e-3, distances


def demo_run(steps, **settings):
    """With pools, whose masks change in the middle of a run of four steps."""
    config = load_preset("demo", "rex2")
    settings = dict(psr="linear", psr_start=0.25, psr_end=0.75) | settings
    return dataclasses.replace(
        config,
        prompts=("Return the",),
        prompt_tokens=4,
        mesh=MeshConfig(1, 8, 1, 1),  # eight whole models would be most of a worker's memory
        data=dataclasses.replace(
            config.data, sequence_length=32, global_batch_size=8, eval_windows=4
        ),
        train=dataclasses.replace(
            config.train, steps=steps, eval_every=100, checkpoint_every=2, **settings
        ),
    )


TINY = {
    "dense": dataclasses.asdict(SMALL)
    | {"vocab_size": 2048, "num_hidden_layers": 1, "initializer_range": 0.1},
    "data": {
        "tokenizer": "demo/model", "path": "demo/LICENSE.pydoc.txt", "sequence_length": 16,
        "global_batch_size": 8, "eval_windows": 4,
    },
    "optimizer": {"learning_rate": 1e-2, "warmup_fraction": 0.0},
    "train": {"steps": 4, "compute_dtype": "float32", "remat": "none", "checkpoint_every": 2},
}  # fmt: skip


def tiny_run(values=TINY, **settings):
    return run_config(values | {"train": values["train"] | settings})


def silent(message):
    pass
