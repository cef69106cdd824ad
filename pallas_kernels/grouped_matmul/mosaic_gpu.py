"""grouped_matmul on Hopper GPUs: TMA, wgmma, persistent blocks of three warpgroups.

Letters: E experts, M rows, K contracted width, N output width, S sections: a product may contract
several blocks of K, each with its own weight matrix, and sum them. hopper.py describes a block: one
warpgroup copies into a ring, two multiply out of it, and barriers synchronise them.

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
    x ring  ◀── x  [64 rows, 128 of K]          only if the step includes rows of others:
    dy ring ◀── dy [64 rows, columns]             zeroes them in its own half of x and in every
                                                  other 64 columns of dy, arrives at `masked` and
                                                  waits there for the other warpgroup
                                                acc [64, columns] += x ring [:, 64 g …]^T dy ring
                                                after the last step: acc ──▶ out, through the stage

An expert without rows has no steps: its accumulator's zeros are stored.

**Bytes.** With tiles of R rows and C columns, and V = sum over experts of ceil((rows + o) / R), o
(less than 8) the rows of others before an expert's first, the copies of grouped_matmul read

    V ceil(N / C) K (R + C) elements   and write   M N,

against M K + (touched experts) K N + M N of HBM traffic, as long as concurrent tiles of one expert
find each other's operands in the L2 cache. weight_gradient reads ceil(K / R) ceil(N / C) B (R + C)
elements with B = 64 sum ceil((rows + o) / 64) rows, and writes E K N.

**Precision.** bfloat16 and float16 are multiplied directly and summed in float32. A float32 operand
is split exactly into three bfloat16 parts, and the six products of parts above its rounding error
are summed in float32: float32 accuracy at six times the work (three if the other operand is
bfloat16). TensorFloat-32, with its ten fraction bits, is never used. The split arrays are in HBM:
this path is for checks, not for speed. It turns an infinity into NaN.

**Other GPUs.** wgmma exists on compute capability 9 only. Blackwell runs the plain-JAX loop of
cpu.py: correct and dropless, with work proportional to the rows, but slow, one block of rows at a
time. Older GPUs raise NotImplementedError.
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
    """Splits float32 x into three bfloat16 summands, largest first; two-byte types stay whole."""
    if x.dtype.itemsize == 2:
        return [x]
    split, rest = [], x.astype(jnp.float32)
    for _ in range(3):
        # XLA may optimise a conversion and its inverse away, but not reduce_precision.
        part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        split.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return split


def _pairs(left: Sequence[Array], right: Sequence[Array]) -> list[tuple[Array, Array]]:
    """Products of parts above float32's rounding error, largest first."""
    order = sorted((i + j, i, j) for i in range(len(left)) for j in range(len(right)))
    return [(left[i], right[j]) for rank, i, j in order if rank < 3]


