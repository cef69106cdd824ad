"""Definition of grouped_matmul for tests: every expert over every row, then a selection."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def _mine(group_sizes: Array, rows: int) -> Array:
    """bool [E, M, 1]: True for the expert's own rows."""
    experts = jnp.arange(group_sizes.shape[0])
    owner = jnp.repeat(experts, group_sizes, total_repeat_length=rows)
    return (owner[None] == experts[:, None])[..., None]


def grouped_matmul(
    rows: Array, weights: Array, group_sizes: Array, *, transpose_weights: bool
) -> Array:
    """As api.grouped_matmul; work grows with rows x experts."""
    form = "MK,ENK->EMN" if transpose_weights else "MK,EKN->EMN"
    y = jnp.einsum(form, rows.astype(jnp.float32), weights.astype(jnp.float32))
    y = jnp.where(_mine(group_sizes, rows.shape[0]), y, 0.0).sum(axis=0)
    return y.astype(rows.dtype)


def weight_gradient(
    rows: Array, cotangent: Array, group_sizes: Array, *, out_dtype: DTypeLike
) -> Array:
    """As api.weight_gradient; work grows with rows x experts."""
    mine = _mine(group_sizes, rows.shape[0])
    x, dy = (jnp.where(mine, a.astype(jnp.float32), 0.0) for a in (rows, cotangent))
    return jnp.einsum("EMK,EMN->EKN", x, dy).astype(out_dtype)
