"""expert_ffn in plain JAX, in blocks of rows of one expert.

* Few rows per expert: the first rows of all experts form one block each, computed together as
  batched products; a loop over blocks computes the rest.
* Very few or many rows per expert: only the loop. Work and memory traffic are proportional to the
  rows, and only experts with rows are read.
* Most experts without rows, as in decoding: each row is multiplied with its expert's weights
  individually (pallas_kernels/unrolled.py).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.blocks import block_rows, blocks, heads, pad, take
from pallas_kernels.expert_ffn.window import of_window
from pallas_kernels.unrolled import combined_rows, row_products

# Mean rows per expert between which reading every expert, padded to twice the mean, is cheaper than
# a loop iteration per expert.
_FEW, _MANY = 4, 32


def _blocks(rows: int, experts: int) -> tuple[int, int]:
    """Returns the rows of a block, and rows of each expert that are batched (0: none)."""
    block, mean = block_rows(rows, experts), rows / experts
    if not _FEW <= mean <= _MANY:
        return block, 0
    # The remaining rows belong to experts with many: larger blocks read weights less often.
    return 4 * block, 8 * math.ceil(2 * mean / 8)


def _hidden(x: Array, gate_up: Array) -> tuple[Array, Array]:
    hidden = x @ gate_up.T
    middle = gate_up.shape[0] // 2
    return hidden[:, :middle], hidden[:, middle:]


def _forward_block(
    x: Array, w_in: Array, w_out: Array, scales: tuple[Array, Array] | None = None
) -> Array:
    """y [B, W] of one expert's rows, before the routing weights; float32."""
    f32 = jnp.float32
    hidden = x @ w_in.astype(f32).T
    if scales is not None:
        hidden *= scales[0][None]
    gate, up = jnp.split(hidden, 2, axis=1)
    y = (jax.nn.silu(gate) * up) @ w_out.astype(f32)
    return y if scales is None else y * scales[1][None]


