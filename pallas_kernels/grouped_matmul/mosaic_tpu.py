"""grouped_matmul on TPU: visits (tile of rows, expert) pairs; each is moved on chip once.

Letters: E experts, M rows, K contracted width, N output width.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.schedule import Schedule, schedule, visits

Interpret = bool | pltpu.InterpretParams | Any

_LANES = 128
_ROWS_ALIGN = 32  # sublanes of the narrowest supported dtype


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block sizes on chip in one grid step.

    `rows` are moved at once and `step` of them multiplied at once; a step without rows of the
    visited expert is skipped. k and n of K and N are moved at once.
    """

    rows: int
    step: int
    k: int
    n: int


class Visits(Protocol):
    """Properties of a visit that kernels and index maps need."""

    def expert(self, visit: Any) -> Any:
        """The expert whose rows the visit computes."""

    def weights(self, visit: Any) -> Any:
        """The expert whose weights are on chip."""

    def tile(self, visit: Any) -> Any:
        """The tile of rows."""

    def start(self, visit: Any) -> Any:
        """The expert's first row."""

    def stop(self, visit: Any) -> Any:
        """One past the expert's last row."""

    def used(self, visit: Any) -> Any:
        """False for visits that pad the grid."""


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """Visits of a schedule in prefetched arrays."""

    plan: Schedule

    def expert(self, visit: Any) -> Any:  # noqa: D102
        return self.plan.expert[visit]

    def weights(self, visit: Any) -> Any:  # noqa: D102
        return self.plan.weights[visit]

    def tile(self, visit: Any) -> Any:  # noqa: D102
        return self.plan.tile[visit]

    def start(self, visit: Any) -> Any:  # noqa: D102
        return self.plan.start[self.plan.expert[visit]]

    def stop(self, visit: Any) -> Any:  # noqa: D102
        return self.plan.stop[self.plan.expert[visit]]

    def used(self, visit: Any) -> Any:  # noqa: D102
        return visit < self.plan.used[0]


@dataclasses.dataclass(frozen=True)
class Balanced:
    """Visits in closed form, for experts with equal, aligned shares of the rows.

    For cost estimates: a compiler that does not run the program cannot know prefetched scalars. One
    of `share` (rows per expert) and `tile_rows` must divide the other.
    """

    share: int
    tile_rows: int

    def expert(self, visit: Any) -> Any:  # noqa: D102
        return visit // max(1, self.share // self.tile_rows)

    def weights(self, visit: Any) -> Any:  # noqa: D102
        return self.expert(visit)

    def tile(self, visit: Any) -> Any:  # noqa: D102
        return visit // max(1, self.tile_rows // self.share)

    def start(self, visit: Any) -> Any:  # noqa: D102
        return self.expert(visit) * self.share

    def stop(self, visit: Any) -> Any:  # noqa: D102
        return (self.expert(visit) + 1) * self.share

    def used(self, visit: Any) -> Any:  # noqa: D102
        return visit >= 0


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _up(a: int, b: int) -> int:
    return _ceil(a, b) * b


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    if a.dtype == b.dtype == jnp.bfloat16:
        precision = None
    else:
        # The MXU multiplies bfloat16: float32 needs several passes, else it is rounded first.
        precision = lax.Precision.HIGHEST
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision, jnp.float32)


def _inside(x: Array, axis: int, first: Any, start: Any, stop: Any) -> Array:
    """Zeroes x where the index along the axis, counted from `first`, is outside start..stop."""
    shape = tuple(size if i == axis else 1 for i, size in enumerate(x.shape))
    index = first + lax.broadcasted_iota(jnp.int32, shape, axis)
    return jnp.where((index >= start) & (index < stop), x, jnp.zeros_like(x))


