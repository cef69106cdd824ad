"""expert_ffn on Hopper GPUs: gate, up, activation, down and routing weight in one kernel.

Letters: E experts, M rows, D model width, F intermediate, W output width; F' is F rounded up to a
multiple of 64. hopper.py describes a block: one warpgroup copies into a ring, two multiply out of
it, and barriers synchronise them. grouped_matmul/mosaic_gpu.py describes float32, Blackwell and
older GPUs: float32, and experts with F above MAX_FUSED_F, use its grouped matmuls one after the
other; Blackwell uses cpu.py.

**Forward.** An expert does not fit in shared memory, but the intermediate of one tile does:
`active`, the activated intermediate of R rows, [R, F'] in the dtype of rows. It never reaches HBM.
An item is such a tile; its stages, in this order:

    copies                                       multiply
    1 for each chunk of 128 columns of F,        acc += x ring · (w ring)^T: 64 rows of gate and up
      for each 64 of D:                          after the chunk's last step:
      x ring ◀── x [R rows, 64]                    silu(gate) · up ──▶ active [.., the chunk]
      w ring ◀── gate [128, 64], up [128, 64]
    2 (does not wait: only the ring limits it)   R = 64: waits at `both` for the other warpgroup,
                                                 which computed the other columns of active
    3 for each tile of 128 columns of W,         acc += active [.., 64 of F] · w ring
      for each 64 of F:                          after the tile's last step:
      w ring ◀── down [64, 128]                    acc · routing weight ──▶ y, through the stage
    4                                            R = 64: waits at `both`, so that neither writes
                                                 active while the other still multiplies it

R is 128 if [128, F'] leaves room for the ring (F' up to 384), otherwise 64. The two warpgroups
split the rows of a tile of 128 (each computes, and then multiplies, 64 rows of active) and the
columns of a tile of 64 (each computes one of a chunk's two blocks, and one of the two of a tile of
W).

**Backward.** The forward pass stores nothing of size M x F. One kernel recomputes gate and up,
multiplies the cotangent with the down weights, and writes the gradients of gate and up, the
activated intermediate times the routing weight, and the gradient of the routing weight. Grouped
matmuls turn these into the gradients of gate_up and down. An item of the kernel is a tile of 128
rows, 64 per warpgroup. Its stages, for each block of 64 columns of F:

    copies                                       multiply
    1 for each 64 of D:                          acc  += x ring · (w ring)^T: gate and up
      x ring ◀── x [128 rows, 64]
      w ring ◀── gate [64, 64], up [64, 64]
    2 for each 64 of W:                          dacc += x ring · (w ring)^T: gradient of active,
      x ring ◀── dy [128 rows, 64]               before the routing weight
      w ring ◀── down [64, 64]
    3 (copies the next block)                    in registers: the three results of the block
                                                 ──▶ dhidden, dhidden, active, through the stage,
                                                 and dhidden ──▶ hidden [.., 2F'] in shared memory;
                                                 sums active · gradient over F for each row
    after the last block                         that sum, the routing weight's gradient
                                                 ──▶ dweights, through a separate stage
    4 for each tile of 128 columns of D,         acc += hidden [.., 64 of 2F'] · w ring
      for each 64 of gate, then of up:           after the tile's last step:
      w ring ◀── gate or up [64, 128]            acc ──▶ dx, the gradient of rows, through the stage

`hidden` and stage 4 exist only if [128, 2F'] leaves room for the ring (F' up to 192: keeps_hidden).
Otherwise a grouped matmul computes the gradient of rows from dhidden.

**Bytes.** With T tiles = sum over experts of ceil((rows + o) / R), o < 8 (see grouped_matmul), and
elements of two bytes, the copies read, in elements,

    forward:                T (ceil(F / 128) R D + 2 F' D + F' W)
    fused backward kernel:  T (F' / 64) (R (D + W) + 128 D + 64 W) + T 2 F' D,   here R = 128

(the last term for stage 4 only) and write M W and 3 M F'. HBM traffic is lower: one multiprocessor
reads a tile's rows repeatedly, and several read an expert's weights at the same time, so both come
from the L2 cache after the first read. The best case is

    forward:   M D + X + M W                             X = touched experts' 3 matrices
    backward:  M (3 D + 2 W) + 6 M F' + X + gradients        with stage 4
               M (3 D + 2 W) + 8 M F' + X + Y + gradients    without; Y = their gate and up

The forward pass thus reaches its lower bound. That of the backward pass is M (2 D + W) + X +
gradients. The difference is the price of weight gradients that do not fit in shared memory: other
kernels sum them, and read rows, cotangent and intermediates again.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.expert_ffn import cpu
from pallas_kernels.expert_ffn.window import of_window
from pallas_kernels.grouped_matmul import mosaic_gpu as matmul
from pallas_kernels.hopper import (
    ALL,
    STEP,
    TILE_ROWS,
    WARPGROUP_ROWS,
    Interpret,
    Ring,
    Scratch,
    padded,
)

# F and W are processed in blocks of 64 columns; a tile of W has several blocks.
BLOCK = 64
W_BLOCKS = 2
# Most shared memory for the activated intermediate of 128 rows; the ring has the rest.
_ACTIVE_BYTES = 96 * 1024
_RING_AND_ACTIVE_BYTES = 200 * 1024
# Most shared memory for the gradients of gate and up of 128 rows; the ring has the rest.
_HIDDEN_BYTES = 96 * 1024
MAX_FUSED_F = 896


def forward(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    first_expert: Array | int,
    interpret: Interpret,
) -> Array:
    """As api.expert_ffn. Weights of an expert without rows do not affect the result.

    Weights are cast to a two-byte dtype of rows. If they need a cast, or padding for TMA, the
    window is copied; otherwise they are read in place.

    Raises:
      NotImplementedError: a GPU older than Hopper.
    """
    if not hopper.uses_wgmma(interpret):
        return cpu.forward(rows, gate_up, down, group_sizes, row_weights, first_expert)
    if 0 in rows.shape or 0 in down.shape:
        return jnp.zeros((rows.shape[0], down.shape[2]), rows.dtype)
    if not _fuses(rows, down):
        own = of_window(gate_up, down, first_expert, len(group_sizes))
        return _separate(rows, *own, group_sizes, row_weights, interpret)
    x, w_in, w_out, weights, first = _prepare(
        rows, gate_up, down, group_sizes, row_weights, first_expert
    )
    y = _forward_kernel(x, w_in, w_out, group_sizes, weights, first, interpret)
    return y[: rows.shape[0], : down.shape[2]]


def backward(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    first_expert: Array | int,
    dy: Array,
    interpret: Interpret,
) -> tuple[Array, ...]:
    """Returns the gradients of rows, row_weights and the window's weights, in their dtypes.

    Those of an expert without rows are exactly 0.
    """
    if not hopper.uses_wgmma(interpret):
        return cpu.backward(rows, gate_up, down, group_sizes, row_weights, first_expert, dy)
    (m, d), (_, f, width), experts = rows.shape, down.shape, len(group_sizes)
    if 0 in rows.shape or 0 in down.shape:
        none = (jnp.zeros((experts, *w.shape[1:]), w.dtype) for w in (gate_up, down))
        return jnp.zeros_like(rows), jnp.zeros_like(row_weights), *none
    if not _fuses(rows, down):
        own = of_window(gate_up, down, first_expert, experts)
        return _separate_backward(rows, *own, group_sizes, row_weights, dy, interpret)
    x, w_in, w_out, weights, first = _prepare(
        rows, gate_up, down, group_sizes, row_weights, first_expert
    )
    dy = padded(dy)
    dhidden, active, dweights, *fused = _backward_kernel(
        x, w_in, w_out, dy, group_sizes, weights, first, interpret
    )
    if fused:
        (dx,) = fused
    else:
        by_half = w_in.reshape(-1, 2, *w_in.shape[1:])
        dx = matmul.product(dhidden, by_half, group_sizes, rows.dtype, False, interpret, first)
    dw_in = matmul.sum_of_products(dhidden, x, group_sizes, (2, f), gate_up.dtype, interpret)
    dw_out = matmul.sum_of_products(active, dy, group_sizes, (1, f), down.dtype, interpret)
    return (
        dx[:m, :d],
        dweights[:m, 0],
        dw_in[:, :, :f, :d].reshape(experts, 2 * f, d),
        dw_out[:, 0, :f, :width],
    )


def _fuses(rows: Array, down: Array) -> bool:
    return rows.dtype.itemsize == 2 and down.shape[1] <= MAX_FUSED_F


# --- in one kernel ------------------------------------------------------------------------------


def _prepare(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    first_expert: Array | int,
) -> tuple[Array, Array, Array, Array, Array | int]:
    """Returns the kernels' arrays, padded for TMA, and the first expert.

    [M, D] rows, [2N, F, D] gate and up, [N, F, W] down, float32 weights. Gate and up are separate
    matrices: TMA fills rows past F with zeros rather than with the other half's rows.
    """
    ready = gate_up.dtype == down.dtype == rows.dtype
    if not (ready and gate_up.shape[2] % STEP == 0 and down.shape[2] % STEP == 0):
        experts = len(group_sizes)
        gate_up, down = of_window(gate_up, down, first_expert, experts)
        first_expert = 0
    f = down.shape[1]
    halves = gate_up.astype(rows.dtype).reshape(-1, f, gate_up.shape[2])
    # A tile reads weights of all its rows, including those past the last.
    weights = jnp.pad(row_weights.astype(jnp.float32), (0, 8 + TILE_ROWS))
    w_out = padded(down.astype(rows.dtype))
    return padded(rows), padded(halves), w_out, weights, first_expert


def _row_weights(weights: Any, first: Array) -> Array:
    """float32 [64, BLOCK]: the weights of 64 rows from `first` on, repeated in every column."""
    column = plgpu.load(
        weights.at[pl.ds(first, WARPGROUP_ROWS)],
        layout=plgpu.Layout.WGMMA.reduce(1),
        optimized=False,
    )
    return lax.broadcast_in_dim(column, (WARPGROUP_ROWS, BLOCK), (0,))


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def _gate_and_up(
    refs: "_ForwardRefs | _BackwardRefs", expert: Array, first: Array, blocks: int, depth: Any
) -> list[tuple[Any, Any, Any]]:
    """Copies of the gate rows of some blocks, from `first` on, then of the up rows."""
    rows = blocks * BLOCK
    some_f = pl.ds(first, rows)
    return [
        (refs.w_in.at[2 * expert + half, some_f, depth], refs.w_ring, pl.ds(half * rows, rows))
        for half in range(2)
    ]


def _gate_up_block(values: Array, block: int) -> tuple[Array, Array]:
    """Gate and up of a block of a chunk, whose columns are all of gate, then all of up."""
    at, up = block * BLOCK, values.shape[1] // 2
    return values[:, at : at + BLOCK], values[:, up + at : up + at + BLOCK]


# --- forward ------------------------------------------------------------------------------------


def tile_rows(f: int) -> int:
    """Returns the rows of a tile of the forward kernel."""
    whole = TILE_ROWS * -(-f // BLOCK) * BLOCK * 2 <= _ACTIVE_BYTES
    return TILE_ROWS if whole else WARPGROUP_ROWS


def _forward_kernel(
    x: Array,
    w_in: Array,
    w_out: Array,
    group_sizes: Array,
    weights: Array,
    first_expert: Array | int,
    interpret: Interpret,
) -> Array:
    (m, d), (_, f, width), dtype = x.shape, w_out.shape, x.dtype
    tile, f_blocks = tile_rows(f), -(-f // BLOCK)
    split = tile == WARPGROUP_ROWS
    if split:
        f_blocks += f_blocks % 2  # each chunk of two has one for each warpgroup
    plan = _Forward(tile, split, f_blocks, d // STEP, -(-width // (W_BLOCKS * BLOCK)), width)
    slot_bytes = (tile + 4 * BLOCK) * STEP * 2
    slots = min(6, (_RING_AND_ACTIVE_BYTES - tile * f_blocks * BLOCK * 2) // slot_bytes)
    table, count = hopper.work(group_sizes, m, tile, first_expert)
    active = plgpu.SMEM((tile, f_blocks * BLOCK), dtype, transforms=hopper.swizzled(dtype))
    x_shape, w_shape = (tile, STEP), (4 * BLOCK, STEP)
    return hopper.run(
        "expert_ffn",
        lambda *refs, **scratch: _forward_block(plan, _ForwardRefs(*refs, **scratch)),
        (table, count, x, w_in, w_out, weights),
        jax.ShapeDtypeStruct((m, width), dtype),
        {"active": active, "both": plgpu.Barrier(num_arrivals=2)}
        | hopper.ring_scratch(slots, dtype, arrivals=3, x_ring=x_shape, w_ring=w_shape)
        | hopper.stage_scratch(dtype),
        interpret,
    )


@dataclasses.dataclass(frozen=True)
class _Forward:
    """Compile-time partition of the forward kernel."""

    tile: int  # rows
    split: bool  # the warpgroups split the columns of a tile instead of its rows
    f_blocks: int  # blocks of F, two a chunk
    d_steps: int  # steps of D
    w_tiles: int  # tiles of W
    width: int  # W, padded


@dataclasses.dataclass(frozen=True)
class _ForwardRefs(Scratch):
    table: Any  # of hopper.work
    count: Any
    x: Any  # [M, D]
    w_in: Any  # [2E, F, D]
    w_out: Any  # [E, F, W]
    weights: Any  # float32 [M and more]
    y: Any  # [M, W]
    _: dataclasses.KW_ONLY
    w_ring: Any
    active: Any  # [tile, F']
    both: Any  # barrier of both warpgroups

    @property
    def ring(self) -> Ring:
        """Slots of x, [tile, STEP], and of gate then up, or of down, [4 BLOCK, STEP]."""
        return Ring(self.x_ring, self.w_ring, self.filled, self.freed)


@dataclasses.dataclass(frozen=True)
class _Half:
    """A warpgroup's part of the forward kernel's tiles: 64 rows, of all columns or of half."""

    warpgroup: Array
    offset: Array | int  # its first row

    @property
    def rows(self) -> Any:
        """The rows within the tile."""
        return pl.ds(self.offset, WARPGROUP_ROWS)


def _forward_block(plan: _Forward, refs: _ForwardRefs) -> None:
    def multiply(warpgroup: Array) -> Any:
        half = _Half(warpgroup, 0 if plan.split else warpgroup * WARPGROUP_ROWS)
        return functools.partial(_multiply_forward, plan, refs, half)

    copy = functools.partial(_copy_forward, plan, refs)
    hopper.by_warpgroup(lambda: refs.count[0], copy, multiply)


def _chunks(f_blocks: int, chunk: Any, carry: Any) -> Any:
    """Calls chunk(number, blocks, carry) for two blocks of F at a time; the last may be alone."""
    carry = lax.fori_loop(0, f_blocks // 2, lambda c, carry: chunk(c, 2, carry), carry)
    # Dynamic, as the last blocks may reach past F.
    return chunk(jnp.int32(f_blocks // 2), 1, carry) if f_blocks % 2 else carry


def _copy_forward(plan: _Forward, refs: _ForwardRefs, index: Array, step: Array) -> Array:
    """Copies an item's x, gate and up, chunk by chunk, then its down."""
    expert = refs.table[0, index]
    rows = pl.ds(hopper.first_row(refs.table, index), plan.tile)

    def hidden(chunk: Array, blocks: int, step: Array) -> Array:
        def copies(i: Array) -> list[tuple[Any, Any, Any]]:
            depth = pl.ds(i * STEP, STEP)
            of_x = (refs.x.at[rows, depth], refs.x_ring, ALL)
            return [of_x, *_gate_and_up(refs, expert, chunk * (2 * BLOCK), blocks, depth)]

        return hopper.fill(refs.ring, step, plan.d_steps, copies)

    def down(i: Array) -> list[tuple[Any, Any, Any]]:
        depth = pl.ds(lax.rem(i, jnp.int32(plan.f_blocks)) * BLOCK, BLOCK)
        column = lax.div(i, jnp.int32(plan.f_blocks)) * (W_BLOCKS * BLOCK)
        return [
            (
                refs.w_out.at[expert, depth, pl.ds(column + b * BLOCK, BLOCK)],
                refs.w_ring,
                pl.ds(b * BLOCK, BLOCK),
            )
            for b in range(W_BLOCKS)
        ]

    step = _chunks(plan.f_blocks, hidden, step)
    # A slot is full after three arrivals; here there is no copy of x.
    return hopper.fill(refs.ring, step, plan.f_blocks * plan.w_tiles, down, missing=1)


