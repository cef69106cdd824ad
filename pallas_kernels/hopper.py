"""Shared parts of the Hopper kernels: a block's three warpgroups, its ring, row tiles, stores.

One persistent block runs on each multiprocessor; of n blocks each takes every n-th item of the
kernel's work. A block has three warpgroups, threads that run side by side:

    HBM ──TMA──▶ ring of slots in shared memory ──wgmma──▶ registers ──▶ stage ──TMA──▶ HBM

    warpgroup 2 (copies)                      warpgroups 0 and 1 (multiply, half of a tile each)
    ────────────────────                      ──────────────────────────────────────────────────
    for each step of each item:               for each step of each item:
      waits for `freed` of the slot  ◀──────    waits for `filled` of the slot
      starts the step's TMA copies              starts its products out of it, in registers
      (they pass `filled` on arrival) ──────▶   waits until the products of the step before are
                                                done, and arrives at `freed` of that step's slot
                                              after the item's last step:
                                                waits for all products, frees the last slot,
                                                stores the sums: registers, stage, TMA to HBM

A step is one slot's worth: the operands of one product, STEP contracted elements deep. Steps are
numbered through all items of a block, and step s uses slot s modulo their number: the copies of the
next item start while the present one is multiplied. `filled` of a slot passes when all its copies
have arrived, `freed` when both multiplying warpgroups have; in the first round nothing has to be
freed. `fill` is the left column, `drain` the right one.

**Tiles.** TMA cuts an array in HBM into whole groups of eight rows and of 128 bytes (the tiles that
wgmma reads), so tiles of rows begin at the multiple of eight at or before the first row of their
expert. A tile may therefore reach into the rows of the experts before and after its own; `work`
says which rows are its own. TMA fills what is outside an array with zeros, so no size need divide
a tile, but arrays whose last axis is not a multiple of 64, or the one before it of 8, are padded to
that in HBM first (`padded`): a copy that the published sizes never need.

**Stores.** A warpgroup's 64 rows go to HBM through its own stage, STAGE_BYTES of each row at a
time. The stage has two halves: one is written while TMA reads the other. Where some of the rows are
another expert's, only the own ones are written, in powers of two (`store_partial`).

**Interpreted**, each warpgroup is a thread of XLA's CPU pool, and a pool of fewer threads may wait
forever: with few cores set XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

Interpret = bool | plgpu.InterpretGPUParams
# Of an array in HBM, what a warpgroup writes: target(row, rows, column, columns), from its first.
Target = Callable[[Any, int, int, int], Any]

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
RING_BYTES = 192 * 1024
# Found by trying: with fewer for the copying warpgroup ptxas spills registers of the fused kernel.
_COPY_REGISTERS, _MULTIPLY_REGISTERS = 80, 208

_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
_BLACKWELL = ("Blackwell", "B100", "B200", "B300", "GB10", "GB200", "GB300", "RTX PRO", "RTX 50")


# --- devices --------------------------------------------------------------------------------


def uses_wgmma(interpret: Interpret) -> bool:
    """Says that the device compiled for runs these kernels; False: the fallback of cpu.py runs.

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


def _multiprocessors(interpret: Interpret) -> int:
    """Persistent blocks to launch: one for each multiprocessor, a few where interpreted."""
    if interpret:
        return 2
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    cores = jax.devices()[0].core_count if abstract is None else abstract.num_cores
    return cores or 132


# --- a kernel -------------------------------------------------------------------------------


