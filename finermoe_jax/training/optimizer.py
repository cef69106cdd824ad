"""AdamW with the paper's schedule, and Adafactor to save memory, from Optax."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from finermoe_jax.config.run import OptimizerConfig
from finermoe_jax.layers.parameters import Kind, Path

# Kind of every trained parameter (parameters.trained_kinds).
type Kinds = Mapping[Path, Kind]


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of previous updates (Table 5).

    Linear from 0 during warm-up, then a cosine decay that reaches the final rate after `steps`.
    """
    warmup = max(1, round(config.warmup_fraction * steps)) if config.warmup_fraction else 0
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.final_learning_rate,
    )


def decayed(params: Any, kinds: Kinds) -> Any:
    """Returns True for every parameter with weight decay: all but norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: kinds[tuple(key.key for key in path)].decayed, params
    )


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


def optimizer(config: OptimizerConfig, steps: int, kinds: Kinds) -> optax.GradientTransformation:
    """Clips by global norm, then applies AdamW (Table 5) or Adafactor.

    Weight decay is multiplied by the learning rate. Gradients and state cover the parameters in
    `kinds` only.
    """
    mask = functools.partial(decayed, kinds=kinds)
    if config.name == "adafactor":
        second = _adafactor(config, steps, mask)
    else:
        second = optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=mask,
            mu_dtype=config.moment_dtype,
        )
    tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), second)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(grads, state, trained(params, kinds))

    return optax.GradientTransformation(lambda params: tx.init(trained(params, kinds)), update)


def _adafactor(
    config: OptimizerConfig, steps: int, mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern, 2018) with AdamW's schedule and decay.

    Unlike optax.adafactor, it does not scale the rate by the parameter's root mean square, and
    decay follows the schedule.
    """
    return optax.chain(
        in_float32(optax.scale_by_factored_rms()),
        optax.clip_by_block_rms(1.0),  # d = 1 in the Adafactor paper
        optax.add_decayed_weights(config.weight_decay, mask=mask),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


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
