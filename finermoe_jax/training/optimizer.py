"""AdamW with the paper's schedule, and Adafactor where memory is short, from Optax."""

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

# Every parameter's kind (parameters.kinds).
type Kinds = Mapping[Path, Kind]


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Rate of the update that follows `count` others: linear from 0 over the warm-up, then a
    cosine that reaches the final rate after `steps` updates (Table 5)."""
    warmup = max(1, round(config.warmup_fraction * steps)) if config.warmup_fraction else 0
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.final_learning_rate,
    )


def decayed(params: Any, kinds: Kinds) -> Any:
    """True at every parameter that weight decay acts on: all but norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: kinds[tuple(key.key for key in path)].decayed, params
    )


def trained(params: dict, config: OptimizerConfig, kinds: Kinds) -> dict:
    """The part of a nested dict of parameters that training changes.

    All of it, or with freeze_backbone what the published training code leaves free beside a frozen
    backbone: embedding, routers, experts (the shared one, too) and norms.
    """
    if not config.freeze_backbone:
        return params
    flat = nnx.traversals.flatten_mapping(params)
    return nnx.traversals.unflatten_mapping(
        {path: leaf for path, leaf in flat.items() if not kinds[path].backbone}
    )


def completed(params: dict, part: dict) -> dict:
    """params with the leaves of `part`, a nested dict of some of them, in place of its own."""
    flatten = nnx.traversals.flatten_mapping
    return nnx.traversals.unflatten_mapping(flatten(params) | flatten(part))


def optimizer(config: OptimizerConfig, steps: int, kinds: Kinds) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Table 5) or Adafactor; weight decay times the rate.

    It keeps its state, and takes gradients, for `trained(params)` alone. kinds: of the model's
    parameters.
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
        return tx.update(grads, state, trained(params, config, kinds))

    return optax.GradientTransformation(
        lambda params: tx.init(trained(params, config, kinds)), update
    )


def _adafactor(
    config: OptimizerConfig, steps: int, mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern, 2018) with AdamW's schedule and decay.

    Not optax.adafactor: that one multiplies each rate by the parameter's own root mean square, so
    that Table 5's rates would mean something else, and decays by an amount that ignores the
    schedule. Layers and experts are stacked, so one clip serves a whole stack.
    """
    return optax.chain(
        in_float32(optax.scale_by_factored_rms()),
        optax.clip_by_block_rms(1.0),  # the paper's d = 1
        optax.add_decayed_weights(config.weight_decay, mask=mask),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation on gradients and parameters cast to float32, its state included.

    A moving average in bfloat16 stops changing once its step is below half a unit in the last
    place, and Adafactor's shrinks to a 600th over a run.
    """

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(cast(updates), state, cast(params))

    return optax.GradientTransformation(lambda params: tx.init(cast(params)), update)


def apply_updates(params: Any, updates: Any, key: PRNGKeyArray) -> Any:
    """params + updates; into bfloat16 rounded at random, in proportion to what is cut off.

    At Table 5's rates almost every update is smaller than half the distance between neighbouring
    bfloat16 values. Rounded to nearest it would be lost every time; at random, it arrives on
    average.
    """
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))

    def apply(param: Array, update: Array, key: PRNGKeyArray) -> Array:
        if param.dtype != jnp.bfloat16:
            return param + update.astype(param.dtype)
        return round_at_random(param.astype(jnp.float32) + update.astype(jnp.float32), key)

    return jax.tree.map(apply, params, updates, keys)


def round_at_random(x: Float[Array, "*S"], key: PRNGKeyArray) -> Float[Array, "*S"]:
    """float32 as one of the two neighbouring bfloat16 values; the expectation is x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(cut, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
