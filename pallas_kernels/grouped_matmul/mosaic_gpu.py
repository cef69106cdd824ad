"""grouped_matmul on Hopper GPUs: TMA, wgmma, persistent blocks of three warpgroups.

Letters: E experts, M rows, K contracted width, N output width, S sections: a product may contract
several blocks of K, each with a weight matrix of its own, and sum them.

**Tiling.** One warpgroup issues TMA copies into a ring of shared-memory slots, two multiply out of
it, each half of a tile; the blocks are persistent. TMA cuts an array in HBM into whole groups of
eight rows and of 128 bytes (the tiles that wgmma reads), so tiles of rows begin at the multiple of
eight at or before the first row of their expert. A tile may therefore reach into the rows of the
experts before and after its own. What lies there is not written (grouped_matmul) or is zeroed on
chip before it is summed (weight_gradient). TMA fills what lies outside an array with zeros, so no
size need divide a tile, but arrays whose last axis is not a multiple of 64, or the one before it of
8, are padded to that in HBM first: a copy that the published sizes never need.

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

**Interpreted**, each warpgroup is a thread of XLA's CPU pool, and a pool of fewer threads may wait
for ever: on a machine of few cores set XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul import cpu

Interpret = bool | plgpu.InterpretGPUParams

# Rows of one warpgroup's wgmma, and of a tile, which two warpgroups share.
WARPGROUP_ROWS = 64
TILE_ROWS = 2 * WARPGROUP_ROWS
# A swizzled row of shared memory: every copy and every product takes whole ones.
SWIZZLE_BYTES = 128
# Of each row, what a tile of the output goes to HBM by.
STAGE_BYTES = 64
# Contracted elements per slot of the ring: one swizzled row of a two-byte type.
STEP = SWIZZLE_BYTES // 2
ALL = slice(None)
_COLUMNS = (256, 192, 128, 64)
RING_BYTES = 192 * 1024
_MAX_SLOTS = 6
# Found by trying: with fewer for the copying warpgroup ptxas spills registers of the fused kernel.
COPY_REGISTERS, MULTIPLY_REGISTERS = 80, 208

_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
_BLACKWELL = ("Blackwell", "B100", "B200", "B300", "GB10", "GB200", "GB300", "RTX PRO", "RTX 50")


def uses_wgmma(interpret: Interpret) -> bool:
    """Whether the device compiled for runs these kernels (True), or the fallback of cpu.py.

    Raises:
      NotImplementedError: a GPU older than Hopper, or none at all, and not interpreted.
    """
    if interpret:
        return True
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    device = jax.devices()[0] if abstract is None else abstract
    capability = getattr(device, "compute_capability", None)
    if capability is not None and str(capability)[:1].isdigit():
        major = int(str(capability).split(".")[0])
    else:  # compiled ahead of time: all that is known of the device is its name
        kind = device.device_kind
        major = 9 if any(name in kind for name in _HOPPER) else 0
        major = 10 if any(name in kind for name in _BLACKWELL) else major
    if major < 9:
        raise NotImplementedError(
            f"device {device.device_kind!r} (platform {device.platform}): the GPU kernels need "
            "compute capability 9 (Hopper) or later; use implementation='cpu', which is plain JAX"
        )
    return major == 9


def interpreter(interpret: Interpret) -> plgpu.InterpretGPUParams | bool:
    """What Pallas takes for `interpret`."""
    return plgpu.InterpretGPUParams() if interpret is True else interpret


def multiprocessors(interpret: Interpret) -> int:
    """Persistent blocks to launch: one for each multiprocessor, a few where interpreted."""
    if interpret:
        return 2
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    cores = jax.devices()[0].core_count if abstract is None else abstract.num_cores
    return cores or 132


# Declared such that type checkers take them for abstract.
_Tiling: Any = plgpu.TilingTransform
_Swizzle: Any = plgpu.SwizzleTransform


def swizzled(dtype: DTypeLike, row_bytes: int = SWIZZLE_BYTES) -> tuple[Any, Any]:
    """The layout of shared memory that wgmma reads and TMA writes without conflicts."""
    return _Tiling((8, row_bytes // jnp.dtype(dtype).itemsize)), _Swizzle(row_bytes)


def padded(x: Array) -> Array:
    """x with zeros up to what TMA asks of its last two axes: multiples of 8 and of 64."""
    missing = [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % 8), (0, -x.shape[-1] % STEP)]
    return jnp.pad(x, missing) if any(after for _, after in missing) else x


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


def work(group_sizes: Array, rows: int, tile_rows: int) -> tuple[Array, Array]:
    """Tiles of rows: int32 [4, tiles], and [1], how many are in use.

    Of each tile: its expert, its first row (a multiple of 8), and the first and one past the last
    of its rows that are the expert's, counted from the tile's first.
    """
    sizes = group_sizes.astype(jnp.int32)
    experts, busy = sizes.shape[0], min(sizes.shape[0], rows)
    stop = jnp.cumsum(sizes, dtype=jnp.int32)
    start = stop - sizes
    first = start // 8 * 8
    tiles = jnp.where(sizes > 0, (stop - first + tile_rows - 1) // tile_rows, 0)
    end = jnp.cumsum(tiles, dtype=jnp.int32)
    index = jnp.arange((rows + 7 * busy) // tile_rows + busy, dtype=jnp.int32)
    expert = jnp.minimum((index[:, None] >= end[None]).sum(axis=1), experts - 1)
    row = first[expert] + (index - (end - tiles)[expert]) * tile_rows
    own = (jnp.maximum(start[expert] - row, 0), jnp.minimum(stop[expert] - row, tile_rows))
    return jnp.stack([expert, row, *own]).astype(jnp.int32), end[-1:]


def each_of_mine(count: Array, body: Callable[[Array, Array], Array]) -> None:
    """body(item, step) -> next step, for the items of this block; step numbers ring slots."""
    block, stride = lax.axis_index("sm"), lax.axis_size("sm")
    mine = lax.div(jnp.maximum(count - block + stride - 1, 0), jnp.int32(stride))
    lax.fori_loop(0, mine, lambda i, step: body(i * stride + block, step), jnp.int32(0))


def launch(interpret: Interpret) -> dict[str, Any]:
    """Arguments of plgpu.kernel that all kernels share: two multiplying warpgroups, one copying."""
    return dict(
        grid=(multiprocessors(interpret),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpreter(interpret),
    )


def eights(row: Array) -> Array:
    """row, which is a multiple of 8: TMA reads the group of eight that it is in."""
    return pl.multiple_of(row, 8)


def fill(step: Array, filled: Any, freed: Any, copies: Sequence[tuple]) -> None:
    """Starts the copies of one step, once its slot is free: (from, ring, rows of the slot)."""
    slots = filled.shape[0]
    slot = lax.rem(step, jnp.int32(slots))

    @pl.when(step >= slots)
    def _wait():
        plgpu.barrier_wait(freed.at[slot])

    for source, ring, place in copies:
        plgpu.copy_gmem_to_smem(source, ring.at[slot].at[place], filled.at[slot])


def drain(
    first: Array,
    steps: int | Array,
    filled: Any,
    freed: Any,
    multiply: Callable[[Array, Array], None],
    products: int = 1,
) -> Array:
    """multiply(i, slot) for each filled slot, which starts so many wgmma products.

    A slot is freed one step late, when its products are done.
    """
    slots = jnp.int32(filled.shape[0])

    def one(i: Array, _: None) -> None:
        slot = lax.rem(first + i, slots)
        plgpu.barrier_wait(filled.at[slot])
        multiply(i, slot)
        plgpu.wgmma_wait(products)

        @pl.when(i > 0)
        def _free():
            plgpu.barrier_arrive(freed.at[lax.rem(first + i - 1, slots)])

    lax.fori_loop(0, steps, one, None)
    plgpu.wgmma_wait(0)

    @pl.when(steps > 0)
    def _free_last():
        plgpu.barrier_arrive(freed.at[lax.rem(first + steps - 1, slots)])

    return first + steps


def staging(dtype: DTypeLike) -> dict:
    """Scratch of store_rows: STAGE_BYTES of each row, per multiplying warpgroup."""
    columns = STAGE_BYTES // jnp.dtype(dtype).itemsize
    shape = (2, WARPGROUP_ROWS, columns)
    layout = swizzled(dtype, STAGE_BYTES)
    return {
        "stage_whole": plgpu.SMEM((2, *shape), dtype, transforms=layout),
        "stage_partial": plgpu.SMEM(shape, dtype),
    }


def window(out: Any, first: Array, column: Array) -> Callable[[Any, int, int, int], Any]:
    """The target of a store whose row 0 and column 0 are out's `first` and `column`."""
    return lambda row, rows, at, columns: out.at[
        pl.ds(first + row, rows), pl.ds(column + at, columns)
    ]


