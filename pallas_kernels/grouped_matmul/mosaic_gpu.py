"""grouped_matmul on Hopper GPUs: TMA, wgmma, persistent blocks of three warpgroups.

Letters: E experts, M rows, K contracted width, N output width, S sections: a product may contract
several blocks of K, each with a weight matrix of its own, and sum them. hopper.py says how a block
works: one warpgroup copies into a ring, two multiply out of it, who waits for whom, what a tile is.

**grouped_matmul** (`product`). An item is a tile of the output: 128 rows of one expert, `columns`
columns. Neighbouring blocks take the column tiles of the same rows, which then come from L2.

    copies, step i of S K / 64            multiplies, warpgroup g of 0 and 1
    x ring ◀── x [128 rows, 64 of K]      acc [64, columns] += x ring [rows 64 g …, 64] W ring
    W ring ◀── W of the expert and        after the last step: the expert's own rows of acc
               section, [64, columns]     ──▶ out, through the stage; rows of others are not
               or its transpose           written

**weight_gradient** (`sum_of_products`). An item is a tile of one expert's gradient, 128 rows of K
and `columns` of N; its steps are the expert's rows, 64 at a time.

    copies, step i of ceil((rows + o) / 64)     multiplies, warpgroup g of 0 and 1
    x ring  ◀── x  [64 rows, 128 of K]          only where the step reaches into rows of others:
    dy ring ◀── dy [64 rows, columns]             zeroes them in its own half of x and in every
                                                  other 64 columns of dy, arrives at `masked` and
                                                  waits there for the other warpgroup
                                                acc [64, columns] += x ring [:, 64 g …]^T dy ring
                                                after the last step: acc ──▶ out, through the stage

An expert without rows has no steps: its accumulator's zeros are stored.

**Bytes.** With tiles of R rows and C columns, and V = sum over experts of ceil((rows + o) / R), o
(less than 8) the rows of others that come before an expert's first, the copies of grouped_matmul
bring in

    V ceil(N / C) K (R + C) elements   and write   M N,

against M K + (touched experts) K N + M N, which is what HBM carries as long as the tiles of one
expert that run side by side find each other's operands in the L2 cache. weight_gradient brings in
ceil(K / R) ceil(N / C) B (R + C) with B = 64 sum ceil((rows + o) / 64) rows, and writes E K N.

**Precision.** bfloat16 and float16 are multiplied as they are and summed in float32. A float32
operand is split into three bfloat16 parts that hold it exactly, and the six products of parts that
exceed its rounding error are summed in float32: float32 accuracy at six times the work (three where
the other operand is bfloat16). TensorFloat-32, with its ten fraction bits, is never used. The split
arrays live in HBM: this path is for checks, not for speed. An infinity becomes NaN in it.

**Other GPUs.** wgmma exists on compute capability 9 alone. On Blackwell the plain-JAX loop of
cpu.py runs: correct, dropless, work proportional to the rows, one block of rows at a time and so
far from fast. Older GPUs raise NotImplementedError.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul import cpu
from pallas_kernels.hopper import (
    ALL,
    RING_BYTES,
    STEP,
    TILE_ROWS,
    WARPGROUP_ROWS,
    Interpret,
    Ring,
    Scratch,
    padded,
)

_COLUMNS = (256, 192, 128, 64)
_MAX_SLOTS = 6


def parts(x: Array) -> list[Array]:
    """x as a sum: a two-byte type is itself, float32 three bfloat16 arrays, the largest first."""
    if x.dtype.itemsize == 2:
        return [x]
    split, rest = [], x.astype(jnp.float32)
    for _ in range(3):
        # A conversion there and back may be optimised away; reduce_precision may not.
        part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        split.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return split


def _pairs(left: Sequence[Array], right: Sequence[Array]) -> list[tuple[Array, Array]]:
    """Products of parts above float32's rounding error, the largest first."""
    order = sorted((i + j, i, j) for i in range(len(left)) for j in range(len(right)))
    return [(left[i], right[j]) for rank, i, j in order if rank < 3]