def _steps(plan: Visits, visit: Any, tiles: Tiles, body: Callable[[Any, Any], None]) -> None:
    """Calls body(offset in the tile, row number) for each step with rows of the expert."""
    start, stop, origin = plan.start(visit), plan.stop(visit), plan.tile(visit) * tiles.rows

    def step(i: Any, _: None) -> None:
        offset = pl.multiple_of(i * tiles.step, tiles.step)
        first = origin + offset

        @pl.when(plan.used(visit) & (start < stop) & (start < first + tiles.step) & (stop > first))
        def compute() -> None:
            body(offset, first)

    # A loop of fixed length: the compiler's cost estimate needs a known trip count.
    lax.fori_loop(0, tiles.rows // tiles.step, step, None)


def _product_kernel(
    plan: Visits,
    tiles: Tiles,
    width: int,
    transpose_weights: bool,
    rows_ref: Any,
    weights_ref: Any,
    out_ref: Any,
    acc_ref: Any = None,
) -> None:
    visit, k_step, k_steps = pl.program_id(1), pl.program_id(2), pl.num_programs(2)

    def body(offset: Any, first: Any) -> None:
        own = pl.ds(offset, tiles.step)
        x = rows_ref[own, :]
        if width % tiles.k:  # the last tile's excess is undefined, maybe NaN
            x = _inside(x, 1, k_step * tiles.k, 0, width)
        w, w_axis = weights_ref[0], 1 if transpose_weights else 0
        if width % tiles.k:
            w = _inside(w, w_axis, k_step * tiles.k, 0, width)
        y = _dot(x, w, (1, w_axis))

        def store(y: Array) -> None:
            row = first + lax.broadcasted_iota(jnp.int32, (tiles.step, 1), 0)
            mine = (row >= plan.start(visit)) & (row < plan.stop(visit))
            other = out_ref[own, :].astype(jnp.float32)
            out_ref[own, :] = jnp.where(mine, y, other).astype(out_ref.dtype)

        if acc_ref is None:
            store(y)
            return

        @pl.when(k_step == 0)
        def _() -> None:
            acc_ref[own, :] = y

        @pl.when(k_step > 0)
        def _() -> None:
            acc_ref[own, :] += y

        @pl.when(k_step == k_steps - 1)
        def _() -> None:
            store(acc_ref[own, :])

    _steps(plan, visit, tiles, body)


def _gradient_kernel(
    plan: Visits, tiles: Tiles, rows_ref: Any, cotangent_ref: Any, out_ref: Any, acc_ref: Any
) -> None:
    visit = pl.program_id(2)
    start, stop, origin = plan.start(visit), plan.stop(visit), plan.tile(visit) * tiles.rows

    @pl.when(plan.used(visit) & (origin <= start))
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def body(offset: Any, first: Any) -> None:
        own = pl.ds(offset, tiles.step)
        # Both: NaN times zero is NaN.
        x, dy = (_inside(ref[own, :], 0, first, start, stop) for ref in (rows_ref, cotangent_ref))
        acc_ref[...] += _dot(x, dy, (0, 0))

    _steps(plan, visit, tiles, body)

    @pl.when(plan.used(visit) & (origin + tiles.rows >= stop))
    def _() -> None:
        out_ref[0] = acc_ref[...].astype(out_ref.dtype)


def _call(
    kernel: Callable[..., None],
    plan: Schedule | Balanced,
    grid: tuple[int, int, int],
    in_blocks: list[tuple[tuple[int, ...], Callable[..., Any]]],
    out_block: tuple[tuple[int, ...], Callable[..., Any]],
    operands: tuple[Array, ...],
    **kwargs: Any,
) -> Array:
    """pallas_call whose kernel and index maps take the plan's visits first."""
    scalars = tuple(plan) if isinstance(plan, Schedule) else ()

    def visits_of(refs: tuple[Any, ...]) -> Visits:
        return Scheduled(Schedule(*refs)) if isinstance(plan, Schedule) else plan

    def spec(block: tuple[tuple[int, ...], Callable[..., Any]]) -> pl.BlockSpec:
        shape, index = block
        return pl.BlockSpec(shape, lambda *args: index(visits_of(args[3:]), *args[:3]))

    def body(*refs: Any) -> None:
        kernel(visits_of(refs[: len(scalars)]), *refs[len(scalars) :])

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[spec(block) for block in in_blocks],
            out_specs=spec(out_block),
            scratch_shapes=kwargs.pop("scratch_shapes"),
        ),
        **kwargs,
    )(*scalars, *operands)


