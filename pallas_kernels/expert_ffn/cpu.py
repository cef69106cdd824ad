"""expert_ffn in plain JAX: a loop over blocks of rows, each of one expert.

Work and memory traffic are proportional to the rows; only experts that own a row are read.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.blocks import block_rows, blocks, pad, take


def _hidden(x: Array, gate_up: Array) -> tuple[Array, Array]:
    hidden = x @ gate_up.T
    middle = gate_up.shape[0] // 2
    return hidden[:, :middle], hidden[:, middle:]


@jax.custom_vjp
def expert_ffn(
    rows: Array, gate_up: Array, down: Array, group_sizes: Array, row_weights: Array
) -> Array:
    """See api.expert_ffn. Blocks are computed in float32, whatever the dtypes."""
    m, block = rows.shape[0], block_rows(rows.shape[0], gate_up.shape[0])
    count, expert, start, _ = blocks(group_sizes, m, block)
    x_all = pad(rows, block)

    def body(b: Array, out: Array) -> Array:
        w_in = gate_up[expert[b]].astype(jnp.float32)
        w_out = down[expert[b]].astype(jnp.float32)
        gate, up = _hidden(take(x_all, start[b], block), w_in)
        y = (jax.nn.silu(gate) * up) @ w_out
        return lax.dynamic_update_slice_in_dim(out, y, start[b], 0)

    out = lax.fori_loop(0, count, body, jnp.zeros((m + block, down.shape[2]), jnp.float32))[:m]
    return (out * row_weights.astype(jnp.float32)[:, None]).astype(rows.dtype)


def _forward(*args: Array) -> tuple[Array, tuple[Array, ...]]:
    return expert_ffn(*args), args


def _backward(saved: tuple[Array, ...], dy: Array) -> tuple[Array | None, ...]:
    """Recomputes each block's intermediate; nothing of size M x F was stored."""
    rows, gate_up, down, group_sizes, row_weights = saved
    f32 = jnp.float32
    m, block = rows.shape[0], block_rows(rows.shape[0], gate_up.shape[0])
    count, expert, start, own = blocks(group_sizes, m, block)
    x_all, dy_all, weight_all = (pad(a, block) for a in (rows, dy, row_weights))

    def body(b: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        dx_all, dweight_all, dw_in_all, dw_out_all = carry
        e, s = expert[b], start[b]
        w_in, w_out = gate_up[e].astype(f32), down[e].astype(f32)
        # Rows of the next expert, NaN or not, must not reach this one's weight gradient.
        mine = (jnp.arange(block) < own[b])[:, None]
        x, dy = (jnp.where(mine, take(a, s, block), 0.0) for a in (x_all, dy_all))
        weight = take(weight_all, s, block)[:, None]
        gate, up = _hidden(x, w_in)
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        active = silu * up
        dactive = dy @ w_out.T  # before the routing weight
        dweight = (active * dactive).sum(axis=1)
        dactive *= weight
        dgate = dactive * up * (sigmoid + silu * (1 - sigmoid))
        dhidden = jnp.concatenate([dgate, dactive * silu], axis=1)
        put = functools.partial(lax.dynamic_update_slice_in_dim, axis=0)
        return (
            put(dx_all, dhidden @ w_in, s),
            put(dweight_all, dweight, s),
            dw_in_all.at[e].add(dhidden.T @ x),
            dw_out_all.at[e].add(active.T @ (dy * weight)),
        )

    zeros = (
        jnp.zeros(x_all.shape, f32),
        jnp.zeros(m + block, f32),
        jnp.zeros(gate_up.shape, f32),
        jnp.zeros(down.shape, f32),
    )
    dx, dweight, dw_in, dw_out = lax.fori_loop(0, count, body, zeros)
    return (
        dx[:m].astype(rows.dtype),
        dw_in.astype(gate_up.dtype),
        dw_out.astype(down.dtype),
        None,
        dweight[:m].astype(row_weights.dtype),
    )


expert_ffn.defvjp(_forward, _backward)
