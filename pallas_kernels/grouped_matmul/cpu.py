"""grouped_matmul in plain JAX: a loop over blocks of rows, each of one expert.

Work and memory traffic are proportional to the rows; only experts with rows are read. Blocks are
computed in float32 for all dtypes.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.blocks import block_rows, blocks, pad, take


def grouped_matmul(
    rows: Array, weights: Array, group_sizes: Array, *, transpose_weights: bool
) -> Array:
    """As api.grouped_matmul."""
    m, block = rows.shape[0], block_rows(rows.shape[0], weights.shape[0])
    n = weights.shape[1 if transpose_weights else 2]
    count, expert, start, _ = blocks(group_sizes, m, block)
    x_all = pad(rows, block)

    def body(b: Array, out: Array) -> Array:
        w = weights[expert[b]].astype(jnp.float32)
        y = take(x_all, start[b], block) @ (w.T if transpose_weights else w)
        return lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), start[b], 0)

    return lax.fori_loop(0, count, body, jnp.zeros((m + block, n), rows.dtype))[:m]


def weight_gradient(
    rows: Array, cotangent: Array, group_sizes: Array, *, out_dtype: DTypeLike
) -> Array:
    """As api.weight_gradient."""
    experts = group_sizes.shape[0]
    m, block = rows.shape[0], block_rows(rows.shape[0], experts)
    count, expert, start, own = blocks(group_sizes, m, block)
    x_all, dy_all = pad(rows, block), pad(cotangent, block)

    def body(b: Array, out: Array) -> Array:
        # The next expert's rows, NaN included, must not contribute to this sum.
        mine = (jnp.arange(block) < own[b])[:, None]
        x, dy = (jnp.where(mine, take(a, start[b], block), 0.0) for a in (x_all, dy_all))
        return out.at[expert[b]].add(x.T @ dy)

    zeros = jnp.zeros((experts, rows.shape[1], cotangent.shape[1]), jnp.float32)
    return lax.fori_loop(0, count, body, zeros).astype(out_dtype)
