"""expert_ffn on TPU: one kernel forward, one backward, the intermediate never in HBM.

Letters: M rows, D model width, E experts, F intermediate, W expert output width; S rows of a step.

Everything of size F is held transposed, [F, S]: F is the sublane axis, where a multiple of 8
needs no padding (the published 152, 280 and 592 would be padded to a multiple of 128 along
lanes), gate and up are split without moving data, and a row's routing weight lies along lanes,
where it multiplies [F, S] without a transpose and where the gradient of the weights ends up.
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
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.schedule import Schedule, schedule

# Contractions of two operands: both minor axes, both major axes, or as in a plain product.
_NT = (((1,), (1,)), ((), ()))
_TN = (((0,), (0,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))
_LANES = 128

type Scalar = Array | int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a kernel is cut: multiples of 128 rows, `rows` one of `step`."""

    rows: int  # moved at once, and computed at once where one expert owns them all
    step: int  # computed at once elsewhere
    buffers: int = 2  # of an expert's weights, and of its weight gradients


@dataclasses.dataclass(frozen=True)
class Call:
    """One kernel call: what it reads and writes, without the arrays. M is at least 128."""

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

    @property
    def casts(self) -> bool:
        """Whether weights are cast on chip, once per expert."""
        return {self.in_dtype, self.out_dtype} != {self.row_dtype}

    @property
    def weight_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of one expert's gate_up and down."""
        return (2 * self.f, self.d), (self.f, self.w)

    def vmem_bytes(self) -> int:
        """Estimated need: buffered blocks, scratch, and what a whole tile computes with."""
        row, rows = self.row_dtype.itemsize, self.tiles.rows
        f, d, w = _up(self.f, 16), _up(self.d, _LANES), _up(self.w, _LANES)
        weights = 2 * f * d * self.in_dtype.itemsize + f * w * self.out_dtype.itemsize
        both = 2 * f * d + f * w
        tile = rows * (d + w) * row + rows * 32
        live = rows * 4 * (6 * f + w)
        total = self.tiles.buffers * weights + (both * row if self.casts else 0)
        if self.kind == "backward":
            tile += rows * d * row
            live = rows * 4 * (10 * f + d)
            total += self.tiles.buffers * weights
            total += sum(
                4 * size
                for size, dtype in ((2 * f * d, self.in_dtype), (f * w, self.out_dtype))
                if dtype != jnp.float32
            )
        if self.row_dtype == jnp.float32:  # split into parts that the MXU multiplies
            live += (10 if self.kind == "forward" else 16) * both + 12 * rows * (d + w)
        return total + 2 * tile + live + 2**20

    def flops(self) -> int:
        """Of the matrix products, for M rows, the backward pass with its recomputation."""
        gate_up, down = 4 * self.d * self.f, 2 * self.f * self.w
        return self.m * (gate_up + down if self.kind == "forward" else 3 * gate_up + 2 * down)

    def cost(self) -> pl.CostEstimate:
        """For XLA's scheduler: what moves when every expert has rows."""
        row = self.row_dtype.itemsize
        weights = (
            self.e
            * self.f
            * (2 * self.d * self.in_dtype.itemsize + self.w * self.out_dtype.itemsize)
        )
        rows = self.m * (self.d + self.w) * row
        if self.kind == "backward":
            weights, rows = 2 * weights, rows + self.m * self.d * row
        return pl.CostEstimate(
            flops=self.flops(), bytes_accessed=weights + rows, transcendentals=self.m * self.f
        )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _chip(interpret: Any) -> pltpu.TpuInfo:
    """The chip compiled for; an interpreted kernel is cut as for a v5e."""
    if interpret:
        return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)
    return pltpu.get_tpu_info()