def run(
    name: str,
    body: Callable[..., None],
    operands: Sequence[Array],
    out_type: Any,
    scratch: Mapping[str, Any],
    interpret: Interpret,
) -> Any:
    """Returns the kernel's outputs; body takes references of operands, outputs, and the scratch."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        kernel_name=name,
        grid=(_multiprocessors(interpret),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpret is True else interpret,
    )(*operands)


def by_warpgroup(
    items: Callable[[], Array],
    copy: Callable[[Array, Array], Array],
    multiply: Callable[[Array], Callable[[Array, Array], Array]],
) -> None:
    """Runs a block: `copy` on one warpgroup, `multiply(warpgroup)` on the two others.

    Both take an item of the kernel's `items` and the number of its first step, and return the
    number of the step after its last. They count alike, so they meet at the same slots.
    """
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 2)
    def _copy() -> None:
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        _each_of_mine(items(), copy)

    @pl.when(warpgroup < 2)
    def _multiply() -> None:
        plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")
        one = multiply(warpgroup)
        _each_of_mine(items(), one)
        plgpu.wait_smem_to_gmem(0)


def _each_of_mine(count: Array, body: Callable[[Array, Array], Array]) -> None:
    """body(item, step) -> next step, for the items of this block; step numbers ring slots."""
    block, stride = lax.axis_index("sm"), lax.axis_size("sm")
    mine = lax.div(jnp.maximum(count - block + stride - 1, 0), jnp.int32(stride))
    lax.fori_loop(0, mine, lambda i, step: body(i * stride + block, step), jnp.int32(0))


# --- tiles of rows --------------------------------------------------------------------------

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


def work(
    group_sizes: Array, rows: int, tile_rows: int, first_expert: Array | int = 0
) -> tuple[Array, Array]:
    """Tiles of rows: int32 [4, tiles], and [1], how many are in use.

    Of each tile: its expert, counted from first_expert, its first row (a multiple of 8), and the
    first and one past the last of its rows that are the expert's, counted from the tile's first.
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
    return jnp.stack([expert + first_expert, row, *own]).astype(jnp.int32), end[-1:]


def first_row(table: Any, tile: Array) -> Array:
    """The first row of a tile of `work`."""
    return eights(table[1, tile])


def own_rows(table: Any, tile: Array, first: Array | int) -> tuple[Array, Array]:
    """A tile's own rows, as the 64 rows from its row `first` on count them: from, up to."""
    start, stop = table[2, tile], table[3, tile]
    return jnp.clip(start - first, 0, WARPGROUP_ROWS), jnp.clip(stop - first, 0, WARPGROUP_ROWS)


def eights(row: Array) -> Array:
    """row, which is a multiple of 8: TMA reads the group of eight that it is in."""
    return pl.multiple_of(row, 8)


# --- the ring -------------------------------------------------------------------------------


class Ring(NamedTuple):
    """Slots of shared memory, each for both operands of a step, and what says who may use them."""

    left: Any  # [slots, ...]
    right: Any  # [slots, ...]
    filled: Any  # of each slot: passes when all copies of its step have arrived
    freed: Any  # of each slot: passes when both warpgroups have multiplied what it holds

    @property
    def slots(self) -> int:
        """The number of slots."""
        return self.filled.shape[0]


def ring_scratch(
    slots: int, dtype: DTypeLike, arrivals: int = 2, **operands: tuple[int, int]
) -> dict[str, Any]:
    """Scratch of a ring: operands by name with the shape of a slot; so many copies fill a slot."""
    layout = swizzled(dtype)
    memory = {
        name: plgpu.SMEM((slots, *shape), dtype, transforms=layout)
        for name, shape in operands.items()
    }
    return memory | {
        "filled": plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots),
        "freed": plgpu.Barrier(num_arrivals=2, num_barriers=slots),
    }


def fill(
    ring: Ring,
    first: Array,
    steps: int | Array,
    copies: Callable[[Array], Sequence[tuple[Any, Any, Any]]],
    missing: int = 0,
) -> Array:
    """Starts the copies of `steps` steps, each once its slot is free; returns the step after them.

    copies(i) are those of the i-th: (from, left or right of the ring, rows of the slot). Where they
    are fewer than the ring's arrivals, `missing` says by how many.
    """

    def one(i: Array, _: None) -> None:
        of_step, step = copies(i), first + i
        slot = lax.rem(step, jnp.int32(ring.slots))

        @pl.when(step >= ring.slots)
        def _wait() -> None:
            plgpu.barrier_wait(ring.freed.at[slot])

        for source, operand, place in of_step:
            plgpu.copy_gmem_to_smem(source, operand.at[slot].at[place], ring.filled.at[slot])
        for _unmade in range(missing):
            plgpu.barrier_arrive(ring.filled.at[slot])

    lax.fori_loop(0, steps, one, None)
    return first + steps