def store_whole(
    values: Array, stage: Any, warpgroup: Array, target: Callable[[Any, int, int, int], Any]
) -> None:
    """Writes a warpgroup's [64, columns] to target(row, rows, column, columns)."""
    columns = stage.shape[-1]
    pieces = -(-values.shape[1] // columns)
    for i in range(pieces):
        # The copy that last used this half of the stage must have read it; the first piece follows
        # the last one of the tile before.
        plgpu.wait_smem_to_gmem(0 if i == 0 and pieces % 2 else 1, wait_read_only=True)
        half = stage.at[i % 2, warpgroup]
        half[...] = values[:, i * columns : (i + 1) * columns].astype(stage.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(half, target(0, WARPGROUP_ROWS, i * columns, columns))


def store_rows(
    values: Array,
    stage_whole: Any,
    stage_partial: Any,
    warpgroup: Array,
    own: tuple[Array, Array],
    target: Callable[[Any, int, int, int], Any],
) -> None:
    """Writes rows own[0] to own[1] of a warpgroup's 64 to target(row, rows, column, columns)."""
    whole = own[1] - own[0] == WARPGROUP_ROWS

    @pl.when(whole)
    def _whole():
        store_whole(values, stage_whole, warpgroup, target)

    @pl.when(jnp.logical_not(whole))
    def _partial():
        store_partial(values, stage_partial, warpgroup, own, target)


def store_partial(
    values: Array,
    stage: Any,
    warpgroup: Array,
    own: tuple[Array, Array],
    target: Callable[[Any, int, int, int], Any],
) -> None:
    """As store_rows, slower.

    TMA cannot write a number of rows known only at run time: they are written in powers of two,
    out of shared memory that is not cut into eights.
    """
    stage, columns = stage.at[warpgroup], stage.shape[-1]
    rows = jnp.maximum(own[1] - own[0], 0)
    for at in range(0, values.shape[1], columns):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.store(stage, values[:, at : at + columns].astype(stage.dtype), optimized=False)
        plgpu.commit_smem()
        size = WARPGROUP_ROWS
        while size:
            row = own[0] + (rows & ~(2 * size - 1))

            @pl.when((rows & size) != 0)
            def _copy(size=size, row=row, at=at):
                plgpu.copy_smem_to_gmem(stage.at[pl.ds(row, size)], target(row, size, at, columns))

            size //= 2


def own_rows(own: tuple[Array, Array], first: Array) -> tuple[Array, Array]:
    """A tile's own rows, as the 64 rows from `first` on count them."""
    start, stop = own
    return jnp.clip(start - first, 0, WARPGROUP_ROWS), jnp.clip(stop - first, 0, WARPGROUP_ROWS)


def _slots(step_bytes: int) -> int:
    return min(_MAX_SLOTS, RING_BYTES // step_bytes)


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
    if not uses_wgmma(interpret):
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
) -> Array:
    """The kernel behind grouped_matmul: a sum over S sections of K.

    Args:
      rows: [M, S K'], K' the multiple of 64 at or above K; bfloat16 or float16. What lies between
        K and K' of a section meets zeros, and must be finite.
      weights: [E, S, K, N], or [E, S, N, K] with transpose_weights; the dtype of rows.
      group_sizes: int32 [E], which sum to M or (M padded) less.
      out_dtype: of the result.
      transpose_weights: which of its two last axes `weights` contracts.
      interpret: as in grouped_matmul.

    Returns:
      [M, N], both padded to multiples of 8 and 64; what belongs to no expert is undefined.
    """
    n, sections, dtype = weights.shape[2 if transpose_weights else 3], weights.shape[1], rows.dtype
    rows, weights = padded(rows), padded(weights).reshape(-1, *padded(weights).shape[2:])
    m = rows.shape[0]
    section_steps = rows.shape[1] // (sections * STEP)
    steps, columns = sections * section_steps, tile_columns(n)
    n_tiles = -(-n // columns)
    slots = _slots((TILE_ROWS + columns) * STEP * 2)
    table, count = work(group_sizes, m, TILE_ROWS)

    def body(table, count, x, w, out, x_ring, w_ring, filled, freed, **stage):
        warpgroup = lax.axis_index("warpgroup")

        # Neighbouring blocks take the column tiles of the same rows: these then come from L2.
        def item(index: Array) -> tuple[Array, Array]:
            tile = lax.div(index, jnp.int32(n_tiles))
            return tile, lax.rem(index, jnp.int32(n_tiles)) * columns

        @pl.when(warpgroup == 2)
        def _copy():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

            def one(index: Array, step: Array) -> Array:
                tile, column = item(index)
                expert, some_rows = table[0, tile], pl.ds(eights(table[1, tile]), TILE_ROWS)

                def fetch(i: Array, _: None) -> None:
                    section = expert * sections + lax.div(i, jnp.int32(section_steps))
                    depth = pl.ds(lax.rem(i, jnp.int32(section_steps)) * STEP, STEP)
                    across = pl.ds(column, columns)
                    w_tile = (
                        (section, across, depth) if transpose_weights else (section, depth, across)
                    )
                    x_tile = x.at[some_rows, pl.ds(i * STEP, STEP)]
                    fill(
                        step + i,
                        filled,
                        freed,
                        [(x_tile, x_ring, ALL), (w.at[w_tile], w_ring, ALL)],
                    )

                lax.fori_loop(0, steps, fetch, None)
                return step + steps

            each_of_mine(count[0] * n_tiles, one)

        @pl.when(warpgroup < 2)
        def _multiply():
            plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
            offset = warpgroup * WARPGROUP_ROWS

            def one(index: Array, step: Array) -> Array:
                tile, column = item(index)

                def accumulate(acc) -> Array:
                    def multiply(i: Array, slot: Array) -> None:
                        w_tile = w_ring.at[slot]
                        plgpu.wgmma(
                            acc,
                            x_ring.at[slot].at[pl.ds(offset, WARPGROUP_ROWS)],
                            w_tile.transpose((1, 0)) if transpose_weights else w_tile,
                        )

                    drain(step, steps, filled, freed, multiply)
                    return acc[...]

                first = eights(table[1, tile]) + offset
                store_rows(
                    pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP_ROWS, columns))),
                    warpgroup=warpgroup,
                    own=own_rows((table[2, tile], table[3, tile]), offset),
                    target=window(out, first, column),
                    **stage,
                )
                return step + steps

            each_of_mine(count[0] * n_tiles, one)
            plgpu.wait_smem_to_gmem(0)

    layout = swizzled(dtype)
    w_shape = (columns, STEP) if transpose_weights else (STEP, columns)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n + -n % STEP), out_dtype),
        scratch_types=dict(
            x_ring=plgpu.SMEM((slots, TILE_ROWS, STEP), dtype, transforms=layout),
            w_ring=plgpu.SMEM((slots, *w_shape), dtype, transforms=layout),
            filled=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            freed=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            **staging(out_dtype),
        ),
        kernel_name="grouped_matmul",
        **launch(interpret),
    )(table, count, rows, weights)


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
    if not uses_wgmma(interpret):
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
      rows: [M, S K'], K' the multiple of 64 at or above K; bfloat16 or float16. What lies between
        K and K' of a section is left out.
      cotangent: [M, N], the dtype of rows.
      group_sizes: int32 [E], which sum to M or (M padded) less.
      sections: S and K.
      out_dtype: of the result.
      interpret: as in grouped_matmul.

    Returns:
      [E, S, K, N], the last two axes padded to multiples of 8 and 64 with what is undefined.
    """
    dtype, experts, n = rows.dtype, group_sizes.shape[0], cotangent.shape[1]
    rows, cotangent = padded(rows), padded(cotangent)
    count, depth = sections[0], sections[1] + -sections[1] % 8
    columns = tile_columns(n)
    section_blocks = rows.shape[1] // (count * WARPGROUP_ROWS)
    k_tiles, n_tiles = -(-rows.shape[1] // TILE_ROWS), -(-n // columns)
    slots = _slots((TILE_ROWS + columns) * STEP * 2)
    sizes = group_sizes.astype(jnp.int32)
    stop = jnp.cumsum(sizes, dtype=jnp.int32)
    first = (stop - sizes) // 8 * 8
    steps = jnp.where(sizes > 0, (stop - first + STEP - 1) // STEP, 0)
    table = jnp.stack([first, steps, stop - sizes - first, stop - first])

    def body(table, x, dy, out, x_ring, dy_ring, filled, freed, masked, stage_whole, **_):
        warpgroup = lax.axis_index("warpgroup")
        items = jnp.int32(experts * k_tiles * n_tiles)

        def item(index: Array) -> tuple[Array, Array, Array]:
            expert = lax.div(index, jnp.int32(k_tiles * n_tiles))
            tile = lax.rem(index, jnp.int32(k_tiles * n_tiles))
            k_tile = lax.div(tile, jnp.int32(n_tiles))
            return expert, k_tile, lax.rem(tile, jnp.int32(n_tiles)) * columns

        @pl.when(warpgroup == 2)
        def _copy():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

            def one(index: Array, step: Array) -> Array:
                expert, k_tile, column = item(index)
                first, steps = eights(table[0, expert]), table[1, expert]

                def fetch(i: Array, _: None) -> None:
                    some_rows = pl.ds(first + i * STEP, STEP)
                    x_tile = x.at[some_rows, pl.ds(k_tile * TILE_ROWS, TILE_ROWS)]
                    dy_tile = dy.at[some_rows, pl.ds(column, columns)]
                    fill(step + i, filled, freed, [(x_tile, x_ring, ALL), (dy_tile, dy_ring, ALL)])

                lax.fori_loop(0, steps, fetch, None)
                return step + steps

            each_of_mine(items, one)

        @pl.when(warpgroup < 2)
        def _multiply():
            plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
            my_columns = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

            def one(index: Array, step: Array) -> Array:
                expert, k_tile, column = item(index)
                steps = table[1, expert]

                def accumulate(acc) -> Array:
                    def multiply(i: Array, slot: Array) -> None:
                        x_tile, dy_tile = x_ring.at[slot].at[:, my_columns], dy_ring.at[slot]
                        own = tuple(
                            bound - i * STEP for bound in (table[2, expert], table[3, expert])
                        )

                        # Rows of other experts, NaN or not, must not reach this one's sum.
                        @pl.when((own[0] > 0) | (own[1] < STEP))
                        def _mask():
                            _zero_outside(x_tile, own)
                            for c in range(columns // WARPGROUP_ROWS):

                                @pl.when(warpgroup == c % 2)
                                def _mine(c=c):
                                    piece = pl.ds(c * WARPGROUP_ROWS, WARPGROUP_ROWS)
                                    _zero_outside(dy_tile.at[:, piece], own)

                            plgpu.commit_smem()
                            plgpu.barrier_arrive(masked)
                            plgpu.barrier_wait(masked)

                        plgpu.wgmma(acc, x_tile.transpose((1, 0)), dy_tile)

                    drain(step, steps, filled, freed, multiply)
                    return acc[...]

                block = 2 * k_tile + warpgroup
                section = lax.div(block, jnp.int32(section_blocks))
                k = eights(lax.rem(block, jnp.int32(section_blocks)) * WARPGROUP_ROWS)
                values = pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP_ROWS, columns)))

                @pl.when(section < count)
                def _store():
                    store_whole(
                        values,
                        stage_whole,
                        warpgroup,
                        lambda row, rows, at, width: out.at[
                            expert * count + section,
                            pl.ds(k + row, rows),
                            pl.ds(column + at, width),
                        ],
                    )

                return step + steps

            each_of_mine(items, one)
            plgpu.wait_smem_to_gmem(0)

    layout = swizzled(dtype)
    n_out = n + -n % STEP
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((experts * count, depth, n_out), out_dtype),
        scratch_types=dict(
            x_ring=plgpu.SMEM((slots, STEP, TILE_ROWS), dtype, transforms=layout),
            dy_ring=plgpu.SMEM((slots, STEP, columns), dtype, transforms=layout),
            filled=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            freed=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            masked=plgpu.Barrier(num_arrivals=2),
            **staging(out_dtype),
        ),
        kernel_name="weight_gradient",
        **launch(interpret),
    )(table, rows, cotangent)
    return out.reshape(experts, count, depth, n_out)


def _zero_outside(tile: Any, own: tuple[Array, ...]) -> None:
    """Zeroes the rows of a [64, 64] tile in shared memory that are not own[0] to own[1]."""
    index = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
    values = plgpu.load(tile, layout=plgpu.Layout.WGMMA)
    mine = (index >= own[0]) & (index < own[1])
    tile[...] = jnp.where(mine, values, jnp.zeros_like(values))