def _multiply_forward(
    plan: _Forward, refs: _ForwardRefs, half: _Half, index: Array, step: Array
) -> Array:
    step = _chunks(plan.f_blocks, functools.partial(_activate, plan, refs, half), step)
    plgpu.commit_smem()
    _sync(plan, refs)  # the other warpgroup computed the other half of the columns

    first = hopper.first_row(refs.table, index) + half.offset
    own = hopper.own_rows(refs.table, index, half.offset)
    scale = _row_weights(refs.weights, first)

    def tile(w_tile: Array, step: Array) -> Array:
        blocks = W_BLOCKS // 2 if plan.split else W_BLOCKS
        first_block = half.warpgroup * blocks if plan.split else 0
        active = refs.active.at[half.rows]
        sums = _times_weights(refs, active, first_block, blocks, step, plan.f_blocks)
        for b, values in enumerate(sums):
            column = (w_tile * W_BLOCKS + first_block + b) * BLOCK

            @pl.when(column < plan.width)
            def _store(values: Array = values, column: Array = column) -> None:
                target = hopper.window(refs.y, first, column)
                hopper.store_rows(values * scale, refs.stage, half.warpgroup, own, target)

        return step + plan.f_blocks

    step = lax.fori_loop(0, plan.w_tiles, tile, step)
    _sync(plan, refs)  # active must not be overwritten while the other still multiplies it
    return step


