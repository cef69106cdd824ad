"""expert_ffn in plain JAX: a loop over blocks of rows, each of one expert.

Work and memory traffic are proportional to the rows; only experts that own a row are read. A
block may reach past its expert's last row: what it writes there is overwritten by the next
block, since blocks run in the order of the rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

# Rows per block: about an expert's mean share, so that balanced groups fit one block; at least
# enough to feed the vector units, at most what stays in the second-level cache.
_MIN_BLOCK, _MAX_BLOCK = 8, 128


def _block_rows(rows: int, experts: int) -> int:
    mean = max(1, rows // experts)
    return min(max(1 << (mean - 1).bit_length(), _MIN_BLOCK), _MAX_BLOCK)


def _blocks(group_sizes: Array, rows: int, block: int) -> tuple[Array, Array, Array, Array]:
    """Number of blocks in use, and each block's expert, first row and rows of its own."""
    experts = group_sizes.shape[0]
    per_expert = -(-group_sizes // block)
    last = jnp.cumsum(per_expert)
    index = jnp.arange(max(1, rows // block + min(experts, rows)))
    expert = jnp.minimum(jnp.searchsorted(last, index, side="right"), experts - 1)
    done = (index - (last - per_expert)[expert]) * block
    start = (jnp.cumsum(group_sizes) - group_sizes)[expert] + done
    return last[-1], expert, start, group_sizes[expert] - done


def _pad(x: Array, block: int) -> Array:
    return jnp.pad(x, ((0, block),) + ((0, 0),) * (x.ndim - 1))


def _take(x: Array, start: Array, block: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, block).astype(jnp.float32)


def _hidden(x: Array, gate_up: Array) -> tuple[Array, Array]:
    hidden = x @ gate_up.T
    middle = gate_up.shape[0] // 2
    return hidden[:, :middle], hidden[:, middle:]


@jax.custom_vjp
def expert_ffn(
    rows: Array, gate_up: Array, down: Array, group_sizes: Array, row_weights: Array
) -> Array:
    """See api.expert_ffn. Blocks are computed in float32, whatever the dtypes."""
    m, block = rows.shape[0], _block_rows(rows.shape[0], gate_up.shape[0])
    count, expert, start, _ = _blocks(group_sizes, m, block)
    x_all = _pad(rows, block)

    def body(b: Array, out: Array) -> Array:
        w_in = gate_up[expert[b]].astype(jnp.float32)
        w_out = down[expert[b]].astype(jnp.float32)
        gate, up = _hidden(_take(x_all, start[b], block), w_in)
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
    m, block = rows.shape[0], _block_rows(rows.shape[0], gate_up.shape[0])
    count, expert, start, own = _blocks(group_sizes, m, block)
    x_all, dy_all, weight_all = (_pad(a, block) for a in (rows, dy, row_weights))

    def body(b: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        dx_all, dweight_all, dw_in_all, dw_out_all = carry
        e, s = expert[b], start[b]
        w_in, w_out = gate_up[e].astype(f32), down[e].astype(f32)
        # Rows of the next expert, NaN or not, must not reach this one's weight gradient.
        mine = (jnp.arange(block) < own[b])[:, None]
        x, dy = (jnp.where(mine, _take(a, s, block), 0.0) for a in (x_all, dy_all))
        weight = _take(weight_all, s, block)[:, None]
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
