"""Optimizers from Optax (AdamW, Adafactor, Muon) and their learning-rate schedules."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from finermoe_jax.config.run import OptimizerConfig, RunConfig
from finermoe_jax.errors import InputError
from finermoe_jax.layers.parameters import Kind, Path, trained_kinds
from finermoe_jax.layers.parameters import kinds as all_kinds

# Kind of every trained parameter (parameters.trained_kinds).
type Kinds = Mapping[Path, Kind]


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of previous updates (Table 5).

    Linear from 0 during warm-up, then a cosine decay that reaches the final rate after `steps`.
    "wsd" (arXiv 2404.06395) keeps the rate until the last decay_fraction of the steps, and then
    decays it linearly.
    """
    warmup = max(1, round(config.warmup_fraction * steps)) if config.warmup_fraction else 0
    if config.schedule == "wsd":
        return _warmup_stable_decay(config, steps, warmup)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.final_learning_rate,
    )


def _warmup_stable_decay(config: OptimizerConfig, steps: int, warmup: int) -> optax.Schedule:
    rate, final = config.learning_rate, config.final_learning_rate
    decay = min(round(config.decay_fraction * steps), max(steps - warmup, 0))
    phases = [
        (warmup, optax.linear_schedule(0.0, rate, max(warmup, 1))),
        (steps - decay, optax.constant_schedule(rate)),
        (steps, optax.linear_schedule(rate, final, max(decay, 1))),
    ]
    if not warmup:
        phases = phases[1:]
    ends, schedules = zip(*phases, strict=True)
    return optax.join_schedules(schedules, ends[:-1])