def drain(
    ring: Ring,
    first: Array,
    steps: int | Array,
    multiply: Callable[[Array, Array], None],
    products: int = 1,
) -> None:
    """multiply(i, slot) for each filled slot, which starts so many wgmma products.

    A slot is freed one step late, when its products are done.
    """
    slots = jnp.int32(ring.slots)

    def one(i: Array, _: None) -> None:
        slot = lax.rem(first + i, slots)
        plgpu.barrier_wait(ring.filled.at[slot])
        multiply(i, slot)
        plgpu.wgmma_wait(products)

        @pl.when(i > 0)
        def _free() -> None:
            plgpu.barrier_arrive(ring.freed.at[lax.rem(first + i - 1, slots)])

    lax.fori_loop(0, steps, one, None)
    plgpu.wgmma_wait(0)

    @pl.when(steps > 0)
    def _free_last() -> None:
        plgpu.barrier_arrive(ring.freed.at[lax.rem(first + steps - 1, slots)])


def sums(accumulate: Callable[..., None], *columns: int) -> list[Array]:
    """float32 [64, columns] in registers, one for each of columns.

    accumulate(*accumulators) starts products into them and has them done when it returns.
    """

    def scope(*accumulators: Any) -> list[Array]:
        accumulate(*accumulators)
        return [each[...] for each in accumulators]

    return pl.run_scoped(scope, *[plgpu.ACC((WARPGROUP_ROWS, each)) for each in columns])


# --- stores ---------------------------------------------------------------------------------


class Stage(NamedTuple):
    """Shared memory by which a warpgroup's rows go to HBM, for both warpgroups."""

    whole: Any  # [2 halves, 2 warpgroups, 64, columns], as TMA writes whole tiles of eight rows
    partial: Any  # [2 warpgroups, 64, columns], of which any rows can be written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch:
    """The last references of every kernel: those of its ring and of its stage."""

    x_ring: Any
    filled: Any
    freed: Any
    stage_whole: Any
    stage_partial: Any

    @property
    def stage(self) -> Stage:
        """The way to HBM."""
        return Stage(self.stage_whole, self.stage_partial)


def stage_scratch(dtype: DTypeLike) -> dict[str, Any]:
    """Scratch of a Stage: STAGE_BYTES of each row."""
    columns = STAGE_BYTES // jnp.dtype(dtype).itemsize
    shape = (2, WARPGROUP_ROWS, columns)
    layout = swizzled(dtype, STAGE_BYTES)
    return {
        "stage_whole": plgpu.SMEM((2, *shape), dtype, transforms=layout),
        "stage_partial": plgpu.SMEM(shape, dtype),
    }


def window(out: Any, first: Array, column: Array) -> Target:
    """The target of a store whose row 0 and column 0 are out's `first` and `column`."""
    return lambda row, rows, at, columns: out.at[
        pl.ds(first + row, rows), pl.ds(column + at, columns)
    ]


def store_whole(values: Array, stage: Any, warpgroup: Array, target: Target) -> None:
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
    stage: Stage,
    warpgroup: Array,
    own: tuple[Array, Array],
    target: Target,
) -> None:
    """Writes rows own[0] to own[1] of a warpgroup's 64 to target(row, rows, column, columns)."""
    whole = own[1] - own[0] == WARPGROUP_ROWS

    @pl.when(whole)
    def _whole():
        store_whole(values, stage.whole, warpgroup, target)

    @pl.when(jnp.logical_not(whole))
    def _partial():
        store_partial(values, stage.partial, warpgroup, own, target)


def store_partial(
    values: Array,
    stage: Any,
    warpgroup: Array,
    own: tuple[Array, Array],
    target: Target,
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
