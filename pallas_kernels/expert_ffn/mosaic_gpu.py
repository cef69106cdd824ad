"""expert_ffn on Hopper GPUs: gate, up, activation, down and routing weight in one kernel.

Letters: E experts, M rows, D model width, F intermediate, W output width; F' is F up to a multiple
of 64. Tiles, rings and stores are those of grouped_matmul/mosaic_gpu.py, whose docstring also says
what float32, Blackwell and older GPUs get: float32, and experts of more than MAX_FUSED_F, go
through its grouped matmuls one after the other; Blackwell goes through cpu.py.

**Forward.** Shared memory does not hold an expert, but it holds what a tile of R rows needs between
the two products: the activated intermediate, [R, F'] in the dtype of rows. For 128 columns of F at
a time, x and the gate and up weights stream through the ring and the activated result goes to
shared memory; then the down weights stream. The intermediate never reaches HBM. R is 128 where
[128, F'] leaves room for the ring (F' up to 384) and 64 otherwise; the two multiplying warpgroups
share the rows of a tile of 128 and the columns of a tile of 64.

**Backward.** Nothing of size M x F is kept from the forward pass. One kernel recomputes gate and
up, multiplies the cotangent with the down weights, and writes the gradients of gate and up, the
activated intermediate times the routing weight, and the gradient of the routing weight. Three
grouped matmuls make the gradients of rows, gate_up and down of these.

**Bytes.** With T tiles = sum over experts of ceil((rows + o) / R), o < 8 (see grouped_matmul), and
elements of two bytes, the copies bring in, in elements,

    forward:                T (ceil(F / 128) R D + 2 F' D + F' W)
    fused backward kernel:  T (F' / 64) (R (D + W) + 128 D + 64 W),   here R = 128

and write M W and 3 M F'. HBM carries less: a tile's rows are read again and again by the one
multiprocessor that needs them, and an expert's weights by those that work on its tiles side by
side, so that both come from the L2 cache but for the first time. At best, then,

    forward:   M D + X + M W                             X = touched experts' 3 matrices
    backward:  M (3 D + 2 W) + 8 M F' + X + Y + gradients         Y = their gate and up

of which the forward is the lower bound itself. Backward that would be M (2 D + W) + X + gradients:
reading rows, cotangent, gate and up twice, and the intermediates' round trips, is the price of
matrix products whose sums live in registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.expert_ffn import cpu
from pallas_kernels.grouped_matmul import mosaic_gpu as matmul
from pallas_kernels.grouped_matmul.mosaic_gpu import ALL, STEP, WARPGROUP_ROWS, Interpret

# Columns of F and of W come in blocks of this many; W in tiles of several.
BLOCK = 64
W_BLOCKS = 2
# The activated intermediate of 128 rows has this much shared memory at most; the ring has the rest.
_ACTIVE_BYTES = 96 * 1024
_RING_AND_ACTIVE_BYTES = 200 * 1024
MAX_FUSED_F = 896


def expert_ffn(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    *,
    interpret: Interpret,
) -> Array:
    """Row m of expert e: weight_m * (silu(x_m Wg_e^T) * (x_m Wu_e^T)) Wd_e.

    Dropless for every distribution of rows; differentiable in every array but group_sizes, in the
    dtype of each. Weights of an expert without rows reach nothing; their gradient is exactly 0.

    Args:
      rows: [M, D], sorted by expert; bfloat16, float16 or float32.
      gate_up: [E, 2F, D], the F gate rows first, then the F up rows; cast to a two-byte dtype of
        rows.
      down: [E, F, W], cast likewise.
      group_sizes: int32 [E], rows of each expert; they sum to M.
      row_weights: [M].
      interpret: run interpreted on any platform; True or parameters of the interpreter.

    Returns:
      [M, W] in the dtype of rows, accumulated in float32.

    Raises:
      NotImplementedError: a GPU older than Hopper.
    """
    if not matmul.uses_wgmma(interpret):
        return cpu.expert_ffn(rows, gate_up, down, group_sizes, row_weights)
    if 0 in rows.shape or 0 in down.shape:
        return jnp.zeros((rows.shape[0], down.shape[2]), rows.dtype)
    fused = rows.dtype.itemsize == 2 and down.shape[1] <= MAX_FUSED_F
    return (_fused if fused else _separate)(
        rows, gate_up, down, group_sizes, row_weights, interpret
    )


# --- in one kernel ------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _fused(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    interpret: Interpret,
) -> Array:
    x, w_in, w_out, weights = _prepare(rows, gate_up, down, row_weights)
    y = _forward_kernel(x, w_in, w_out, group_sizes, weights, interpret)
    return y[: rows.shape[0], : down.shape[2]]


def _fused_forward(*args: Any) -> tuple[Array, tuple[Array, ...]]:
    return _fused(*args), args[:-1]


def _fused_backward(
    interpret: Interpret, saved: tuple[Array, ...], dy: Array
) -> tuple[Array | None, ...]:
    rows, gate_up, down, group_sizes, row_weights = saved
    (m, d), (experts, f, width) = rows.shape, down.shape
    x, w_in, w_out, weights = _prepare(rows, gate_up, down, row_weights)
    dy = matmul.padded(dy)
    dhidden, active, dweights = _backward_kernel(
        x, w_in, w_out, dy, group_sizes, weights, interpret
    )
    by_half = gate_up.astype(rows.dtype).reshape(experts, 2, f, d)
    dx = matmul.product(dhidden, by_half, group_sizes, rows.dtype, False, interpret)
    dw_in = matmul.sum_of_products(dhidden, x, group_sizes, (2, f), gate_up.dtype, interpret)
    dw_out = matmul.sum_of_products(active, dy, group_sizes, (1, f), down.dtype, interpret)
    return (
        dx[:m, :d],
        dw_in[:, :, :f, :d].reshape(gate_up.shape),
        dw_out[:, 0, :f, :width],
        None,
        dweights[:m, 0].astype(row_weights.dtype),
    )


_fused.defvjp(_fused_forward, _fused_backward)


def _prepare(
    rows: Array, gate_up: Array, down: Array, row_weights: Array
) -> tuple[Array, Array, Array, Array]:
    """What the kernels take: [M, D], [2E, F, D] and [E, F, W] padded for TMA, float32 weights.

    A half of an expert's gate_up is an array of its own, so that the zeros with which TMA fills
    what lies past its F rows stand where the other half's would be.
    """
    experts, f, _ = down.shape
    halves = gate_up.astype(rows.dtype).reshape(2 * experts, f, -1)
    # A tile reads the weights of all its rows, also of those past the last.
    weights = jnp.pad(row_weights.astype(jnp.float32), (0, 8 + matmul.TILE_ROWS))
    w_out = matmul.padded(down.astype(rows.dtype))
    return matmul.padded(rows), matmul.padded(halves), w_out, weights


def _row_weights(weights: Any, first: Array) -> Array:
    """float32 [64, BLOCK]: the weights of 64 rows from `first` on, in every column."""
    column = plgpu.load(
        weights.at[pl.ds(first, WARPGROUP_ROWS)],
        layout=plgpu.Layout.WGMMA.reduce(1),
        optimized=False,
    )
    return lax.broadcast_in_dim(column, (WARPGROUP_ROWS, BLOCK), (0,))


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def tile_rows(f: int) -> int:
    """Rows of a tile of the forward kernel."""
    whole = matmul.TILE_ROWS * -(-f // BLOCK) * BLOCK * 2 <= _ACTIVE_BYTES
    return matmul.TILE_ROWS if whole else WARPGROUP_ROWS


def _forward_kernel(
    x: Array, w_in: Array, w_out: Array, group_sizes: Array, weights: Array, interpret: Interpret
) -> Array:
    (m, d), (_, f, width), dtype = x.shape, w_out.shape, x.dtype
    tile = tile_rows(f)
    split = tile == WARPGROUP_ROWS  # the warpgroups share columns instead of rows
    f_blocks = -(-f // BLOCK)
    if split:
        f_blocks += f_blocks % 2  # each chunk of two has one for each warpgroup
    w_tiles, d_steps = -(-width // (W_BLOCKS * BLOCK)), d // STEP
    slot_bytes = (tile + 4 * BLOCK) * STEP * 2
    slots = min(6, (_RING_AND_ACTIVE_BYTES - tile * f_blocks * BLOCK * 2) // slot_bytes)
    table, count = matmul.work(group_sizes, m, tile)

    def body(
        table,
        count,
        x,
        w_in,
        w_out,
        weights,
        y,
        x_ring,
        w_ring,
        active,
        filled,
        freed,
        both,
        **stage,
    ):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 2)
        def _copy():
            plgpu.set_max_registers(matmul.COPY_REGISTERS, action="decrease")

            def one(index: Array, step: Array) -> Array:
                expert = table[0, index]
                some_rows = pl.ds(matmul.eights(table[1, index]), tile)

                def hidden(chunk: Array, blocks: int, step: Array) -> Array:
                    def fetch(i: Array, _: None) -> None:
                        depth = pl.ds(i * STEP, STEP)
                        copies = [(x.at[some_rows, depth], x_ring, ALL)]
                        copies += _gate_and_up(
                            w_in, w_ring, expert, chunk * (2 * BLOCK), blocks, depth
                        )
                        matmul.fill(step + i, filled, freed, copies)

                    lax.fori_loop(0, d_steps, fetch, None)
                    return step + d_steps

                step = _chunks(f_blocks, hidden, step)

                def fetch(i: Array, _: None) -> None:
                    depth = pl.ds(lax.rem(i, jnp.int32(f_blocks)) * BLOCK, BLOCK)
                    column = lax.div(i, jnp.int32(f_blocks)) * (W_BLOCKS * BLOCK)
                    copies = [
                        (
                            w_out.at[expert, depth, pl.ds(column + b * BLOCK, BLOCK)],
                            w_ring,
                            pl.ds(b * BLOCK, BLOCK),
                        )
                        for b in range(W_BLOCKS)
                    ]
                    matmul.fill(step + i, filled, freed, copies)
                    # A slot is full after three arrivals; here no rows of x are among them.
                    plgpu.barrier_arrive(filled.at[lax.rem(step + i, jnp.int32(slots))])

                lax.fori_loop(0, f_blocks * w_tiles, fetch, None)
                return step + f_blocks * w_tiles

            matmul.each_of_mine(count[0], one)

        @pl.when(warpgroup < 2)
        def _multiply():
            plgpu.set_max_registers(matmul.MULTIPLY_REGISTERS, action="increase")
            offset = 0 if split else warpgroup * WARPGROUP_ROWS
            my_rows = pl.ds(offset, WARPGROUP_ROWS)

            def one(index: Array, step: Array) -> Array:
                def hidden(chunk: Array, blocks: int, step: Array) -> Array:
                    # In the ring: gate, then up. Whole rows take both at once; a half of the
                    # columns takes its own block of each.
                    width = BLOCK if split else 2 * blocks * BLOCK
                    starts = [warpgroup * BLOCK, (warpgroup + 2) * BLOCK] if split else [0]

                    def accumulate(*accs) -> list[Array]:
                        def multiply(i: Array, slot: Array) -> None:
                            for acc, start in zip(accs, starts, strict=True):
                                w_tile = w_ring.at[slot].at[pl.ds(start, width)]
                                x_tile = x_ring.at[slot].at[my_rows]
                                plgpu.wgmma(acc, x_tile, w_tile.transpose((1, 0)))

                        matmul.drain(step, d_steps, filled, freed, multiply, len(starts))
                        return [acc[...] for acc in accs]

                    accs = [plgpu.ACC((WARPGROUP_ROWS, width))] * len(starts)
                    values = pl.run_scoped(accumulate, *accs)
                    for b in range(1 if split else blocks):
                        gate, up = values if split else _gate_up_block(values[0], b)
                        column = (2 * chunk + (warpgroup if split else b)) * BLOCK
                        result = gate * _sigmoid(gate) * up
                        active[my_rows, pl.ds(column, BLOCK)] = result.astype(dtype)
                    return step + d_steps

                step = _chunks(f_blocks, hidden, step)
                plgpu.commit_smem()
                if split:  # the other half of the columns is the other warpgroup's
                    plgpu.barrier_arrive(both)
                    plgpu.barrier_wait(both)

                first = matmul.eights(table[1, index]) + offset
                own = matmul.own_rows((table[2, index], table[3, index]), offset)
                scale = _row_weights(weights, first)
                mine = W_BLOCKS // 2 if split else W_BLOCKS
                my_first = warpgroup * mine if split else 0

                def columns(w_tile: Array, step: Array) -> Array:
                    def accumulate(*accs) -> list[Array]:
                        def multiply(i: Array, slot: Array) -> None:
                            a = active.at[my_rows, pl.ds(i * BLOCK, BLOCK)]
                            for b, acc in enumerate(accs):
                                block = pl.ds((my_first + b) * BLOCK, BLOCK)
                                plgpu.wgmma(acc, a, w_ring.at[slot].at[block])

                        matmul.drain(step, f_blocks, filled, freed, multiply, products=mine)
                        return [acc[...] for acc in accs]

                    accs = [plgpu.ACC((WARPGROUP_ROWS, BLOCK))] * mine
                    for b, values in enumerate(pl.run_scoped(accumulate, *accs)):
                        column = (w_tile * W_BLOCKS + my_first + b) * BLOCK

                        @pl.when(column < width)
                        def _store(values=values, column=column):
                            matmul.store_rows(
                                values * scale,
                                warpgroup=warpgroup,
                                own=own,
                                target=matmul.window(y, first, column),
                                **stage,
                            )

                    return step + f_blocks

                step = lax.fori_loop(0, w_tiles, columns, step)
                if split:  # neither may overwrite what the other still multiplies
                    plgpu.barrier_arrive(both)
                    plgpu.barrier_wait(both)
                return step

            matmul.each_of_mine(count[0], one)
            plgpu.wait_smem_to_gmem(0)

    layout = matmul.swizzled(dtype)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, width), dtype),
        scratch_types=dict(
            x_ring=plgpu.SMEM((slots, tile, STEP), dtype, transforms=layout),
            w_ring=plgpu.SMEM((slots, 4 * BLOCK, STEP), dtype, transforms=layout),
            active=plgpu.SMEM((tile, f_blocks * BLOCK), dtype, transforms=layout),
            filled=plgpu.Barrier(num_arrivals=3, num_barriers=slots),
            freed=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            both=plgpu.Barrier(num_arrivals=2),
            **matmul.staging(dtype),
        ),
        kernel_name="expert_ffn",
        **matmul.launch(interpret),
    )(table, count, x, w_in, w_out, weights)


def _chunks(f_blocks: int, chunk: Any, carry: Any) -> Any:
    """chunk(number, blocks, carry) for F two blocks at a time, the last one alone if odd."""
    carry = lax.fori_loop(0, f_blocks // 2, lambda c, carry: chunk(c, 2, carry), carry)
    # A number that Pallas takes for dynamic: the last blocks may reach past F.
    return chunk(jnp.int32(f_blocks // 2), 1, carry) if f_blocks % 2 else carry


def _gate_up_block(values: Array, block: int) -> tuple[Array, Array]:
    """Gate and up of a block of a chunk, whose columns are all of gate, then all of up."""
    at, up = block * BLOCK, values.shape[1] // 2
    return values[:, at : at + BLOCK], values[:, up + at : up + at + BLOCK]


def _gate_and_up(
    w_in: Any, ring: Any, expert: Array, first: Array, blocks: int, depth: Any
) -> list[tuple]:
    """Copies of the gate rows of some blocks, the first at `first`, and behind them the up rows."""
    rows = blocks * BLOCK
    some_f = pl.ds(first, rows)
    return [
        (w_in.at[2 * expert + half, some_f, depth], ring, pl.ds(half * rows, rows))
        for half in range(2)
    ]


def _backward_kernel(
    x: Array,
    w_in: Array,
    w_out: Array,
    dy: Array,
    group_sizes: Array,
    weights: Array,
    interpret: Interpret,
) -> tuple[Array, Array, Array]:
    """[M, 2F'] gradients of gate and of up, [M, F'] weighted active, float32 [M, 8] dweight.

    F' is F up to a multiple of 64; the columns past F hold zeros. All eight columns of dweight are
    alike: TMA writes no fewer bytes.
    """
    (m, d), (_, f, width), dtype = x.shape, w_out.shape, x.dtype
    tile, f_blocks = matmul.TILE_ROWS, -(-f // BLOCK)
    f_padded, d_steps, w_steps = f_blocks * BLOCK, d // STEP, width // STEP
    slots = matmul.RING_BYTES // ((tile + 2 * BLOCK) * STEP * 2)
    table, count = matmul.work(group_sizes, m, tile)

    def body(
        table, count, x, w_in, w_out, dy, weights, dhidden, active, dweights,
        x_ring, w_ring, filled, freed, stage_dweights, **stage,
    ):  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 2)
        def _copy():
            plgpu.set_max_registers(matmul.COPY_REGISTERS, action="decrease")

            def one(index: Array, step: Array) -> Array:
                expert = table[0, index]
                some_rows = pl.ds(matmul.eights(table[1, index]), tile)

                def block(number: Array, step: Array) -> Array:
                    column = number * BLOCK

                    def fetch_hidden(i: Array, _: None) -> None:
                        depth = pl.ds(i * STEP, STEP)
                        copies = [(x.at[some_rows, depth], x_ring, ALL)]
                        copies += _gate_and_up(w_in, w_ring, expert, column, 1, depth)
                        matmul.fill(step + i, filled, freed, copies)

                    def fetch_cotangent(i: Array, _: None) -> None:
                        depth, half = pl.ds(i * STEP, STEP), BLOCK // 2
                        copies: list[tuple] = [(dy.at[some_rows, depth], x_ring, ALL)]
                        for f in (0, half):  # two, as of gate and up: as many arrivals
                            source = w_out.at[expert, pl.ds(column + f, half), depth]
                            copies.append((source, w_ring, pl.ds(f, half)))
                        matmul.fill(step + d_steps + i, filled, freed, copies)

                    lax.fori_loop(0, d_steps, fetch_hidden, None)
                    lax.fori_loop(0, w_steps, fetch_cotangent, None)
                    return step + d_steps + w_steps

                return lax.fori_loop(0, f_blocks, block, step)

            matmul.each_of_mine(count[0], one)

        @pl.when(warpgroup < 2)
        def _multiply():
            plgpu.set_max_registers(matmul.MULTIPLY_REGISTERS, action="increase")
            offset = warpgroup * WARPGROUP_ROWS
            my_rows = pl.ds(offset, WARPGROUP_ROWS)

            def one(index: Array, step: Array) -> Array:
                first = matmul.eights(table[1, index]) + offset
                own = matmul.own_rows((table[2, index], table[3, index]), offset)

                # Two blocks at a time, as in the forward pass, overflow registers.
                def block(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                    step, dweight = carry

                    def accumulate(acc, dacc) -> tuple[Array, Array]:
                        def multiply(into, columns):
                            def product(i: Array, slot: Array) -> None:
                                w_tile = w_ring.at[slot].at[pl.ds(0, columns)].transpose((1, 0))
                                plgpu.wgmma(into, x_ring.at[slot].at[my_rows], w_tile)

                            return product

                        hidden = multiply(acc, 2 * BLOCK)
                        dactive = multiply(dacc, BLOCK)
                        matmul.drain(step, d_steps, filled, freed, hidden)
                        matmul.drain(step + d_steps, w_steps, filled, freed, dactive)
                        return acc[...], dacc[...]

                    values, dactive = pl.run_scoped(
                        accumulate,
                        plgpu.ACC((WARPGROUP_ROWS, 2 * BLOCK)),
                        plgpu.ACC((WARPGROUP_ROWS, BLOCK)),
                    )
                    gate, up = _gate_up_block(values, 0)
                    sigmoid = _sigmoid(gate)
                    silu = gate * sigmoid
                    product = silu * up
                    dweight += (product * dactive).sum(axis=1)
                    scale = _row_weights(weights, first)
                    dactive *= scale
                    dgate = dactive * up * (sigmoid + silu * (1.0 - sigmoid))
                    column = number * BLOCK
                    for out, at, result in (
                        (dhidden, column, dgate),
                        (dhidden, column + f_padded, dactive * silu),
                        (active, column, product * scale),
                    ):
                        matmul.store_rows(
                            result,
                            warpgroup=warpgroup,
                            own=own,
                            target=matmul.window(out, first, at),
                            **stage,
                        )
                    return step + d_steps + w_steps, dweight

                zeros = jnp.zeros((WARPGROUP_ROWS,), jnp.float32)
                zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA.reduce(1))
                step, dweight = lax.fori_loop(0, f_blocks, block, (step, zeros))
                matmul.store_partial(
                    lax.broadcast_in_dim(dweight, (WARPGROUP_ROWS, 8), (0,)),
                    stage_dweights,
                    warpgroup,
                    own,
                    lambda row, rows, _, __: dweights.at[pl.ds(first + row, rows)],
                )
                return step

            matmul.each_of_mine(count[0], one)
            plgpu.wait_smem_to_gmem(0)

    layout = matmul.swizzled(dtype)
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((m, 2 * f_padded), dtype),
            jax.ShapeDtypeStruct((m, f_padded), dtype),
            jax.ShapeDtypeStruct((m, 8), jnp.float32),
        ],
        scratch_types=dict(
            x_ring=plgpu.SMEM((slots, tile, STEP), dtype, transforms=layout),
            w_ring=plgpu.SMEM((slots, 2 * BLOCK, STEP), dtype, transforms=layout),
            filled=plgpu.Barrier(num_arrivals=3, num_barriers=slots),
            freed=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            stage_dweights=plgpu.SMEM((2, WARPGROUP_ROWS, 8), jnp.float32),
            **matmul.staging(dtype),
        ),
        kernel_name="expert_ffn_backward",
        **matmul.launch(interpret),
    )(table, count, x, w_in, w_out, dy, weights)


# --- one grouped matmul after the other ---------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _separate(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    interpret: Interpret,
) -> Array:
    gate, up = _gate_up(rows, gate_up, group_sizes, interpret)
    active = (jax.nn.silu(gate) * up).astype(rows.dtype)
    y = _float32_product(active, down, group_sizes, False, interpret)
    return (y * row_weights.astype(jnp.float32)[:, None]).astype(rows.dtype)


def _float32_product(
    rows: Array, weights: Array, group_sizes: Array, transpose: bool, interpret: Interpret
) -> Array:
    return matmul.grouped_matmul(
        rows,
        weights,
        group_sizes,
        transpose_weights=transpose,
        interpret=interpret,
        out_dtype=jnp.float32,
    )


def _gate_up(
    rows: Array, gate_up: Array, group_sizes: Array, interpret: Interpret
) -> tuple[Array, Array]:
    hidden = _float32_product(rows, gate_up, group_sizes, True, interpret)
    return hidden[:, : hidden.shape[1] // 2], hidden[:, hidden.shape[1] // 2 :]


def _separate_forward(*args: Any) -> tuple[Array, tuple[Array, ...]]:
    return _separate(*args), args[:-1]


def _separate_backward(
    interpret: Interpret, saved: tuple[Array, ...], dy: Array
) -> tuple[Array | None, ...]:
    rows, gate_up, down, group_sizes, row_weights = saved
    dtype, weights = rows.dtype, row_weights.astype(jnp.float32)[:, None]
    gate, up = _gate_up(rows, gate_up, group_sizes, interpret)
    dactive = _float32_product(dy, down, group_sizes, True, interpret)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    active = silu * up
    dweights = (active * dactive).sum(axis=1)
    dactive *= weights
    dgate = dactive * up * (sigmoid + silu * (1 - sigmoid))
    dhidden = jnp.concatenate([dgate, dactive * silu], axis=1).astype(dtype)
    dx = matmul.grouped_matmul(
        dhidden, gate_up, group_sizes, transpose_weights=False, interpret=interpret
    )
    dw_in = matmul.weight_gradient(
        dhidden, rows, group_sizes, interpret=interpret, out_dtype=gate_up.dtype
    )
    dw_out = matmul.weight_gradient(
        (active * weights).astype(dtype), dy, group_sizes, interpret=interpret, out_dtype=down.dtype
    )
    return dx, dw_in, dw_out, None, dweights.astype(row_weights.dtype)


_separate.defvjp(_separate_forward, _separate_backward)
