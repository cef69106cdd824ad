"""expert_ffn on TPU: one forward and one backward kernel; the intermediate never reaches HBM.

Letters: M rows, D model width, E experts, F intermediate, W expert output width; S rows of a step.

Arrays of size F are transposed, [F, S]. F is then the sublane axis, where a multiple of 8 needs no
padding (along lanes the published 152, 280 and 592 would be padded to a multiple of 128). Gate and
up are split without moving data. Routing weights lie along lanes: they multiply [F, S] without a
transpose, and their gradient has the same layout.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.expert_ffn import tiles_tpu
from pallas_kernels.expert_ffn.window import of_window, put
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.spans import LANES, ROWS, Spans, Stream, Streams, lane_length, spans

# Contracted axes: both minor, both major, or as in a plain matmul.
_NT = (((1,), (1,)), ((), ()))
_TN = (((0,), (0,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))

type Scalar = Array | int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes of a kernel, multiples of 128 rows; `rows` is a multiple of `step`."""

    rows: int  # moved at once, and computed at once if one expert owns them all
    step: int  # computed at once otherwise
    buffers: int = 2  # of an expert's weights and weight gradients
    tails: Sequence[int] = ()  # rows computed after the last whole step, if they suffice

    @property
    def at_once(self) -> list[int]:
        """Numbers of rows that a span computes without a loop over steps."""
        most = self.rows - self.step
        sizes = {most, *(most + tail for tail in self.tails), self.rows}
        return sorted(sizes - {0})


@dataclasses.dataclass(frozen=True)
class Call:
    """Shapes, dtypes and tiles of one kernel call. M is a multiple of 16."""

    kind: str  # "forward" or "backward"
    m: int
    d: int
    e: int
    f: int
    w: int
    row_dtype: jnp.dtype
    in_dtype: jnp.dtype  # of gate_up
    out_dtype: jnp.dtype  # of down
    tiles: Tiles
    gradients: tuple[jnp.dtype, ...] = ()  # dtypes of the gradient stacks; empty: no gradients
    layers: int = 1  # of those stacks
    adds: bool = False  # gradients are added to the stacks

    @property
    def casts(self) -> bool:
        """True if weights are cast on chip, once per expert."""
        return {self.in_dtype, self.out_dtype} != {self.row_dtype}

    @property
    def weight_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of one expert's gate_up and down."""
        return (2 * self.f, self.d), (self.f, self.w)

    def vmem_bytes(self) -> int:
        """Estimates VMEM use: buffered blocks, scratch, and temporaries of a whole tile."""
        row, rows = self.row_dtype.itemsize, self.tiles.rows
        f, d, w = _up(self.f, 16), _up(self.d, LANES), _up(self.w, LANES)
        weights = 2 * f * d * self.in_dtype.itemsize + f * w * self.out_dtype.itemsize
        both = 2 * f * d + f * w
        tile = rows * (d + w) * row + rows * 32
        live = rows * 4 * (6 * f + w)
        total = self.tiles.buffers * weights + (both * row if self.casts else 0)
        if self.kind == "backward":
            tile += rows * d * row
            live = rows * 4 * (10 * f + d)
            for size, dtype in zip((2 * f * d, f * w), self.gradients, strict=False):
                total += self.tiles.buffers * size * dtype.itemsize * (2 if self.adds else 1)
                total += 4 * size if dtype != jnp.float32 else 0
        if self.row_dtype == jnp.float32:  # split into bfloat16 parts for the MXU
            live += (10 if self.kind == "forward" else 16) * both + 12 * rows * (d + w)
        return total + 2 * tile + live + 2**20

    def flops(self) -> int:
        """FLOPs of the matrix products for M rows; backward includes recomputation."""
        gate_up, down = 4 * self.d * self.f, 2 * self.f * self.w
        return self.m * (gate_up + down if self.kind == "forward" else 3 * gate_up + 2 * down)

    def cost(self) -> pl.CostEstimate:
        """Estimate for XLA's scheduler: traffic when every expert has rows."""
        row = self.row_dtype.itemsize
        sizes = 2 * self.f * self.d, self.f * self.w
        weights = sizes[0] * self.in_dtype.itemsize + sizes[1] * self.out_dtype.itemsize
        rows = self.m * (self.d + self.w) * row
        if self.kind == "backward":
            written = sum(n * t.itemsize for n, t in zip(sizes, self.gradients, strict=False))
            weights += written * (2 if self.adds else 1)
            rows += self.m * self.d * row
        weights *= self.e
        return pl.CostEstimate(
            flops=self.flops(), bytes_accessed=weights + rows, transcendentals=self.m * self.f
        )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _chip(interpret: Any) -> pltpu.TpuInfo:
    """Returns the chip compiled for; interpreted kernels use a v5e's tiles."""
    if interpret:
        return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)
    return pltpu.get_tpu_info()