@jax.jit  # as layers/cpu.py's products: layers written out share its trace
def _forward_rows(
    x: Array, gate_up: Array, down: Array, expert: Array, scales: tuple[Array, Array] | None
) -> Array:
    """y [M, W] of few rows, each with its own expert; float32."""
    x = x.astype(jnp.float32)[:, None]
    # Without what indexing adds for negative and too large numbers.
    expert = expert.astype(jnp.uint32)

    def of_expert(weight: Array, *index: slice) -> Array:
        return weight.at[expert, :, *index].get(mode="promise_in_bounds")

    hidden = row_products(lambda start, stop: of_expert(gate_up, slice(start, stop)), x)
    if scales is not None:
        hidden *= scales[0][expert]
    gate, up = jnp.split(hidden, 2, axis=1)
    # Rows f, f + step, … have an axis of their own, so the gather does not copy.
    experts, f, width = down.shape

    def rows(start: int, stop: int, step: int) -> Array:
        return of_expert(down.reshape(experts, f // step, step, width), slice(start, stop))

    y = combined_rows(rows, jax.nn.silu(gate) * up)
    return y if scales is None else y * scales[1][expert]


def _backward_block(
    x: Array, dy: Array, weight: Array, own: Array, w_in: Array, w_out: Array
) -> tuple[Array, Array, Array, Array]:
    """The gradients in x, weight, w_in and w_out of one expert's `own` rows; float32.

    Recomputes the intermediate, so nothing of size M x F is stored. x and dy are zero outside the
    own rows; the masks keep NaN of idle experts' weights out of the gradients.
    """
    w_in, w_out, weight = w_in.astype(jnp.float32), w_out.astype(jnp.float32), weight[:, None]
    gate, up = _hidden(x, w_in)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    active = silu * up
    dactive = dy @ w_out.T  # before the routing weight
    dweight = (active * dactive).sum(axis=1)
    dactive *= weight
    dgate = dactive * up * (sigmoid + silu * (1 - sigmoid))
    dhidden = _masked(jnp.concatenate([dgate, dactive * silu], axis=1), own)
    active = _masked(active, own)
    return dhidden @ w_in, dweight, dhidden.T @ x, active.T @ (dy * weight)


def forward(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    first_expert: Array | int,
    scales: tuple[Array, Array] | None = None,
    window_of: tuple[int, int] | None = None,
) -> Array:
    """As api.expert_ffn. Blocks are computed in float32 for all dtypes."""
    m, groups = rows.shape[0], group_sizes.shape[0]
    experts, stack = window_of or (groups, len(gate_up))
    if 0 < m <= experts // 2:
        expert = jnp.repeat(jnp.arange(groups), group_sizes, total_repeat_length=m)
        y = _forward_rows(rows, gate_up, down, expert + first_expert, scales)
        return (y * row_weights.astype(jnp.float32)[:, None]).astype(rows.dtype)
    block, head = _blocks(m, experts)
    if scales is not None or stack != experts:
        # A batched product would need a copy of the layer's experts. In the forward pass a block of
        # 16 rows costs as much as one of 8, and few experts then have two.
        block, head = max(16, 2 * block_rows(m, experts)), 0
    count, expert, start, _ = blocks(group_sizes, m, block, head)
    x_all = pad(rows, block)

    def body(b: Array, out: Array) -> Array:
        x, e = take(x_all, start[b], block), expert[b] + first_expert
        own = None if scales is None else (scales[0][e], scales[1][e])
        y = _forward_block(x, gate_up[e], down[e], own)
        return lax.dynamic_update_slice_in_dim(out, y, start[b], 0)

    out = lax.fori_loop(0, count, body, jnp.zeros((m + block, down.shape[2]), jnp.float32))[:m]
    if head:
        first, own, place, inside = heads(group_sizes, m, head)
        y = jax.vmap(_forward_block)(_masked(rows[first], own), gate_up, down)
        out = jnp.where(inside[:, None], _flat(y)[place], out)
    return (out * row_weights.astype(jnp.float32)[:, None]).astype(rows.dtype)


def _masked(x: Array, own: Array) -> Array:
    """Casts to float32 and zeroes what is not an expert's own, NaN included."""
    own = own.reshape(own.shape + (1,) * (x.ndim - own.ndim))
    return jnp.where(own, x.astype(jnp.float32), 0.0)


def _flat(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def backward(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    first_expert: Array | int,
    dy: Array,
) -> tuple[Array, ...]:
    """Returns the gradients of rows, row_weights, and the window's gate_up and down; float32."""
    m, experts = rows.shape[0], group_sizes.shape[0]
    block, head = _blocks(m, experts)
    count, expert, start, own = blocks(group_sizes, m, block, head)
    x_all, dy_all, weight_all = (pad(a, block) for a in (rows, dy, row_weights))

    def body(b: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        dx_all, dweight_all, dw_in_all, dw_out_all = carry
        e, s = expert[b], start[b]
        # The next expert's rows must not contribute to this one's weight gradient.
        mine = jnp.arange(block) < own[b]
        x, dy = (_masked(take(a, s, block), mine) for a in (x_all, dy_all))
        dx, dweight, dw_in, dw_out = _backward_block(
            x, dy, take(weight_all, s, block), mine, gate_up[first_expert + e],
            down[first_expert + e],
        )  # fmt: skip
        put = functools.partial(lax.dynamic_update_slice_in_dim, axis=0)
        return (
            put(dx_all, dx, s),
            put(dweight_all, dweight, s),
            dw_in_all.at[e].add(dw_in),
            dw_out_all.at[e].add(dw_out),
        )

    f32 = jnp.float32
    if head:
        first, mine, place, inside = heads(group_sizes, m, head)
        x, dy_first, weight = (_masked(a[first], mine) for a in (rows, dy, row_weights))
        whole = of_window(gate_up, down, first_expert, experts)
        dx_first, dweight_first, dw_in, dw_out = jax.vmap(_backward_block)(
            x, dy_first, weight, mine, *whole
        )
    else:
        dw_in, dw_out = (jnp.zeros((experts, *w.shape[1:]), f32) for w in (gate_up, down))
    begin = jnp.zeros(x_all.shape, f32), jnp.zeros(m + block, f32), dw_in, dw_out
    dx, dweight, dw_in, dw_out = lax.fori_loop(0, count, body, begin)
    dx, dweight = dx[:m], dweight[:m]
    if head:
        dx = jnp.where(inside[:, None], _flat(dx_first)[place], dx)
        dweight = jnp.where(inside, _flat(dweight_first)[place], dweight)
    return dx, dweight, dw_in, dw_out