def tile_columns(width: int) -> int:
    """Columns of a tile of an output so wide."""
    # Each further tile reads its rows again, which costs about what 32 columns do.
    return min(_COLUMNS, key=lambda columns: -(-width // columns) * (columns + 32))


def _slots(columns: int) -> int:
    return min(_MAX_SLOTS, RING_BYTES // ((TILE_ROWS + columns) * STEP * 2))


def _up(size: int, multiple: int) -> int:
    return size + -size % multiple


def grouped_matmul(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    *,
    transpose_weights: bool,
    interpret: Interpret,
    out_dtype: DTypeLike | None = None,
) -> Array:
    """Row m of expert e: x_m W_e, or x_m W_e^T with transpose_weights.

    Args:
      rows: [M, K], sorted by expert; bfloat16, float16 or float32.
      weights: [E, K, N], or [E, N, K] with transpose_weights; cast to a two-byte dtype of rows.
      group_sizes: int32 [E], rows of each expert; they sum to M.
      transpose_weights: which of its two last axes `weights` contracts.
      interpret: run interpreted on any platform; True or parameters of the interpreter.
      out_dtype: of the result, by default the dtype of rows; float32 or a two-byte dtype.

    Returns:
      [M, N] in out_dtype, accumulated in float32.

    Raises:
      NotImplementedError: a GPU older than Hopper.
    """
    if not hopper.uses_wgmma(interpret):
        y = cpu.grouped_matmul(rows, weights, group_sizes, transpose_weights=transpose_weights)
        return y.astype(out_dtype or rows.dtype)
    out_dtype = out_dtype or rows.dtype
    n = weights.shape[1 if transpose_weights else 2]
    if 0 in rows.shape or n == 0:
        return jnp.zeros((rows.shape[0], n), out_dtype)
    if rows.dtype.itemsize == 2:
        weights = weights.astype(rows.dtype)
    pairs = _pairs(parts(rows), parts(weights))
    left = jnp.concatenate([padded(x) for x, _ in pairs], axis=1)
    right = jnp.stack([w for _, w in pairs], axis=1)
    return product(left, right, group_sizes, out_dtype, transpose_weights, interpret)[
        : rows.shape[0], :n
    ]


def product(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    out_dtype: DTypeLike,
    transpose_weights: bool,
    interpret: Interpret,
    first_expert: Array | int = 0,
) -> Array:
    """The kernel behind grouped_matmul: a sum over S sections of K.

    Args:
      rows: [M, S K'], K' the multiple of 64 at or above K; bfloat16 or float16. What is between
        K and K' of a section meets zeros, and must be finite.
      weights: [E or more, S, K, N], or [.., S, N, K] with transpose_weights; the dtype of rows.
      group_sizes: int32 [E], which sum to M or (M padded) less.
      out_dtype: of the result.
      transpose_weights: which of its two last axes `weights` contracts.
      interpret: as in grouped_matmul.
      first_expert: that of the first group, of more than there are groups.

    Returns:
      [M, N], both padded to multiples of 8 and 64; what belongs to no expert is undefined.
    """
    n, dtype = weights.shape[2 if transpose_weights else 3], rows.dtype
    sections, columns = weights.shape[1], tile_columns(n)
    rows, weights = padded(rows), padded(weights).reshape(-1, *padded(weights).shape[2:])
    m = rows.shape[0]
    plan = _Product(
        transpose=transpose_weights,
        columns=columns,
        n_tiles=-(-n // columns),
        sections=sections,
        section_steps=rows.shape[1] // (sections * STEP),
    )
    table, count = hopper.work(group_sizes, m, TILE_ROWS, first_expert)
    w_shape = (columns, STEP) if transpose_weights else (STEP, columns)
    return hopper.run(
        "grouped_matmul",
        lambda *refs, **scratch: _product_block(plan, _ProductRefs(*refs, **scratch)),
        (table, count, rows, weights),
        jax.ShapeDtypeStruct((m, _up(n, STEP)), out_dtype),
        hopper.ring_scratch(_slots(columns), dtype, x_ring=(TILE_ROWS, STEP), w_ring=w_shape)
        | hopper.stage_scratch(out_dtype),
        interpret,
    )


@dataclasses.dataclass(frozen=True)
class _Product:
    """The partition of a product, in numbers known when it is compiled."""

    transpose: bool  # weights are [.., N, K]
    columns: int  # of a tile
    n_tiles: int  # tiles side by side
    sections: int
    section_steps: int  # steps of K in a section

    @property
    def steps(self) -> int:
        """Steps of an item."""
        return self.sections * self.section_steps

    def item(self, index: Array) -> tuple[Array, Array]:
        """Its tile of rows, and its first column."""
        tile = lax.div(index, jnp.int32(self.n_tiles))
        return tile, lax.rem(index, jnp.int32(self.n_tiles)) * self.columns


@dataclasses.dataclass(frozen=True)
class _ProductRefs(Scratch):
    """The references that a block of `product` reads, writes and works in."""

    table: Any  # of hopper.work
    count: Any
    x: Any  # [M, S K']
    w: Any  # [E S, K, N], or [E S, N, K]
    out: Any  # [M, N]
    w_ring: Any = dataclasses.field(kw_only=True)

    @property
    def ring(self) -> Ring:
        """Slots of [128, STEP] of x and of [STEP, columns] of w, or its transpose."""
        return Ring(self.x_ring, self.w_ring, self.filled, self.freed)


def _product_block(plan: _Product, refs: _ProductRefs) -> None:
    def multiply(warpgroup: Array) -> Any:
        offset = warpgroup * WARPGROUP_ROWS
        return functools.partial(_multiply_product, plan, refs, warpgroup, offset)

    copy = functools.partial(_copy_product, plan, refs)
    hopper.by_warpgroup(lambda: refs.count[0] * plan.n_tiles, copy, multiply)


def _copy_product(plan: _Product, refs: _ProductRefs, index: Array, step: Array) -> Array:
    """Copies an item's x and w."""
    tile, column = plan.item(index)
    expert, rows = refs.table[0, tile], pl.ds(hopper.first_row(refs.table, tile), TILE_ROWS)
    across = pl.ds(column, plan.columns)

    def copies(i: Array) -> list[tuple[Any, Any, Any]]:
        section = expert * plan.sections + lax.div(i, jnp.int32(plan.section_steps))
        depth = pl.ds(lax.rem(i, jnp.int32(plan.section_steps)) * STEP, STEP)
        w_tile = (section, across, depth) if plan.transpose else (section, depth, across)
        x_tile = refs.x.at[rows, pl.ds(i * STEP, STEP)]
        return [(x_tile, refs.x_ring, ALL), (refs.w.at[w_tile], refs.w_ring, ALL)]

    return hopper.fill(refs.ring, step, plan.steps, copies)


def _multiply_product(
    plan: _Product, refs: _ProductRefs, warpgroup: Array, offset: Array, index: Array, step: Array
) -> Array:
    """Multiplies and stores the 64 rows of an item from its row `offset` on."""
    tile, column = plan.item(index)

    def accumulate(acc: Any) -> None:
        def multiply(i: Array, slot: Array) -> None:
            x_tile = refs.x_ring.at[slot].at[pl.ds(offset, WARPGROUP_ROWS)]
            w_tile = refs.w_ring.at[slot]
            plgpu.wgmma(acc, x_tile, w_tile.transpose((1, 0)) if plan.transpose else w_tile)

        hopper.drain(refs.ring, step, plan.steps, multiply)

    first = hopper.first_row(refs.table, tile) + offset
    (values,) = hopper.sums(accumulate, plan.columns)
    own = hopper.own_rows(refs.table, tile, offset)
    target = hopper.window(refs.out, first, column)
    hopper.store_rows(values, refs.stage, warpgroup, own, target)
    return step + plan.steps


def weight_gradient(
    rows: Array,
    cotangent: Array,
    group_sizes: Array,
    *,
    interpret: Interpret,
    out_dtype: DTypeLike,
) -> Array:
    """The sum over rows m of expert e of x_m^T dy_m; exact zeros for an expert without rows.

    Args:
      rows: [M, K], sorted by expert; bfloat16, float16 or float32.
      cotangent: [M, N]; of the same dtypes.
      group_sizes: int32 [E], rows of each expert; they sum to M.
      interpret: as in grouped_matmul.
      out_dtype: of the result.

    Returns:
      [E, K, N] in out_dtype, accumulated in float32.

    Raises:
      NotImplementedError: a GPU older than Hopper.
    """
    if not hopper.uses_wgmma(interpret):
        return cpu.weight_gradient(rows, cotangent, group_sizes, out_dtype=out_dtype)
    k, n = rows.shape[1], cotangent.shape[1]
    if rows.shape[0] == 0 or 0 in (k, n):
        return jnp.zeros((group_sizes.shape[0], k, n), out_dtype)
    if rows.dtype != cotangent.dtype:
        rows, cotangent = rows.astype(jnp.float32), cotangent.astype(jnp.float32)
    pairs = _pairs(parts(rows), parts(cotangent))
    exact = out_dtype if len(pairs) == 1 else jnp.float32
    out = sum(
        sum_of_products(x, dy, group_sizes, (1, k), exact, interpret)[:, 0, :k, :n]
        for x, dy in pairs
    )
    return jnp.asarray(out, out_dtype)


def sum_of_products(
    rows: Array,
    cotangent: Array,
    group_sizes: Array,
    sections: tuple[int, int],
    out_dtype: DTypeLike,
    interpret: Interpret,
) -> Array:
    """The kernel behind weight_gradient, for rows in S sections.

    Args:
      rows: [M, S K'], K' the multiple of 64 at or above K; bfloat16 or float16. What is between
        K and K' of a section is left out.
      cotangent: [M, N], the dtype of rows.
      group_sizes: int32 [E], which sum to M or (M padded) less.
      sections: S and K.
      out_dtype: of the result.
      interpret: as in grouped_matmul.

    Returns:
      [E, S, K, N], the last two axes padded to multiples of 8 and 64 with what is undefined.
    """
    experts, n, n_out = group_sizes.shape[0], cotangent.shape[1], _up(cotangent.shape[1], STEP)
    rows, cotangent = padded(rows), padded(cotangent)
    count, depth = sections[0], _up(sections[1], 8)
    columns = tile_columns(n)
    plan = _Gradient(
        columns=columns,
        experts=experts,
        k_tiles=-(-rows.shape[1] // TILE_ROWS),
        n_tiles=-(-n // columns),
        sections=count,
        section_blocks=rows.shape[1] // (count * WARPGROUP_ROWS),
    )
    x_shape, dy_shape = (STEP, TILE_ROWS), (STEP, columns)
    out = hopper.run(
        "weight_gradient",
        lambda *refs, **scratch: _gradient_block(plan, _GradientRefs(*refs, **scratch)),
        (_rows_of_experts(group_sizes), rows, cotangent),
        jax.ShapeDtypeStruct((experts * count, depth, n_out), out_dtype),
        hopper.ring_scratch(_slots(columns), rows.dtype, x_ring=x_shape, dy_ring=dy_shape)
        | {"masked": plgpu.Barrier(num_arrivals=2)}
        | hopper.stage_scratch(out_dtype),
        interpret,
    )
    return out.reshape(experts, count, depth, n_out)


def _rows_of_experts(group_sizes: Array) -> Array:
    """Of each expert, int32 [4, E]: its first row to read, a multiple of 8, and its steps; its own
    rows, counted from that: from, up to.
    """
    sizes = group_sizes.astype(jnp.int32)
    stop = jnp.cumsum(sizes, dtype=jnp.int32)
    first = (stop - sizes) // 8 * 8
    steps = jnp.where(sizes > 0, (stop - first + STEP - 1) // STEP, 0)
    return jnp.stack([first, steps, stop - sizes - first, stop - first])


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """The partition of a weight gradient, in numbers known when it is compiled."""

    columns: int  # of a tile
    experts: int
    k_tiles: int  # tiles of an expert, of 128 rows of K
    n_tiles: int  # and of columns
    sections: int
    section_blocks: int  # blocks of 64 rows of K in a section

    def item(self, index: Array) -> tuple[Array, Array, Array]:
        """Its expert, its tile of K, and its first column."""
        expert = lax.div(index, jnp.int32(self.k_tiles * self.n_tiles))
        tile = lax.rem(index, jnp.int32(self.k_tiles * self.n_tiles))
        k_tile = lax.div(tile, jnp.int32(self.n_tiles))
        return expert, k_tile, lax.rem(tile, jnp.int32(self.n_tiles)) * self.columns

    def place(self, k_tile: Array, warpgroup: Array) -> tuple[Array, Array]:
        """The section and the first row of K in it of a warpgroup's half of a tile."""
        block = 2 * k_tile + warpgroup
        section = lax.div(block, jnp.int32(self.section_blocks))
        row = lax.rem(block, jnp.int32(self.section_blocks)) * WARPGROUP_ROWS
        return section, hopper.eights(row)


@dataclasses.dataclass(frozen=True)
class _GradientRefs(Scratch):
    """The references that a block of `sum_of_products` reads, writes and works in."""

    table: Any  # of _rows_of_experts
    x: Any  # [M, S K']
    dy: Any  # [M, N]
    out: Any  # [E S, K, N]
    dy_ring: Any = dataclasses.field(kw_only=True)
    masked: Any = dataclasses.field(kw_only=True)  # passes when both warpgroups have zeroed

    @property
    def ring(self) -> Ring:
        """Slots of [STEP, 128] of x and of [STEP, columns] of dy."""
        return Ring(self.x_ring, self.dy_ring, self.filled, self.freed)


def _gradient_block(plan: _Gradient, refs: _GradientRefs) -> None:
    items = jnp.int32(plan.experts * plan.k_tiles * plan.n_tiles)

    def multiply(warpgroup: Array) -> Any:
        offset = warpgroup * WARPGROUP_ROWS
        return functools.partial(_multiply_gradient, plan, refs, warpgroup, offset)

    hopper.by_warpgroup(lambda: items, functools.partial(_copy_gradient, plan, refs), multiply)


def _copy_gradient(plan: _Gradient, refs: _GradientRefs, index: Array, step: Array) -> Array:
    """Copies an item's x and dy."""
    expert, k_tile, column = plan.item(index)
    first, steps = hopper.eights(refs.table[0, expert]), refs.table[1, expert]

    def copies(i: Array) -> list[tuple[Any, Any, Any]]:
        rows = pl.ds(first + i * STEP, STEP)
        x_tile = refs.x.at[rows, pl.ds(k_tile * TILE_ROWS, TILE_ROWS)]
        dy_tile = refs.dy.at[rows, pl.ds(column, plan.columns)]
        return [(x_tile, refs.x_ring, ALL), (dy_tile, refs.dy_ring, ALL)]

    return hopper.fill(refs.ring, step, steps, copies)


def _multiply_gradient(
    plan: _Gradient,
    refs: _GradientRefs,
    warpgroup: Array,
    offset: Array,
    index: Array,
    step: Array,
) -> Array:
    """Sums and stores the 64 rows of K of an item from its row `offset` on."""
    expert, k_tile, column = plan.item(index)
    steps = refs.table[1, expert]
    mine = pl.ds(offset, WARPGROUP_ROWS)

    def accumulate(acc: Any) -> None:
        def multiply(i: Array, slot: Array) -> None:
            x_tile, dy_tile = refs.x_ring.at[slot].at[:, mine], refs.dy_ring.at[slot]
            own = tuple(
                bound - i * STEP for bound in (refs.table[2, expert], refs.table[3, expert])
            )
            _mask(plan, refs, warpgroup, x_tile, dy_tile, own)
            plgpu.wgmma(acc, x_tile.transpose((1, 0)), dy_tile)

        hopper.drain(refs.ring, step, steps, multiply)

    section, k = plan.place(k_tile, warpgroup)
    (values,) = hopper.sums(accumulate, plan.columns)

    @pl.when(section < plan.sections)
    def _store() -> None:
        hopper.store_whole(
            values,
            refs.stage.whole,
            warpgroup,
            lambda row, rows, at, width: refs.out.at[
                expert * plan.sections + section,
                pl.ds(k + row, rows),
                pl.ds(column + at, width),
            ],
        )

    return step + steps


def _mask(
    plan: _Gradient,
    refs: _GradientRefs,
    warpgroup: Array,
    x_tile: Any,
    dy_tile: Any,
    own: tuple[Array, ...],
) -> None:
    """Zeroes what a step holds of other experts' rows: NaN or not, it must not reach the sum.

    A warpgroup zeroes its own half of x and every other 64 columns of dy, which both multiply.
    """

    @pl.when((own[0] > 0) | (own[1] < STEP))
    def _() -> None:
        _zero_outside(x_tile, own)
        for c in range(plan.columns // WARPGROUP_ROWS):

            @pl.when(warpgroup == c % 2)
            def _mine(c: int = c) -> None:
                piece = pl.ds(c * WARPGROUP_ROWS, WARPGROUP_ROWS)
                _zero_outside(dy_tile.at[:, piece], own)

        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.masked)
        plgpu.barrier_wait(refs.masked)


def _zero_outside(tile: Any, own: tuple[Array, ...]) -> None:
    """Zeroes the rows of a [64, 64] tile in shared memory that are not own[0] to own[1]."""
    index = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
    values = plgpu.load(tile, layout=plgpu.Layout.WGMMA)
    mine = (index >= own[0]) & (index < own[1])
    tile[...] = jnp.where(mine, values, jnp.zeros_like(values))
