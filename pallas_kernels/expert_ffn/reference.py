"""The plain meaning of expert_ffn: every expert over every row, then a choice. For tests."""

import jax
import jax.numpy as jnp
from jax import Array


def expert_ffn(
    rows: Array, gate_up: Array, down: Array, group_sizes: Array, row_weights: Array
) -> Array:
    """Shapes and result as in api.expert_ffn; work grows with rows x experts."""
    f32 = jnp.float32
    experts = jnp.arange(gate_up.shape[0])
    owner = jnp.repeat(experts, group_sizes, total_repeat_length=rows.shape[0])
    hidden = jnp.einsum("MD,EFD->EMF", rows.astype(f32), gate_up.astype(f32))
    gate, up = jnp.split(hidden, 2, axis=-1)
    y = jnp.einsum("EMF,EFW->EMW", jax.nn.silu(gate) * up, down.astype(f32))
    mine = (owner[None] == experts[:, None])[..., None]
    y = jnp.where(mine, y, 0.0).sum(axis=0) * row_weights.astype(f32)[:, None]
    return y.astype(rows.dtype)