def _activate(
    plan: _Forward, refs: _ForwardRefs, half: _Half, chunk: Array, blocks: int, step: Array
) -> Array:
    """Writes silu(gate) * up of one or two blocks of F to active; returns the next step."""
    # Ring: gate, then up. Split by rows, a warpgroup takes both; by columns, one block of each.
    columns, starts = 2 * blocks * BLOCK, cast(list[Array | int], [0])
    if plan.split:
        columns, starts = BLOCK, [half.warpgroup * BLOCK, (half.warpgroup + 2) * BLOCK]

    def accumulate(*accs: Any) -> None:
        def multiply(i: Array, slot: Array) -> None:
            for acc, start in zip(accs, starts, strict=True):
                w_tile = refs.w_ring.at[slot].at[pl.ds(start, columns)]
                x_tile = refs.x_ring.at[slot].at[half.rows]
                plgpu.wgmma(acc, x_tile, w_tile.transpose((1, 0)))

        hopper.drain(refs.ring, step, plan.d_steps, multiply, products=len(starts))

    values = hopper.sums(accumulate, *[columns] * len(starts))
    for b in range(1 if plan.split else blocks):
        gate, up = values if plan.split else _gate_up_block(values[0], b)
        column = (2 * chunk + (half.warpgroup if plan.split else b)) * BLOCK
        result = gate * _sigmoid(gate) * up
        refs.active[half.rows, pl.ds(column, BLOCK)] = result.astype(refs.active.dtype)
    return step + plan.d_steps