def grouped_matmul(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    *,
    transpose_weights: bool,
    interpret: Interpret = False,
    tiles: Tiles | None = None,
    share: int | None = None,
) -> Array:
    """As api.grouped_matmul. `share` assumes that every expert has that many rows."""
    m, k = rows.shape
    experts, n = weights.shape[0], weights.shape[1 if transpose_weights else 2]
    tiles = tiles or product_tiles(m, k, n, experts, rows.dtype, weights.dtype, interpret)
    tiles = _fitted(tiles, m, k, n)
    k_steps = _ceil(k, tiles.k)
    plan, count = _plan(group_sizes, m, tiles, share, visit_idle=False)
    weights_block = (tiles.n, tiles.k) if transpose_weights else (tiles.k, tiles.n)

    def weights_index(plan: Visits, n: Any, visit: Any, k: Any) -> tuple[Any, ...]:
        expert = plan.weights(visit)
        return (expert, n, k) if transpose_weights else (expert, k, n)

    return _call(
        lambda plan, *refs: _product_kernel(plan, tiles, k, transpose_weights, *refs),
        plan,
        (_ceil(n, tiles.n), count, k_steps),
        [
            ((tiles.rows, tiles.k), lambda plan, n, visit, k: (plan.tile(visit), k)),
            ((1, *weights_block), weights_index),
        ],
        ((tiles.rows, tiles.n), lambda plan, n, visit, k: (plan.tile(visit), n)),
        (rows, weights),
        out_shape=jax.ShapeDtypeStruct((m, n), rows.dtype),
        scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.n), jnp.float32)] * (k_steps > 1),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_limit(product_bytes(tiles, k, rows.dtype, weights.dtype)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * k * n,
            transcendentals=0,
            bytes_accessed=_bytes(rows) * _ceil(n, tiles.n)
            + _bytes(weights)
            + m * n * rows.dtype.itemsize,
        ),
        interpret=interpret,
        name="grouped_matmul_transposed" if transpose_weights else "grouped_matmul",
    )


