"""AdamW with the paper's schedule, from Optax."""

from typing import Any

import jax
import optax

from finermoe_jax.config import OptimizerConfig

# Parameters that are not decayed: norms and biases.
_NOT_DECAYED = ("scale", "query_bias", "key_bias", "value_bias")


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


def decayed(params: Any) -> Any:
    """True at every parameter that weight decay acts on: all but norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in _NOT_DECAYED, params
    )


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Table 5)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