def plan_call(
    kind: str,
    rows: Array,
    gate_up: Array,
    down: Array,
    interpret: Any = False,
    experts: int | None = None,
    into: Sequence[Array] = (),
    adds: bool = False,
) -> Call | None:
    """Returns the call for arrays of these shapes on this chip; None: an expert exceeds VMEM.

    experts: of the window, None: all. into, adds: as in `backward`.
    """
    chip = _chip(interpret)
    (m, d), (n, f, w) = rows.shape, down.shape
    e = n if experts is None else experts
    call = Call(
        kind, m, d, e, f, w, rows.dtype, gate_up.dtype, down.dtype, Tiles(128, 128),
        tuple(stack.dtype for stack in into), into[0].shape[0] if into else 1, adds,
    )  # fmt: skip
    version = str(chip.chip_version)
    name = version if version.startswith("v") else f"tpu{version}"
    # A matrix unit of 256 columns gains nothing from short tails. Each tail is code of its own, and
    # takes minutes to compile in the backward pass of large experts.
    short = chip.mxu_column_size == LANES and (kind == "forward" or d * f < 2**20)
    tails = (32, 64) if short else ()
    for tiles in tiles_tpu.choices(name, kind, max(1, m // e)):
        candidate = dataclasses.replace(call, tiles=Tiles(*tiles, tails))
        if candidate.vmem_bytes() <= chip.vmem_capacity_bytes - 3 * 2**20:
            return candidate
    return None


# --- the kernels ----------------------------------------------------------------------------


def _dot(a: Array, b: Array, contraction: Any) -> Array:
    # The MXU multiplies bfloat16: float32 needs several passes, else it is rounded first.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, contraction, precision, jnp.float32)


def _edges(indices: Any) -> tuple[Array, Array]:
    """Returns (first, last): True if this visit is the first or last with its index."""
    visit, last = pl.program_id(0), pl.num_programs(0) - 1
    before, here = indices[jnp.maximum(visit - 1, 0)], indices[visit]
    after = indices[jnp.minimum(visit + 1, last)]
    return (visit == 0) | (here != before), (visit == last) | (here != after)


def _steps(plan: Spans, tiles: Tiles, body: Callable[[Scalar, int], None]) -> None:
    """Calls body(first row, rows) until it has covered the visit's rows, counted from `first`.

    A span that fills its buffer, except perhaps for its last step, is computed at once.
    """
    visit, step = pl.program_id(0), tiles.step
    count = plan.stop[visit] - plan.first[visit]

    def one(i: Array, _: None) -> None:
        body(pl.multiple_of(i * step, step), step)

    def smaller() -> None:
        lax.fori_loop(0, pl.cdiv(count, step), one, None)

    kinds: dict[int, Callable[[], None]] = {
        size: functools.partial(body, 0, size) for size in tiles.at_once
    }
    if tiles.rows > 2 * step:
        kinds = {tiles.rows - 2 * step: smaller} | kinds

    def choose(sizes: list[int]) -> None:
        if len(sizes) == 1:
            kinds[sizes[0]]()
        else:
            half = len(sizes) // 2
            low, high = sizes[:half], sizes[half:]
            lax.cond(count <= low[-1], lambda: choose(low), lambda: choose(high))

    choose(list(kinds))


def _weights(plan: Spans, call: Call, refs: Sequence[Any], casts: Sequence[Any]) -> list[Any]:
    """The expert's gate_up and down in the rows' dtype, cast once when they arrive."""
    views = [ref.at[0] for ref in refs]
    if not call.casts:
        return views
    arrived, _ = _edges(plan.weights)

    @pl.when(arrived)
    def cast_all() -> None:
        for view, cast in zip(views, casts, strict=True):
            cast[...] = view[...].astype(cast.dtype)

    return list(casts)


def _columns(weights: Any, ref: Any, first: Scalar, count: int) -> Array:
    """Returns weights [N, K] times the transpose of `count` rows [M, K], in float32.

    The result has whole tiles of lanes, with zeros past `count`. The MXU holds 128 columns of its
    right operand and streams the left one: fewer than 128 rows are cheaper on the left.
    """
    whole = count // LANES * LANES
    parts = []
    if whole:
        parts.append(_dot(weights[...], ref[pl.ds(first, whole), :], _NT))
    if count > whole:
        tail = _dot(ref[pl.ds(first + whole, count - whole), :], weights[...], _NT)
        parts.append(jnp.pad(tail, ((0, whole + LANES - count), (0, 0))).T)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _along_lanes(plan: Spans, ref: Any, first: Scalar, lanes: int) -> Array:
    """Reads the numbers of `lanes` rows; lane 0 of `ref` holds the row at a multiple of 128."""
    wide = ref[:, pl.ds(first, lanes + LANES)]
    before = plan.first[pl.program_id(0)] & (LANES - 1)
    shift = jnp.where(before > 0, wide.shape[1] - before, 0)
    return pltpu.roll(wide, shift, 1)[:, :lanes]


def _put_along_lanes(plan: Spans, ref: Any, first: Scalar, values: Array) -> None:
    """Writes what `_along_lanes` would read."""
    lanes = values.shape[1] + LANES
    before = plan.first[pl.program_id(0)] & (LANES - 1)
    wide = pltpu.roll(jnp.pad(values, ((0, 0), (0, LANES))), before, 1)
    lane, place = lax.broadcasted_iota(jnp.int32, (1, lanes), 1), pl.ds(first, lanes)
    ref[:, place] = jnp.where(lane >= before, wide, ref[:, place])


def _forward_kernel(
    plan: Spans, call: Call, x_hbm: Any, weight_hbm: Any, w_in_ref: Any, w_out_ref: Any,
    y_hbm: Any, x_rows: Any, weight_rows: Any, y_rows: Any, y_edge: Any, read: Any, write: Any,
    *casts: Any,
) -> None:  # fmt: skip
    read_streams = [Stream(x_hbm, x_rows), Stream(weight_hbm, weight_rows)]
    streams = Streams(plan, read_streams, [Stream(y_hbm, y_rows, y_edge)], read, write)
    w_in, w_out = _weights(plan, call, (w_in_ref, w_out_ref), casts)
    visit = pl.program_id(0)
    x_ref, weight_ref, y_ref = (ref.at[visit & 1] for ref in (x_rows, weight_rows, y_rows))

    def body(first: Scalar, count: int) -> None:
        h = _columns(w_in, x_ref, first, count)
        weight = _along_lanes(plan, weight_ref, first, h.shape[1])
        active = jax.nn.silu(h[: call.f]) * h[call.f :] * weight
        y = _dot(active[:, :count].astype(x_ref.dtype), w_out[...], _TN)
        y_ref[pl.ds(first, count), :] = y.astype(y_ref.dtype)

    streams.visit(lambda: _steps(plan, call.tiles, body))


def _clear_others(start: Array, stop: Array, first: Scalar, count: int, refs: Any) -> None:
    """Writes zeros to the rows of a step that are not in start ... stop - 1."""

    def clear(i: Scalar, _: None) -> None:
        tile = pl.multiple_of(jnp.asarray(i) * ROWS, ROWS)
        row = tile + lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0)
        for ref in refs:
            values = ref[pl.ds(tile, ROWS), :]
            own = jnp.where((row >= start) & (row < stop), values, jnp.zeros_like(values))
            ref[pl.ds(tile, ROWS), :] = own

    if isinstance(first, int):
        clear(0, None)
    else:
        pl.when(first == 0)(lambda: clear(0, None))
    end = first + count
    lax.fori_loop(jnp.minimum(stop, end) // ROWS, end // ROWS, clear, None)
    for ref in refs:
        past = _up(count, LANES) - count
        if past:
            ref[pl.ds(end, past), :] = jnp.zeros((past, ref.shape[1]), ref.dtype)


def _backward_kernel(
    plan: Spans, call: Call, x_hbm: Any, dy_hbm: Any, weight_hbm: Any, w_in_ref: Any,
    w_out_ref: Any, *rest: Any,
) -> None:  # fmt: skip
    """Recomputes [F, S]; weight gradients accumulate on chip in float32 per expert."""
    stacks, left = len(call.gradients), list(rest)
    old = [left.pop(0) for _ in range(stacks)]  # blocks if added to, else whole stacks
    dx_hbm, dweight_hbm = left.pop(0), left.pop(0)
    grads = [left.pop(0) for _ in range(stacks)]
    x_rows, dy_rows, weight_rows = left.pop(0), left.pop(0), left.pop(0)
    dx_rows, dweight_rows, dx_edge, dweight_edge, read, write = (left.pop(0) for _ in range(6))
    casts = [left.pop(0) for _ in range(2 if call.casts else 0)]
    streams = Streams(
        plan,
        [Stream(x_hbm, x_rows), Stream(dy_hbm, dy_rows), Stream(weight_hbm, weight_rows)],
        [Stream(dx_hbm, dx_rows, dx_edge), Stream(dweight_hbm, dweight_rows, dweight_edge)],
        read,
        write,
    )
    w_in, w_out = _weights(plan, call, (w_in_ref, w_out_ref), casts)
    sums = [ref if ref.dtype == jnp.float32 else left.pop(0) for ref in grads]
    begins, ends = _edges(plan.expert)

    @pl.when(begins)
    def _() -> None:
        for total, before in zip(sums, old, strict=True):
            total[...] = before[...].astype(total.dtype) if call.adds else jnp.zeros_like(total)

    visit = pl.program_id(0)
    x_ref, dy_ref, weight_ref, dx_ref, dweight_ref = (
        ref.at[visit & 1] for ref in (x_rows, dy_rows, weight_rows, dx_rows, dweight_rows)
    )
    start, stop = (bound[visit] - plan.first[visit] for bound in (plan.start, plan.stop))

    def body(first: Scalar, count: int) -> None:
        dtype, lanes = x_ref.dtype, _up(count, LANES)
        _clear_others(start, stop, first, count, (x_ref, dy_ref))
        x, dy = x_ref[pl.ds(first, lanes), :], dy_ref[pl.ds(first, lanes), :]
        row = first + lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
        weight = _along_lanes(plan, weight_ref, first, lanes)
        weight = jnp.where((row >= start) & (row < stop), weight, 0)
        h = _columns(w_in, x_ref, first, count)
        dactive = _columns(w_out, dy_ref, first, count)  # before the routing weight
        gate, up = h[: call.f], h[call.f :]
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        active = silu * up
        dweight = (active * dactive).sum(axis=0, keepdims=True)
        _put_along_lanes(plan, dweight_ref, first, dweight)
        dactive = dactive * weight
        dgate = dactive * up * (sigmoid + silu * (1 - sigmoid))
        dh = jnp.concatenate([dgate, dactive * silu])
        dx = _dot(dh[:, :count].astype(dtype), w_in[...], _TN)
        dx_ref[pl.ds(first, count), :] = dx.astype(dx_ref.dtype)
        if sums:
            sums[0][...] += _dot(dh.astype(dtype), x, _NN)
            sums[1][...] += _dot((active * weight).astype(dtype), dy, _NN)

    streams.visit(lambda: _steps(plan, call.tiles, body))

    @pl.when(ends)
    def _() -> None:
        for grad, total in zip(grads, sums, strict=True):
            if grad.dtype != jnp.float32:
                grad[...] = total[...].astype(grad.dtype)


# --- the calls ------------------------------------------------------------------------------


def block_specs(call: Call, plan: Spans | None) -> tuple[list[pl.BlockSpec], list[pl.BlockSpec]]:
    """Returns the blocks that Pallas moves at each visit, in and out; unchanged ones stay.

    The kernel moves arrays of rows itself: their blocks are the whole arrays, in HBM. The index
    maps take the visit, and the schedule's arrays unless `plan` is given.
    """

    def at(index: Callable[[Any, Spans], tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        return lambda i, *arrays: index(i, Spans(*arrays) if plan is None else plan)

    buffered = None if call.tiles.buffers == 2 else pl.Buffered(call.tiles.buffers)

    def per_expert(
        outer: tuple[Any, ...], index: Callable[..., tuple[Any, ...]]
    ) -> list[pl.BlockSpec]:
        return [
            pl.BlockSpec((*outer, *shape), index, pipeline_mode=buffered)
            for shape in call.weight_shapes
        ]

    whole = pl.BlockSpec(memory_space=pl.ANY)
    weights = per_expert((1,), at(lambda i, p: (p.weights[i], 0, 0)))
    if call.kind == "forward":
        return [whole, whole, *weights], [whole]
    grads: list[pl.BlockSpec] = []
    if call.gradients:
        grads = per_expert((None, None), at(lambda i, p: (p.layer[0], p.expert[i], 0, 0)))
    old = grads if call.adds else [whole for _ in grads]
    return [whole, whole, whole, *weights, *old], [whole, whole, *grads]


def _row_buffers(call: Call) -> list[Any]:
    """Scratch of the kernel's streams: reads, writes, edges of the writes, semaphores."""
    rows = call.tiles.rows
    narrow = pltpu.VMEM((2, 1, rows + LANES), jnp.float32)
    semaphores = [pltpu.SemaphoreType.DMA((2,))] * 2

    def wide(width: int) -> Any:
        return pltpu.VMEM((2, rows, width), call.row_dtype)

    def edge(width: int) -> Any:
        return pltpu.VMEM((ROWS, width), call.row_dtype)

    if call.kind == "forward":
        return [wide(call.d), narrow, wide(call.w), edge(call.w), *semaphores]
    edges = [edge(call.d), pltpu.VMEM((1, LANES), jnp.float32)]
    return [wide(call.d), wide(call.w), narrow, wide(call.d), narrow, *edges, *semaphores]


def pallas_call(
    call: Call, plan: Spans, interpret: Any = False, name: str | None = None
) -> Callable[..., Any]:
    """Returns the kernel as a function of its arrays, which returns a list of arrays.

    plan holds arrays, which are prefetched, or closed forms that can be indexed by visit or expert,
    for compile-time cost estimates of a known distribution.

    The last arrays of a backward call are the stacks [L, E, ...] of weight gradients. The last
    results alias them; values that the call does not write stay.
    """
    prefetched = isinstance(plan.expert, jax.Array)
    fields = len(Spans._fields) if prefetched else 0
    scratch = _row_buffers(call)
    if call.casts:
        scratch += [pltpu.VMEM(shape, call.row_dtype) for shape in call.weight_shapes]
    results: list[Any] = [jax.ShapeDtypeStruct((call.m, call.w), call.row_dtype)]
    kernel: Any = _forward_kernel
    if call.kind == "backward":
        kernel = _backward_kernel
        results = [
            jax.ShapeDtypeStruct((call.m, call.d), call.row_dtype),
            jax.ShapeDtypeStruct((1, lane_length(call.m, call.tiles.rows)), jnp.float32),
        ]
    stacks = list(zip(call.weight_shapes, call.gradients, strict=False))
    scratch += [pltpu.VMEM(shape, jnp.float32) for shape, t in stacks if t != jnp.float32]
    in_hbm = jax.ShapeDtypeStruct if interpret else pltpu.HBM
    results += [in_hbm((call.layers, call.e, *shape), dtype) for shape, dtype in stacks]

    def body(*refs: Any) -> None:
        kernel(Spans(*refs[:fields]) if prefetched else plan, call, *refs[fields:])

    inputs, outputs = block_specs(call, None if prefetched else plan)
    limit = min(call.vmem_bytes() * 5 // 4, _chip(interpret).vmem_capacity_bytes - 2**21)
    run = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=fields,
            grid=(plan.used[0],),
            in_specs=inputs,
            out_specs=outputs,
            scratch_shapes=scratch,
        ),
        out_shape=results,
        input_output_aliases={
            fields + len(inputs) - 1 - i: len(results) - 1 - i for i in range(len(stacks))
        },
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=limit,
            # Checks cost scalar work in every transfer. In the tests, the interpreter checks.
            disable_bounds_checks=True,
        ),
        cost_estimate=call.cost(),
        # Pallas's plain interpreter (True) has no transfers of a dynamic number of rows.
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
        name=name or f"expert_ffn_{call.kind}",
    )
    return functools.partial(run, *plan) if prefetched else run


def _in_hbm(arrays: Sequence[Array], interpret: Any) -> list[Array]:
    """Pins arrays to HBM, so that XLA does not prefetch small ones whole into VMEM."""
    if interpret:
        return list(arrays)
    return [pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in arrays]


def _whole_tiles(*arrays: Array) -> list[Array]:
    """Pads to whole tiles of rows, since the kernel moves nothing smaller."""
    missing = -len(arrays[0]) % ROWS
    return [jnp.pad(a, ((0, missing), (0, 0))) for a in arrays] if missing else list(arrays)


def _along(call: Call, row_weights: Array) -> Array:
    """Returns row weights [M] along lanes, as the kernel reads them."""
    missing = lane_length(call.m, call.tiles.rows) - len(row_weights)
    return jnp.pad(row_weights.astype(jnp.float32), (0, missing))[None]


def forward(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    first_expert: Scalar,
    interpret: Any = False,
) -> Array:
    """As api.expert_ffn. Weights of another dtype than the rows are cast on chip.

    An expert that does not fit on chip uses grouped_matmul: its intermediate goes through HBM, its
    weights are cast there to the rows' dtype, and their gradients are rounded to it.

    Raises:
      ValueError: a dtype that the MXU does not support.
    """
    for name, array in (("rows", rows), ("gate_up", gate_up), ("down", down)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name} is {array.dtype}; a TPU supports float32 and bfloat16")
    m, experts = rows.shape[0], group_sizes.shape[0]
    (x,) = _whole_tiles(rows)
    call = plan_call("forward", x, gate_up, down, interpret, experts)
    if call is None:
        own = of_window(gate_up, down, first_expert, experts)
        return _unfused(rows, *own, row_weights, group_sizes, interpret)
    plan = spans(group_sizes, call.m, call.tiles.rows)
    run = pallas_call(call, plan._replace(weights=plan.weights + first_expert), interpret)
    (y,) = run(x, _along(call, row_weights), *_in_hbm((gate_up, down), interpret))
    return y[:m]


def backward(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    first_expert: Scalar,
    dy: Array,
    into: tuple[Array, ...],
    layer: Scalar,
    adds: bool,
    interpret: Any = False,
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Returns the gradients of rows and row_weights, and `into` with those of the weights.

    `into` are stacks [L, E, 2F, D] and [L, E, F, W], overwritten (or, with `adds`, added to) at
    `layer`; empty: no gradients. The other arguments are those of `forward`; dy is [M, W].
    """
    m, experts = rows.shape[0], group_sizes.shape[0]
    x, padded_dy = _whole_tiles(rows, dy)
    call = plan_call("backward", x, gate_up, down, interpret, experts, into, adds)
    if call is None:
        own = of_window(gate_up, down, first_expert, experts)

        def unfused(rows: Array, gate_up: Array, down: Array, row_weights: Array) -> Array:
            return _unfused(rows, gate_up, down, row_weights, group_sizes, interpret)

        _, pull = jax.vjp(unfused, rows, *own, row_weights)
        drows, *grads, dweights = pull(dy)
        return drows, dweights, put(into, layer, grads, adds)
    plan = spans(group_sizes, call.m, call.tiles.rows, visit_idle=True)
    plan = plan._replace(
        weights=plan.weights + first_expert, layer=jnp.asarray(layer, jnp.int32)[None]
    )
    drows, dweights, *grads = pallas_call(call, plan, interpret)(
        x, padded_dy, _along(call, row_weights), *_in_hbm((gate_up, down, *into), interpret)
    )  # fmt: skip
    return drows[:m], dweights[0, :m], tuple(grads)


def _unfused(
    rows: Array,
    gate_up: Array,
    down: Array,
    row_weights: Array,
    group_sizes: Array,
    interpret: Any,
) -> Array:
    product = functools.partial(
        grouped_matmul, group_sizes=group_sizes, implementation="tpu", interpret=interpret
    )
    gate_up, down = gate_up.astype(rows.dtype), down.astype(rows.dtype)
    gate, up = jnp.split(product(rows, gate_up, transpose_weights=True).astype(jnp.float32), 2, 1)
    active = jax.nn.silu(gate) * up * row_weights.astype(jnp.float32)[:, None]
    return product(active.astype(rows.dtype), down)