def tile_columns(width: int) -> int:
    """Returns the columns of a tile for an output of this width."""
    # Each further tile reads the rows again, which costs about as much as 32 columns.
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
    """As api.grouped_matmul; out_dtype is float32 or a two-byte dtype, None: that of rows.

    Weights are cast to a two-byte dtype of rows. Raises NotImplementedError on a GPU older than
    Hopper.
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
    """The kernel of grouped_matmul, which sums over S sections of K.

    Args:
      rows: [M, S K'], K' being K rounded up to a multiple of 64; bfloat16 or float16. Columns
        between K and K' of a section are multiplied by zeros and must be finite.
      weights: [E or more, S, K, N], or [.., S, N, K] with transpose_weights; the dtype of rows.
      group_sizes: int32 [E], which sum to M or (M padded) less.
      first_expert: expert of the first group, if there are more experts than groups.

    Returns:
      [M, N], padded to multiples of 8 and 64; rows of no expert are undefined.
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
    """Compile-time partition of a product."""

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
        """Returns an item's tile of rows and first column."""
        tile = lax.div(index, jnp.int32(self.n_tiles))
        return tile, lax.rem(index, jnp.int32(self.n_tiles)) * self.columns


@dataclasses.dataclass(frozen=True)
class _ProductRefs(Scratch):
    table: Any  # of hopper.work
    count: Any
    x: Any  # [M, S K']
    w: Any  # [E S, K, N], or [E S, N, K]
    out: Any  # [M, N]
    w_ring: Any = dataclasses.field(kw_only=True)

    @property
    def ring(self) -> Ring:
        """Slots of x, [128, STEP], and of w or its transpose, [STEP, columns]."""
        return Ring(self.x_ring, self.w_ring, self.filled, self.freed)


def _product_block(plan: _Product, refs: _ProductRefs) -> None:
    def multiply(warpgroup: Array) -> Any:
        offset = warpgroup * WARPGROUP_ROWS
        return functools.partial(_multiply_product, plan, refs, warpgroup, offset)

    copy = functools.partial(_copy_product, plan, refs)
    hopper.by_warpgroup(lambda: refs.count[0] * plan.n_tiles, copy, multiply)


def _copy_product(plan: _Product, refs: _ProductRefs, index: Array, step: Array) -> Array:
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
    """Multiplies and stores an item's 64 rows from row `offset` on."""
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
    """As api.weight_gradient; exact zeros for an expert without rows.

    Raises NotImplementedError on a GPU older than Hopper.
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
    """The kernel of weight_gradient, for rows in S sections.

    Args:
      rows: [M, S K'], K' being K rounded up to a multiple of 64; bfloat16 or float16. Columns
        between K and K' of a section are ignored.
      cotangent: [M, N], the dtype of rows.
      group_sizes: int32 [E], which sum to M or (M padded) less.
      sections: S and K.

    Returns:
      [E, S, K, N], the last two axes padded to multiples of 8 and 64; the padding is undefined.
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
    """int32 [4, E]: first row to read (a multiple of 8), steps, and own rows after it: from, to."""
    sizes = group_sizes.astype(jnp.int32)
    stop = jnp.cumsum(sizes, dtype=jnp.int32)
    first = (stop - sizes) // 8 * 8
    steps = jnp.where(sizes > 0, (stop - first + STEP - 1) // STEP, 0)
    return jnp.stack([first, steps, stop - sizes - first, stop - first])


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """Compile-time partition of a weight gradient."""

    columns: int  # of a tile
    experts: int
    k_tiles: int  # tiles of an expert, of 128 rows of K
    n_tiles: int  # tiles of columns
    sections: int
    section_blocks: int  # blocks of 64 rows of K in a section

    def item(self, index: Array) -> tuple[Array, Array, Array]:
        """Returns an item's expert, tile of K and first column."""
        expert = lax.div(index, jnp.int32(self.k_tiles * self.n_tiles))
        tile = lax.rem(index, jnp.int32(self.k_tiles * self.n_tiles))
        k_tile = lax.div(tile, jnp.int32(self.n_tiles))
        return expert, k_tile, lax.rem(tile, jnp.int32(self.n_tiles)) * self.columns

    def place(self, k_tile: Array, warpgroup: Array) -> tuple[Array, Array]:
        """Returns section and first row of K of a warpgroup's half of a tile."""
        block = 2 * k_tile + warpgroup
        section = lax.div(block, jnp.int32(self.section_blocks))
        row = lax.rem(block, jnp.int32(self.section_blocks)) * WARPGROUP_ROWS
        return section, hopper.eights(row)


@dataclasses.dataclass(frozen=True)
class _GradientRefs(Scratch):
    table: Any  # of _rows_of_experts
    x: Any  # [M, S K']
    dy: Any  # [M, N]
    out: Any  # [E S, K, N]
    dy_ring: Any = dataclasses.field(kw_only=True)
    masked: Any = dataclasses.field(kw_only=True)  # barrier: both warpgroups have zeroed

    @property
    def ring(self) -> Ring:
        """Slots of x, [STEP, 128], and of dy, [STEP, columns]."""
        return Ring(self.x_ring, self.dy_ring, self.filled, self.freed)


def _gradient_block(plan: _Gradient, refs: _GradientRefs) -> None:
    items = jnp.int32(plan.experts * plan.k_tiles * plan.n_tiles)

    def multiply(warpgroup: Array) -> Any:
        offset = warpgroup * WARPGROUP_ROWS
        return functools.partial(_multiply_gradient, plan, refs, warpgroup, offset)

    hopper.by_warpgroup(lambda: items, functools.partial(_copy_gradient, plan, refs), multiply)


def _copy_gradient(plan: _Gradient, refs: _GradientRefs, index: Array, step: Array) -> Array:
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
    """Sums and stores an item's 64 rows of K from row `offset` on."""
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
    """Zeroes other experts' rows in a step; NaN included, they must not reach the sum.

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
    """Zeroes the rows of a [64, 64] tile in shared memory outside own[0] to own[1]."""
    index = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
    values = plgpu.load(tile, layout=plgpu.Layout.WGMMA)
    mine = (index >= own[0]) & (index < own[1])
    tile[...] = jnp.where(mine, values, jnp.zeros_like(values))