def decayed(params: Any, kinds: Kinds) -> Any:
    """Returns True for every parameter with weight decay: all but norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _kind_at(path, kinds).decayed, params)


def _kind_at(path: tuple, kinds: Kinds) -> Kind:
    return kinds[tuple(key.key for key in path)]


def trained(params: dict, kinds: Kinds) -> dict:
    """Returns the trained parameters of a nested dict: those with a kind in `kinds`."""
    flat = nnx.traversals.flatten_mapping(params)
    return nnx.traversals.unflatten_mapping(
        {path: leaf for path, leaf in flat.items() if path in kinds}
    )


def completed(params: dict, part: dict) -> dict:
    """Returns params with the leaves of `part`, a nested dict of some of them, replaced."""
    flatten = nnx.traversals.flatten_mapping
    return nnx.traversals.unflatten_mapping(flatten(params) | flatten(part))


def run_optimizer(config: RunConfig, model: nnx.Module) -> optax.GradientTransformation:
    """Returns the optimizer of a run, for the parameters that train.freeze does not name.

    Raises InputError if nothing is left to train, or to Muon.
    """
    freeze = config.train.freeze
    left = trained_kinds(model, freeze)
    if config.optimizer.name == "muon" and not any(kind.outputs for kind in left.values()):
        frozen = {kind.part for kind in all_kinds(model).values() if kind.outputs}
        raise InputError(
            f"optimizer.name=muon, but train.freeze={','.join(freeze)} leaves no matrix to Muon: "
            f"remove {' or '.join(part for part in freeze if part in frozen)} from train.freeze, "
            "or set optimizer.name to adamw"
        )
    return optimizer(config.optimizer, config.train.steps, left)


def optimizer(config: OptimizerConfig, steps: int, kinds: Kinds) -> optax.GradientTransformation:
    """Clips by global norm, then applies AdamW (Table 5), Adafactor or Muon.

    Weight decay is multiplied by the learning rate. Gradients and state cover the parameters in
    `kinds` only.
    """
    mask = functools.partial(decayed, kinds=kinds)
    second = optax.chain(
        *_scalings(config, kinds),
        optax.add_decayed_weights(config.weight_decay, mask=mask),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )
    tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), second)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(grads, state, trained(params, kinds))

    return optax.GradientTransformation(lambda params: tx.init(trained(params, kinds)), update)


def _scalings(config: OptimizerConfig, kinds: Kinds) -> list[optax.GradientTransformation]:
    """Returns what the optimizer does to gradients before weight decay and the learning rate.

    Adafactor (Shazeer and Stern, 2018): unlike optax.adafactor, it does not scale the rate by the
    parameter's root mean square. Muon is for matrices (Kind.outputs), with AdamW for all others.
    """
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, mu_dtype=config.moment_dtype)
    if config.name == "adafactor":
        clip = optax.clip_by_block_rms(1.0)  # d = 1 in the Adafactor paper
        return [in_float32(optax.scale_by_factored_rms()), clip]
    if config.name == "adamw":
        return [adam]

    def matrices(params: Any, orthogonal: bool = True) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: bool(_kind_at(path, kinds).outputs) == orthogonal, params
        )

    return [
        optax.masked(scale_by_muon(config.moment_dtype, kinds), matrices),
        optax.masked(adam, functools.partial(matrices, orthogonal=False)),
    ]


def scale_by_muon(moment_dtype: str, kinds: Kinds) -> optax.GradientTransformation:
    """Orthogonalizes the momentum of every matrix by itself (optax.contrib.scale_by_muon).

    Uses Optax's Nesterov momentum of decay 0.95 and five Newton-Schulz iterations. A matrix is one
    expert's gate, up or down, or one layer's projection with all its heads. Its update is scaled
    by 0.2 sqrt(max(in, out)), so that its root mean square is close to AdamW's (arXiv 2502.16982).

    Optax flattens all leading axes of a stack into one, which would gather experts that are sharded
    along the second axis. The loop over layers leaves the sharded axis in front, and holds the
    intermediate products of one layer at a time.
    """

    def init(params: Any) -> optax.contrib.MuonState:
        return optax.contrib.scale_by_muon(mu_dtype=moment_dtype).init(params)

    def update(updates: Any, state: optax.contrib.MuonState, params: Any = None) -> tuple[Any, Any]:
        def of_parameter(path: tuple, gradient: Array, momentum: Array) -> tuple[Array, Array]:
            kind = _kind_at(path, kinds)
            numbers = optax.contrib.MuonDimensionNumbers(kind.summed, kind.outputs)
            muon = optax.contrib.scale_by_muon(
                mu_dtype=moment_dtype, weight_dimension_numbers=numbers
            )

            def of_layer(arrays: tuple[Array, Array]) -> tuple[Array, Array]:
                gradient, momentum = (_apart(x, kind.joined) for x in arrays)
                x, new = muon.update(gradient, state._replace(mu=momentum))
                sides = (kind.summed, kind.outputs)
                width = max(math.prod(x.shape[axis] for axis in side) for side in sides)
                x = 0.2 * math.sqrt(width) * x
                return x.reshape(arrays[0].shape), new.mu.reshape(arrays[0].shape)

            with jax.named_scope("newton_schulz"):
                if gradient.ndim == kind.bank + len(kind.summed) + len(kind.outputs):
                    return of_layer((gradient, momentum))
                return jax.lax.map(of_layer, (gradient, momentum))

        both = jax.tree_util.tree_map_with_path(of_parameter, updates, state.mu)
        first, second = (
            jax.tree.map(lambda _, pair, n=n: pair[n], updates, both) for n in range(2)
        )
        return first, state._replace(count=optax.safe_increment(state.count), mu=second)

    return optax.GradientTransformation(init, update)


def _apart(x: Float[Array, "..."], count: int) -> Float[Array, "..."]:
    """Separates `count` matrices that are joined along their output axis, the last but one."""
    return x if count == 1 else x.reshape(*x.shape[:-2], count, -1, x.shape[-1])


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Casts gradients, parameters and state of a transformation to float32.

    In bfloat16 Adafactor's moving averages would stop changing, as their steps round to zero.
    """

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(cast(updates), state, cast(params))

    return optax.GradientTransformation(lambda params: tx.init(cast(params)), update)


def apply_updates(params: Any, updates: Any, key: PRNGKeyArray) -> Any:
    """Returns params + updates, with stochastic rounding for bfloat16 parameters.

    At Table 5's rates most updates are below half the spacing of bfloat16 values: rounding to
    nearest would lose them, stochastic rounding keeps them on average.
    """
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))

    def apply(param: Array, update: Array, key: PRNGKeyArray) -> Array:
        if param.dtype != jnp.bfloat16:
            return param + update.astype(param.dtype)
        return stochastic_round(param.astype(jnp.float32) + update.astype(jnp.float32), key)

    return jax.tree.map(apply, params, updates, keys)


def stochastic_round(x: Float[Array, "*S"], key: PRNGKeyArray) -> Float[Array, "*S"]:
    """Rounds float32 to one of the two neighbouring bfloat16 values; the expectation is x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(cut, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