def weight_gradient(
    rows: Array,
    cotangent: Array,
    group_sizes: Array,
    *,
    interpret: Interpret = False,
    out_dtype: DTypeLike,
    tiles: Tiles | None = None,
    share: int | None = None,
) -> Array:
    """As api.weight_gradient. `share` assumes that every expert has that many rows."""
    (m, k), n, experts = rows.shape, cotangent.shape[1], group_sizes.shape[0]
    out_dtype = jnp.dtype(out_dtype)
    tiles = tiles or gradient_tiles(
        m, k, n, experts, rows.dtype, cotangent.dtype, out_dtype, interpret
    )
    tiles = _fitted(tiles, m, k, n)
    plan, count = _plan(group_sizes, m, tiles, share, visit_idle=True)
    size = gradient_bytes(tiles, rows.dtype, cotangent.dtype, out_dtype)
    return _call(
        lambda plan, *refs: _gradient_kernel(plan, tiles, *refs),
        plan,
        (_ceil(k, tiles.k), _ceil(n, tiles.n), count),
        [
            ((tiles.rows, tiles.k), lambda plan, k, n, visit: (plan.tile(visit), k)),
            ((tiles.rows, tiles.n), lambda plan, k, n, visit: (plan.tile(visit), n)),
        ],
        ((1, tiles.k, tiles.n), lambda plan, k, n, visit: (plan.expert(visit), k, n)),
        (rows, cotangent),
        out_shape=jax.ShapeDtypeStruct((experts, k, n), out_dtype),
        scratch_shapes=[pltpu.VMEM((tiles.k, tiles.n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_limit(size),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * k * n,
            transcendentals=0,
            bytes_accessed=_bytes(rows) * _ceil(n, tiles.n)
            + _bytes(cotangent) * _ceil(k, tiles.k)
            + experts * k * n * out_dtype.itemsize,
        ),
        interpret=interpret,
        name="grouped_matmul_weight_gradient",
    )


def _plan(
    group_sizes: Array, rows: int, tiles: Tiles, share: int | None, visit_idle: bool
) -> tuple[Schedule | Balanced, int]:
    experts = group_sizes.shape[0]
    if share is not None:
        return Balanced(share, tiles.rows), max(experts, _ceil(rows, tiles.rows))
    sizes = group_sizes.astype(jnp.int32)
    plan = schedule(sizes, rows, tiles.rows, visit_idle=visit_idle)
    return plan, visits(rows, experts, tiles.rows)


# --- tile sizes -----------------------------------------------------------------------------


def _bytes(x: Array) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def _fitted(tiles: Tiles, m: int, k: int, n: int) -> Tiles:
    """Limits tiles to the arrays' sizes; a tile as wide as its array needs no alignment."""
    rows = min(tiles.rows, _up(m, _ROWS_ALIGN))
    step = min(tiles.step, rows)
    return Tiles(_up(rows, step), step, min(tiles.k, k), min(tiles.n, n))


def _block(rows: int, columns: int, dtype: DTypeLike) -> int:
    """Bytes of a block in VMEM, both axes padded."""
    return _up(rows, _ROWS_ALIGN) * _up(columns, _LANES) * jnp.dtype(dtype).itemsize


def _staged(blocks: int, *dtypes: DTypeLike) -> int:
    """Bytes of the bfloat16 parts into which float32 operands are split."""
    return (
        0 if {jnp.dtype(each) for each in dtypes} == {jnp.dtype(jnp.bfloat16)} else 3 * blocks // 2
    )


def product_bytes(tiles: Tiles, k: int, rows: DTypeLike, weights: DTypeLike) -> int:
    """VMEM of a product; blocks count twice, since one is moved while another is used."""
    weight_block = max(_block(tiles.k, tiles.n, weights), _block(tiles.n, tiles.k, weights))
    return (
        2 * _block(tiles.rows, tiles.k, rows)
        + 2 * weight_block
        + _staged(weight_block + _block(tiles.step, tiles.k, rows), rows, weights)
        + 2 * _block(tiles.rows, tiles.n, rows)
        + _block(tiles.rows, tiles.n, jnp.float32) * (1 + (tiles.k < k))
    )


def gradient_bytes(tiles: Tiles, rows: DTypeLike, cotangent: DTypeLike, out: DTypeLike) -> int:
    """VMEM of a weight gradient."""
    row_blocks = _block(tiles.rows, tiles.k, rows) + _block(tiles.rows, tiles.n, cotangent)
    return (
        2 * row_blocks
        + _staged(row_blocks, rows, cotangent)
        + 2 * _block(tiles.k, tiles.n, out)
        + 2 * _block(tiles.k, tiles.n, jnp.float32)
    )


def _limit(needed: int) -> int:
    # The compiler also spills registers and stages operands of the product.
    return max(16 << 20, needed + needed // 4 + (4 << 20))


# Share of a chip's VMEM; the compiler keeps the rest between kernels.
_VMEM_SHARE = 0.75

# Overhead of a grid step, from the compiler's estimates.
_STEP_SECONDS = 0.2e-6


@dataclasses.dataclass(frozen=True)
class _Chip:
    vmem: float  # bytes for a kernel
    columns: int  # of a matrix unit
    flops: float  # per second, in bfloat16
    bandwidth: float  # bytes per second of HBM


def _chip(interpret: Interpret) -> _Chip:
    if interpret:  # no chip: the tiles of a small one
        return _Chip(_VMEM_SHARE * (64 << 20), 128, 2e14, 8e11)
    info = pltpu.get_tpu_info()
    return _Chip(
        _VMEM_SHARE * info.vmem_capacity_bytes,
        info.mxu_column_size,
        info.bf16_ops_per_second,
        info.mem_bw_bytes_per_second,
    )


def _seconds(
    chip: _Chip,
    tiles: Tiles,
    share: int,
    dtypes: tuple[DTypeLike, DTypeLike],
    row_bytes: int,
    expert_bytes: int,
    every_visit: bool,
) -> float:
    """Estimates the time for the visits of one expert's rows, with one piece of k and n on chip.

    Expert data is moved in one visit only (in each with `every_visit`): visits of few rows wait for
    it.
    """
    passes = 1 if set(dtypes) == {jnp.dtype(jnp.bfloat16)} else 6
    rows = max(min(tiles.rows, _up(share, tiles.step)), tiles.step)
    busy = passes * 2 * rows * tiles.k * tiles.n / chip.flops
    moved = min(tiles.rows, share) * row_bytes / chip.bandwidth
    once = max(busy, moved + expert_bytes / chip.bandwidth)
    again = once if every_visit else max(busy, moved)
    count = _ceil(share, tiles.rows)
    return once + (count - 1) * again + count * _STEP_SECONDS


def _row_tiles(m: int, experts: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yields (rows moved, rows computed) at once: best for balanced groups first, then smaller.

    Experts with few rows share a tile. Large tiles are computed in steps, since every border
    between experts costs one step twice; steps narrower than a matrix unit cost more than that.
    """
    share = max(1, m // experts)
    rows = min(512, max(_ROWS_ALIGN, 1 << (share - 1).bit_length()))
    while True:
        yield rows, min(rows, max(rows // 2, columns))
        if rows <= 128:
            return
        rows //= 2


def _widths(size: int) -> list[int]:
    """Tile widths for an axis: all of it, or a multiple of 128."""
    cuts = {_up(_ceil(size, parts), _LANES) for parts in range(2, _ceil(size, _LANES) + 1)}
    return [size, *sorted(cuts, reverse=True)]


def _depths(size: int) -> list[int]:
    """As _widths for a contracted axis: divisors if possible, since a remainder needs a mask."""
    widths = _widths(size)
    return [width for width in widths if size % width == 0] if size % _LANES == 0 else widths


def product_tiles(
    m: int,
    k: int,
    n: int,
    experts: int,
    rows: DTypeLike,
    weights: DTypeLike,
    interpret: Interpret,
) -> Tiles:
    """Returns the tiles of a product with the least estimated time that fit the chip."""
    chip = _chip(interpret)
    dtypes = jnp.dtype(rows), jnp.dtype(weights)
    x, w = (dtype.itemsize for dtype in dtypes)

    def cost(tiles: Tiles) -> float:
        n_steps, k_steps = _ceil(n, tiles.n), _ceil(k, tiles.k)
        row_bytes = x * (tiles.k + tiles.n // k_steps)
        # With several pieces of k, an expert's weights are moved again for each of its tiles.
        one = _seconds(
            chip,
            tiles,
            max(1, m // experts),
            dtypes,
            row_bytes,
            w * tiles.k * tiles.n,
            k_steps > 1,
        )
        return n_steps * k_steps * one

    options = [
        Tiles(tile_rows, step, tile_k, tile_n)
        for tile_rows, step in _row_tiles(m, experts, chip.columns)
        for tile_k in _depths(k)
        for tile_n in _widths(n)
    ]
    fitting = [t for t in options if _limit(product_bytes(t, k, rows, weights)) <= chip.vmem]
    return min(fitting, key=cost)


def gradient_tiles(
    m: int,
    k: int,
    n: int,
    experts: int,
    rows: DTypeLike,
    cotangent: DTypeLike,
    out: DTypeLike,
    interpret: Interpret,
) -> Tiles:
    """Returns the tiles of a weight gradient with the least estimated time that fit the chip."""
    chip = _chip(interpret)
    dtypes = jnp.dtype(rows), jnp.dtype(cotangent)
    x, dy = (dtype.itemsize for dtype in dtypes)

    def cost(tiles: Tiles) -> float:
        one = _seconds(
            chip,
            tiles,
            max(1, m // experts),
            dtypes,
            x * tiles.k + dy * tiles.n,
            jnp.dtype(out).itemsize * tiles.k * tiles.n,
            False,
        )
        return _ceil(k, tiles.k) * _ceil(n, tiles.n) * one

    options = [
        Tiles(tile_rows, step, tile_k, tile_n)
        for tile_rows, step in _row_tiles(m, experts, chip.columns)
        for tile_k in _widths(k)
        for tile_n in _widths(n)
    ]
    fitting = [t for t in options if _limit(gradient_bytes(t, rows, cotangent, out)) <= chip.vmem]
    return min(fitting, key=cost)