def _times_weights(
    refs: "_ForwardRefs | _BackwardRefs",
    left: Any,
    first: Array | int,
    blocks: int,
    step: Array,
    steps: int,
) -> list[Array]:
    """left [64, 64 steps] times weights in the ring, [64, BLOCK] for each of `blocks` blocks.

    Step i multiplies 64 columns of left with the blocks from `first` on of its slot.
    """

    def accumulate(*accs: Any) -> None:
        def multiply(i: Array, slot: Array) -> None:
            for b, acc in enumerate(accs):
                block = pl.ds((first + b) * BLOCK, BLOCK)
                columns = left.at[:, pl.ds(i * BLOCK, BLOCK)]
                plgpu.wgmma(acc, columns, refs.w_ring.at[slot].at[block])

        hopper.drain(refs.ring, step, steps, multiply, products=blocks)

    return hopper.sums(accumulate, *[BLOCK] * blocks)


def _sync(plan: _Forward, refs: _ForwardRefs) -> None:
    """Waits for the other warpgroup if both compute columns of the same rows."""
    if plan.split:
        plgpu.barrier_arrive(refs.both)
        plgpu.barrier_wait(refs.both)


# --- backward -----------------------------------------------------------------------------------


def keeps_hidden(f: int) -> bool:
    """True if the backward kernel computes the rows' gradient: one tile's dhidden fits."""
    return TILE_ROWS * 2 * -(-f // BLOCK) * BLOCK * 2 <= _HIDDEN_BYTES


def _backward_kernel(
    x: Array,
    w_in: Array,
    w_out: Array,
    dy: Array,
    group_sizes: Array,
    weights: Array,
    first_expert: Array | int,
    interpret: Interpret,
) -> list[Array]:
    """Returns [M, 2F'] gradients of gate and up, [M, F'] weighted active, float32 [M, 8] dweight.

    Columns past F are zero. All eight columns of dweight are equal: TMA writes no fewer bytes.
    If keeps_hidden(F), the gradient of x is the fourth result.
    """
    (m, d), (_, f, width), dtype = x.shape, w_out.shape, x.dtype
    plan = _Backward(
        f_blocks=-(-f // BLOCK),
        d_steps=d // STEP,
        w_steps=width // STEP,
        d_tiles=-(-d // (W_BLOCKS * BLOCK)) if keeps_hidden(f) else 0,
        width=d,
    )
    ring_bytes, fused = hopper.RING_BYTES, {}
    if plan.d_tiles:
        shape = (TILE_ROWS, 2 * plan.f_padded)
        fused = {"hidden": plgpu.SMEM(shape, dtype, transforms=hopper.swizzled(dtype))}
        ring_bytes -= _HIDDEN_BYTES
    slots = ring_bytes // ((TILE_ROWS + 2 * BLOCK) * STEP * 2)
    table, count = hopper.work(group_sizes, m, TILE_ROWS, first_expert)
    x_shape, w_shape = (TILE_ROWS, STEP), (2 * BLOCK, STEP)
    return hopper.run(
        "expert_ffn_backward",
        lambda *refs, **scratch: _backward_block(plan, _BackwardRefs(*refs, **scratch)),
        (table, count, x, w_in, w_out, dy, weights),
        [
            jax.ShapeDtypeStruct((m, 2 * plan.f_padded), dtype),
            jax.ShapeDtypeStruct((m, plan.f_padded), dtype),
            jax.ShapeDtypeStruct((m, 8), jnp.float32),
            *[jax.ShapeDtypeStruct((m, d), dtype)] * bool(fused),
        ],
        fused
        | {"stage_dweights": plgpu.SMEM((2, WARPGROUP_ROWS, 8), jnp.float32)}
        | hopper.ring_scratch(slots, dtype, arrivals=3, x_ring=x_shape, w_ring=w_shape)
        | hopper.stage_scratch(dtype),
        interpret,
    )


@dataclasses.dataclass(frozen=True)
class _Backward:
    """Compile-time partition of the backward kernel."""

    f_blocks: int  # blocks of F
    d_steps: int  # steps of D
    w_steps: int  # steps of W
    d_tiles: int  # tiles of the gradient of x, of two blocks of D; 0: not computed
    width: int  # D, padded

    @property
    def f_padded(self) -> int:
        """F'."""
        return self.f_blocks * BLOCK

    @property
    def block_steps(self) -> int:
        """Steps of a block of F."""
        return self.d_steps + self.w_steps


@dataclasses.dataclass(frozen=True)
class _BackwardRefs(Scratch):
    table: Any  # of hopper.work
    count: Any
    x: Any  # [M, D]
    w_in: Any  # [2E, F, D]
    w_out: Any  # [E, F, W]
    dy: Any  # [M, W]
    weights: Any  # float32 [M and more]
    dhidden: Any  # [M, 2F']
    active: Any  # [M, F']
    dweights: Any  # float32 [M, 8]
    dx: Any = None  # [M, D]
    _: dataclasses.KW_ONLY
    w_ring: Any
    stage_dweights: Any  # float32 [2 warpgroups, 64, 8]
    hidden: Any = None  # [128, 2F'], dhidden of a tile

    @property
    def ring(self) -> Ring:
        """Slots of x or dy, [128, STEP], and of gate then up, or of down, [2 BLOCK, STEP]."""
        return Ring(self.x_ring, self.w_ring, self.filled, self.freed)


def _backward_block(plan: _Backward, refs: _BackwardRefs) -> None:
    def multiply(warpgroup: Array) -> Any:
        offset = warpgroup * WARPGROUP_ROWS
        return functools.partial(_multiply_backward, plan, refs, warpgroup, offset)

    copy = functools.partial(_copy_backward, plan, refs)
    hopper.by_warpgroup(lambda: refs.count[0], copy, multiply)


def _copy_backward(plan: _Backward, refs: _BackwardRefs, index: Array, step: Array) -> Array:
    """Copies, for each block of F, x, gate and up, then dy and down."""
    expert = refs.table[0, index]
    rows = pl.ds(hopper.first_row(refs.table, index), TILE_ROWS)

    def block(number: Array, step: Array) -> Array:
        column = number * BLOCK

        def hidden(i: Array) -> list[tuple[Any, Any, Any]]:
            depth = pl.ds(i * STEP, STEP)
            of_x = (refs.x.at[rows, depth], refs.x_ring, ALL)
            return [of_x, *_gate_and_up(refs, expert, column, 1, depth)]

        def cotangent(i: Array) -> list[tuple[Any, Any, Any]]:
            depth, half = pl.ds(i * STEP, STEP), BLOCK // 2
            copies: list[tuple[Any, Any, Any]] = [(refs.dy.at[rows, depth], refs.x_ring, ALL)]
            for f in (0, half):  # two copies: as many arrivals as for gate and up
                source = refs.w_out.at[expert, pl.ds(column + f, half), depth]
                copies.append((source, refs.w_ring, pl.ds(f, half)))
            return copies

        step = hopper.fill(refs.ring, step, plan.d_steps, hidden)
        return hopper.fill(refs.ring, step, plan.w_steps, cotangent)

    def rows_gradient(tile: Array, step: Array) -> Array:
        for half in range(2):

            def copies(i: Array, half: int = half) -> list[tuple[Any, Any, Any]]:
                some_f, column = pl.ds(i * BLOCK, BLOCK), tile * (W_BLOCKS * BLOCK)
                return [
                    (
                        refs.w_in.at[2 * expert + half, some_f, pl.ds(column + b * BLOCK, BLOCK)],
                        refs.w_ring,
                        pl.ds(b * BLOCK, BLOCK),
                    )
                    for b in range(W_BLOCKS)
                ]

            # There is no copy of x.
            step = hopper.fill(refs.ring, step, plan.f_blocks, copies, missing=1)
        return step

    step = lax.fori_loop(0, plan.f_blocks, block, step)
    return lax.fori_loop(0, plan.d_tiles, rows_gradient, step)


def _multiply_backward(
    plan: _Backward,
    refs: _BackwardRefs,
    warpgroup: Array,
    offset: Array,
    index: Array,
    step: Array,
) -> Array:
    """Computes the results of an item's 64 rows from row `offset` on."""
    first = hopper.first_row(refs.table, index) + offset
    own = hopper.own_rows(refs.table, index, offset)

    # Two blocks at a time, as in the forward pass, would overflow the registers.
    def block(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        step, dweight = carry
        hidden, dactive = _products(plan, refs, offset, step)
        gate, up = _gate_up_block(hidden, 0)
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        active = silu * up
        dweight += (active * dactive).sum(axis=1)
        scale = _row_weights(refs.weights, first)
        dactive *= scale
        dgate = dactive * up * (sigmoid + silu * (1.0 - sigmoid))
        column = number * BLOCK
        # Narrowed before the first store: three float32 results overflow the registers.
        results = [
            (refs.dhidden, column, dgate.astype(refs.dhidden.dtype)),
            (refs.dhidden, column + plan.f_padded, (dactive * silu).astype(refs.dhidden.dtype)),
            (refs.active, column, (active * scale).astype(refs.active.dtype)),
        ]
        if plan.d_tiles:
            for _, at, result in results[:2]:
                refs.hidden[pl.ds(offset, WARPGROUP_ROWS), pl.ds(at, BLOCK)] = result
        for out, at, result in results:
            target = hopper.window(out, first, at)
            hopper.store_rows(result, refs.stage, warpgroup, own, target)
        return step + plan.block_steps, dweight

    zeros = jnp.zeros((WARPGROUP_ROWS,), jnp.float32)
    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA.reduce(1))
    step, dweight = lax.fori_loop(0, plan.f_blocks, block, (step, zeros))
    hopper.store_partial(
        lax.broadcast_in_dim(dweight, (WARPGROUP_ROWS, 8), (0,)),
        refs.stage_dweights,
        warpgroup,
        own,
        lambda row, rows, _, __: refs.dweights.at[pl.ds(first + row, rows)],
    )
    if plan.d_tiles:
        plgpu.commit_smem()
        step = _multiply_rows_gradient(plan, refs, warpgroup, offset, (first, own), step)
    return step


def _multiply_rows_gradient(
    plan: _Backward,
    refs: _BackwardRefs,
    warpgroup: Array,
    offset: Array,
    place: tuple[Array, tuple[Array, Array]],
    step: Array,
) -> Array:
    """Multiplies 64 rows of `hidden` with gate and up, and stores the gradient of x."""
    (first, own), steps = place, 2 * plan.f_blocks
    hidden = refs.hidden.at[pl.ds(offset, WARPGROUP_ROWS)]

    def tile(d_tile: Array, step: Array) -> Array:
        for b, values in enumerate(_times_weights(refs, hidden, 0, W_BLOCKS, step, steps)):
            column = (d_tile * W_BLOCKS + b) * BLOCK

            @pl.when(column < plan.width)
            def _store(values: Array = values, column: Array = column) -> None:
                target = hopper.window(refs.dx, first, column)
                hopper.store_rows(values, refs.stage, warpgroup, own, target)

        return step + steps

    return lax.fori_loop(0, plan.d_tiles, tile, step)


def _products(
    plan: _Backward, refs: _BackwardRefs, offset: Array, step: Array
) -> tuple[Array, Array]:
    """For 64 rows and a block of F: gate, then up [64, 2 BLOCK], and the gradient of active."""

    def accumulate(acc: Any, dacc: Any) -> None:
        def multiply(into: Any, columns: int) -> Any:
            def product(i: Array, slot: Array) -> None:
                w_tile = refs.w_ring.at[slot].at[pl.ds(0, columns)].transpose((1, 0))
                x_tile = refs.x_ring.at[slot].at[pl.ds(offset, WARPGROUP_ROWS)]
                plgpu.wgmma(into, x_tile, w_tile)

            return product

        hopper.drain(refs.ring, step, plan.d_steps, multiply(acc, 2 * BLOCK))
        hopper.drain(refs.ring, step + plan.d_steps, plan.w_steps, multiply(dacc, BLOCK))

    hidden, dactive = hopper.sums(accumulate, 2 * BLOCK, BLOCK)
    return hidden, dactive


# --- one grouped matmul after the other ---------------------------------------------------------


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


def _separate_backward(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    dy: Array,
    interpret: Interpret,
) -> tuple[Array, ...]:
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
    return dx, dweights, dw_in, dw_out