def plan_call(
    kind: str, rows: Array, gate_up: Array, down: Array, interpret: Any = False
) -> Call | None:
    """The call for arrays of these shapes on the current chip; None: an expert exceeds VMEM."""
    chip = _chip(interpret)
    (m, d), (e, f, w) = rows.shape, down.shape
    call = Call(kind, m, d, e, f, w, rows.dtype, gate_up.dtype, down.dtype, Tiles(128, 128))
    version = str(chip.chip_version)
    name = version if version.startswith("v") else f"tpu{version}"
    for tiles in tiles_tpu.choices(name, kind, d, f, max(1, m // e)):
        candidate = dataclasses.replace(call, tiles=Tiles(*tiles))
        if tiles[0] <= m and candidate.vmem_bytes() <= chip.vmem_capacity_bytes - 3 * 2**20:
            return candidate
    return None


# --- the kernels ----------------------------------------------------------------------------


def _dot(a: Array, b: Array, contraction: Any) -> Array:
    # The MXU multiplies bfloat16: float32 takes several passes, or would be rounded first.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, contraction, precision, jnp.float32)


def _edges(indices: Any) -> tuple[Array, Array]:
    """Whether this visit is the first, and whether it is the last, with its index."""
    visit, last = pl.program_id(0), pl.num_programs(0) - 1
    before, here = indices[jnp.maximum(visit - 1, 0)], indices[visit]
    after = indices[jnp.minimum(visit + 1, last)]
    return (visit == 0) | (here != before), (visit == last) | (here != after)


def _steps(plan: Schedule, tiles: Tiles, body: Callable[..., None]) -> None:
    """Calls body(first row, rows, own) until it has seen the visit's rows.

    A tile that one expert owns is one step, without masks. own(new, old, axis) takes `new` where
    the row along that axis is the expert's: rows of others may hold anything, NaN included.
    """
    visit = pl.program_id(0)
    expert, origin = plan.expert[visit], plan.tile[visit] * tiles.rows
    start = jnp.clip(plan.start[expert] - origin, 0, tiles.rows)
    stop = jnp.clip(plan.stop[expert] - origin, 0, tiles.rows)
    stop = jnp.where(visit < plan.used[0], stop, start)
    whole = stop - start == tiles.rows
    pl.when(whole)(lambda: body(0, tiles.rows, lambda new, old, axis: new))

    def step(i: Array, _: None) -> None:
        first = pl.multiple_of(i * tiles.step, tiles.step)

        def own(new: Array, old: Array | float, axis: int) -> Array:
            shape = (tiles.step, 1) if axis == 0 else (1, tiles.step)
            row = first + lax.broadcasted_iota(jnp.int32, shape, axis)
            return jnp.where((row >= start) & (row < stop), new, old)

        body(first, tiles.step, own)

    @pl.when(jnp.logical_not(whole) & (start < stop))
    def _() -> None:
        lax.fori_loop(start // tiles.step, pl.cdiv(stop, tiles.step), step, None)


def _weights(plan: Schedule, call: Call, refs: Sequence[Any], casts: Sequence[Any]) -> list[Any]:
    """The expert's gate_up and down in the rows' dtype, cast when they arrive where need be."""
    views = [ref.at[0] for ref in refs]
    if not call.casts:
        return views
    arrived, _ = _edges(plan.weights)

    @pl.when(arrived)
    def cast_all() -> None:
        for view, cast in zip(views, casts, strict=True):
            cast[...] = view[...].astype(cast.dtype)

    return list(casts)


def _forward_kernel(
    plan: Schedule, call: Call, x_ref: Any, weight_ref: Any, w_in_ref: Any, w_out_ref: Any,
    y_ref: Any, *casts: Any,
) -> None:  # fmt: skip
    w_in, w_out = _weights(plan, call, (w_in_ref, w_out_ref), casts)

    def body(first: Scalar, count: int, own: Callable[..., Array]) -> None:
        rows = pl.ds(first, count)
        h = _dot(w_in[...], x_ref[rows, :], _NT)
        active = jax.nn.silu(h[: call.f]) * h[call.f :] * weight_ref[:, rows]
        y = _dot(active.astype(x_ref.dtype), w_out[...], _TN).astype(y_ref.dtype)
        y_ref[rows, :] = own(y, y_ref[rows, :], 0)

    _steps(plan, call.tiles, body)


def _backward_kernel(
    plan: Schedule, call: Call, x_ref: Any, dy_ref: Any, weight_ref: Any, w_in_ref: Any,
    w_out_ref: Any, dx_ref: Any, dweight_ref: Any, dw_in_ref: Any, dw_out_ref: Any, *scratch: Any,
) -> None:  # fmt: skip
    """Recomputes [F, S]; weight gradients gather on chip in float32 while an expert lasts."""
    casts, sums = (scratch[:2], scratch[2:]) if call.casts else ((), scratch)
    w_in, w_out = _weights(plan, call, (w_in_ref, w_out_ref), casts)
    grads = (dw_in_ref.at[0], dw_out_ref.at[0])
    left = list(sums)
    sum_in, sum_out = (ref if ref.dtype == jnp.float32 else left.pop(0) for ref in grads)
    begins, ends = _edges(plan.expert)

    @pl.when(begins)
    def _() -> None:
        sum_in[...] = jnp.zeros_like(sum_in)
        sum_out[...] = jnp.zeros_like(sum_out)

    def body(first: Scalar, count: int, own: Callable[..., Array]) -> None:
        rows, dtype = pl.ds(first, count), x_ref.dtype
        x, dy = own(x_ref[rows, :], 0, 0), own(dy_ref[rows, :], 0, 0)
        weight = own(weight_ref[:, rows], 0, 1)
        h = _dot(w_in[...], x, _NT)
        dactive = _dot(w_out[...], dy, _NT)  # before the routing weight
        gate, up = h[: call.f], h[call.f :]
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        active = silu * up
        dweight = (active * dactive).sum(axis=0, keepdims=True)
        dweight_ref[:, rows] = own(dweight, dweight_ref[:, rows], 1)
        dactive = dactive * weight
        dgate = dactive * up * (sigmoid + silu * (1 - sigmoid))
        dh = jnp.concatenate([dgate, dactive * silu]).astype(dtype)
        dx = _dot(dh, w_in[...], _TN).astype(dx_ref.dtype)
        dx_ref[rows, :] = own(dx, dx_ref[rows, :], 0)
        sum_in[...] += _dot(dh, x, _NN)
        sum_out[...] += _dot((active * weight).astype(dtype), dy, _NN)

    _steps(plan, call.tiles, body)

    @pl.when(ends)
    def _() -> None:
        for grad, total in zip(grads, (sum_in, sum_out), strict=True):
            if grad.dtype != jnp.float32:
                grad[...] = total[...].astype(grad.dtype)


# --- the calls ------------------------------------------------------------------------------


def block_specs(call: Call, plan: Schedule | None) -> tuple[list[pl.BlockSpec], list[pl.BlockSpec]]:
    """What the kernel moves at each visit, in and out; a block that stays is not moved again.

    The index maps take the visit, and the schedule's arrays unless `plan` is given.
    """

    def at(index: Callable[[Any, Schedule], tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        return lambda i, *arrays: index(i, Schedule(*arrays) if plan is None else plan)

    row, lane = at(lambda i, p: (p.tile[i], 0)), at(lambda i, p: (0, p.tile[i]))
    buffered = None if call.tiles.buffers == 2 else pl.Buffered(call.tiles.buffers)

    def per_expert(index: Callable[..., tuple[Any, ...]]) -> list[pl.BlockSpec]:
        return [
            pl.BlockSpec((1, *shape), index, pipeline_mode=buffered) for shape in call.weight_shapes
        ]

    x, y = (
        pl.BlockSpec((call.tiles.rows, call.d), row),
        pl.BlockSpec((call.tiles.rows, call.w), row),
    )
    weight = pl.BlockSpec((1, call.tiles.rows), lane)
    weights = per_expert(at(lambda i, p: (p.weights[i], 0, 0)))
    if call.kind == "forward":
        return [x, weight, *weights], [y]
    grads = per_expert(at(lambda i, p: (p.expert[i], 0, 0)))
    return [x, y, weight, *weights], [x, weight, *grads]


def pallas_call(
    call: Call, plan: Schedule, interpret: Any = False, name: str | None = None
) -> Callable[..., Any]:
    """The kernel as a function of its arrays, which returns a list of arrays.

    plan holds arrays, which are prefetched, or anything else that can be indexed by a visit or an
    expert: closed forms, where the compiler is to estimate the time of a known distribution.
    """
    prefetched = isinstance(plan.expert, jax.Array)
    fields = len(Schedule._fields) if prefetched else 0
    weight_dtypes = (call.in_dtype, call.out_dtype)
    scratch = []
    if call.casts:
        scratch += [pltpu.VMEM(shape, call.row_dtype) for shape in call.weight_shapes]
    results: list[tuple[tuple[int, ...], Any]] = [((call.m, call.w), call.row_dtype)]
    kernel: Any = _forward_kernel
    if call.kind == "backward":
        kernel = _backward_kernel
        gradients = list(zip(call.weight_shapes, weight_dtypes, strict=True))
        scratch += [pltpu.VMEM(shape, jnp.float32) for shape, t in gradients if t != jnp.float32]
        results = [((call.m, call.d), call.row_dtype), ((1, call.m), jnp.dtype(jnp.float32))]
        results += [((call.e, *shape), dtype) for shape, dtype in gradients]

    def body(*refs: Any) -> None:
        kernel(Schedule(*refs[:fields]) if prefetched else plan, call, *refs[fields:])

    inputs, outputs = block_specs(call, None if prefetched else plan)
    limit = min(call.vmem_bytes() * 5 // 4, _chip(interpret).vmem_capacity_bytes - 2**21)
    run = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=fields,
            grid=(plan.expert.shape[0] if prefetched else plan.used[0],),
            in_specs=inputs,
            out_specs=outputs,
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=limit
        ),
        cost_estimate=call.cost(),
        interpret=interpret,
        name=name or f"expert_ffn_{call.kind}",
    )
    return functools.partial(run, *plan) if prefetched else run


def _launch(
    call: Call, group_sizes: Array, interpret: Any, first_expert: Array | int = 0
) -> Callable[..., Any]:
    backward = call.kind == "backward"
    plan = schedule(group_sizes, call.m, call.tiles.rows, visit_idle=backward)
    return pallas_call(call, plan._replace(weights=plan.weights + first_expert), interpret)


def _padded(rows: int, *arrays: Array) -> list[Array]:
    """At least one tile of rows: a block may not be longer than its array."""
    missing = max(0, _LANES - rows)
    return [jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for a in arrays]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def expert_ffn(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    interpret: Any = False,
) -> Array:
    """See api.expert_ffn. Weights of another dtype than the rows are cast on chip.

    An expert that does not fit on chip goes through grouped_matmul: its intermediate through HBM,
    its weights cast there to the dtype of the rows, and their gradients rounded to it.

    Raises:
      ValueError: a dtype that the MXU does not multiply.
    """
    return forward(rows, gate_up, down, group_sizes, row_weights, None, interpret)


def forward(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    first_expert: Array | None,
    interpret: Any = False,
) -> Array:
    """`expert_ffn`; with first_expert the groups are those from it on, of more than are groups."""
    for name, array in (("rows", rows), ("gate_up", gate_up), ("down", down)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name} is {array.dtype}; a TPU takes float32 or bfloat16")
    m, experts = rows.shape[0], group_sizes.shape[0]
    x, weights = _padded(m, rows, row_weights)
    groups: list[Any] = [
        jax.ShapeDtypeStruct((experts, *w.shape[1:]), w.dtype) for w in (gate_up, down)
    ]
    call = plan_call("forward", x, groups[0], groups[1], interpret)
    first = 0 if first_expert is None else first_expert
    if call is None:
        if first_expert is not None:
            gate_up, down = (lax.dynamic_slice_in_dim(w, first, experts) for w in (gate_up, down))
        return _unfused(rows, gate_up, down, group_sizes, row_weights, interpret)
    run = _launch(call, group_sizes, interpret, first)
    (y,) = run(x, weights.astype(jnp.float32)[None], gate_up, down)
    return y[:m]


def _forward(*args: Any) -> tuple[Array, tuple[Array, ...]]:
    return expert_ffn(*args), args[:5]


def _backward(interpret: Any, saved: tuple[Array, ...], dy: Array) -> tuple[Array | None, ...]:
    rows, gate_up, down, group_sizes, row_weights = saved
    m = rows.shape[0]
    x, padded_dy, weights = _padded(m, rows, dy, row_weights)
    call = plan_call("backward", x, gate_up, down, interpret)
    if call is None:

        def unfused(rows: Array, gate_up: Array, down: Array, row_weights: Array) -> Array:
            return _unfused(rows, gate_up, down, group_sizes, row_weights, interpret)

        _, pull = jax.vjp(unfused, rows, gate_up, down, row_weights)
        dx, dgate_up, ddown, dweights = pull(dy)
        return dx, dgate_up, ddown, None, dweights
    run = _launch(call, group_sizes, interpret)
    dx, dweights, dgate_up, ddown = run(
        x, padded_dy, weights.astype(jnp.float32)[None], gate_up, down
    )
    return dx[:m], dgate_up, ddown, None, dweights[0, :m].astype(row_weights.dtype)


expert_ffn.defvjp(_forward, _backward)


def _unfused(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    interpret: Any,
) -> Array:
    product = functools.partial(
        grouped_matmul, group_sizes=group_sizes, implementation="tpu", interpret=interpret
    )
    gate_up, down = gate_up.astype(rows.dtype), down.astype(rows.dtype)
    gate, up = jnp.split(product(rows, gate_up, transpose_weights=True).astype(jnp.float32), 2, 1)
    active = jax.nn.silu(gate) * up * row_weights.astype(jnp.float32)[:, None]
    return product(active.astype(rows.dtype), down)
