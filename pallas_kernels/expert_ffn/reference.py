"""Definition of expert_ffn for tests: every expert over every row, then a selection."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.expert_ffn.window import of_window


def forward(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    first_expert: Array | int,
) -> Array:
    """As api.expert_ffn; work grows with rows x experts."""
    gate_up, down = of_window(gate_up, down, first_expert, len(group_sizes))
    return _plain(rows, row_weights, gate_up, down, group_sizes)


def backward(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    first_expert: Array | int,
    dy: Array,
) -> tuple[Array, ...]:
    """Returns the gradients of rows, row_weights, and the window's gate_up and down."""
    gate_up, down = of_window(gate_up, down, first_expert, len(group_sizes))
    plain = functools.partial(_plain, group_sizes=group_sizes)
    _, pull = jax.vjp(plain, rows, row_weights, gate_up, down)
    return pull(dy)


def _plain(
    rows: Array, row_weights: Array, gate_up: Array, down: Array, group_sizes: Array
) -> Array:
    f32 = jnp.float32
    experts = jnp.arange(gate_up.shape[0])
    # Rows past the last group belong to no expert, and may hold NaN.
    owned = jnp.arange(rows.shape[0]) < group_sizes.sum()
    owner = jnp.repeat(experts, group_sizes, total_repeat_length=rows.shape[0])
    owner = jnp.where(owned, owner, len(experts))
    rows = jnp.where(owned[:, None], rows, 0)
    hidden = jnp.einsum("MD,EFD->EMF", rows.astype(f32), gate_up.astype(f32))
    gate, up = jnp.split(hidden, 2, axis=-1)
    y = jnp.einsum("EMF,EFW->EMW", jax.nn.silu(gate) * up, down.astype(f32))
    mine = (owner[None] == experts[:, None])[..., None]
    y = jnp.where(mine, y, 0.0).sum(axis=0) * row_weights.astype(f32)[:, None]
    return y.astype(rows.dtype)
