"""Shared parts of the Hopper kernels: a block's three warpgroups, its ring, row tiles, stores.

One persistent block runs on each multiprocessor; of n blocks each takes every n-th item of the
kernel's work. A block has three warpgroups, which run concurrently:

    HBM ──TMA──▶ ring of slots in shared memory ──wgmma──▶ registers ──▶ stage ──TMA──▶ HBM

    warpgroup 2 (copies)                      warpgroups 0 and 1 (multiply, half of a tile each)
    ────────────────────                      ──────────────────────────────────────────────────
    for each step of each item:               for each step of each item:
      waits for `freed` of the slot  ◀──────    waits for `filled` of the slot
      starts the step's TMA copies              starts its products, which accumulate in registers
      (they pass `filled` on arrival) ──────▶   waits for the products of the previous step, and
                                                arrives at `freed` of that step's slot
                                              after the item's last step:
                                                waits for all products, frees the last slot,
                                                stores the sums: registers, stage, TMA to HBM

A step fills one slot: the operands of one product, STEP contracted elements deep. Steps are
numbered across all items of a block, and step s uses slot s modulo the number of slots. So the
copies of the next item start while the current one is multiplied. `filled` of a slot passes when
all its copies have arrived, `freed` when both multiplying warpgroups have; the first round waits
for no `freed`. `fill` is the left column, `drain` the right one.

**Tiles.** TMA addresses an array in HBM in groups of eight rows and 128 bytes (the tiles that wgmma
reads). So a tile of rows begins at a multiple of eight, at or before its expert's first row, and
may include rows of the experts before and after its own; `work` lists its own rows. TMA fills
out-of-bounds elements with zeros, so sizes need not be multiples of a tile. Only arrays whose last
axis is not a multiple of 64, or the one before it of 8, are padded in HBM first (`padded`); the
published sizes need no such copy.

**Stores.** A warpgroup's 64 rows go to HBM through its own stage, STAGE_BYTES of each row at a
time. The stage has two halves: one is written while TMA reads the other. If some of the rows belong
to another expert, only the own ones are written, in powers of two (`store_partial`).

**Interpreted**, each warpgroup is a thread of XLA's CPU pool, and a smaller pool may deadlock: with
few cores set XLA_FLAGS=--xla_force_host_platform_device_count=8.
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
# Maps (row, rows, column, columns) of a warpgroup's values to their place in HBM.
Target = Callable[[Any, int, int, int], Any]

# Rows of one warpgroup's wgmma, and of a tile shared by two warpgroups.
WARPGROUP_ROWS = 64
TILE_ROWS = 2 * WARPGROUP_ROWS
# A swizzled row of shared memory, the unit of copies and products.
SWIZZLE_BYTES = 128
# Bytes of each output row staged at a time.
STAGE_BYTES = 64
# Contracted elements per slot of the ring: one swizzled row of a two-byte type.
STEP = SWIZZLE_BYTES // 2
ALL = slice(None)
RING_BYTES = 192 * 1024
# Tuned: with fewer for the copying warpgroup, ptxas spills registers of the fused kernel.
_COPY_REGISTERS, _MULTIPLY_REGISTERS = 80, 208

_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
_BLACKWELL = ("Blackwell", "B100", "B200", "B300", "GB10", "GB200", "GB300", "RTX PRO", "RTX 50")


# --- devices --------------------------------------------------------------------------------


def uses_wgmma(interpret: Interpret) -> bool:
    """Returns True if the device compiled for runs these kernels, False if it runs cpu.py.

    Raises:
      NotImplementedError: not interpreted, and a GPU older than Hopper or no GPU.
    """
    if interpret:
        return True
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    device = jax.devices()[0] if abstract is None else abstract
    capability = getattr(device, "compute_capability", None)
    if capability is not None and str(capability)[:1].isdigit():
        major = int(str(capability).split(".")[0])
    else:  # compiled ahead of time: only the device's name is known
        kind = device.device_kind
        major = 9 if any(name in kind for name in _HOPPER) else 0
        major = 10 if any(name in kind for name in _BLACKWELL) else major
    if major < 9:
        raise NotImplementedError(
            f"device {device.device_kind!r} (platform {device.platform}): the GPU kernels need "
            "compute capability 9 (Hopper) or later; use implementation='cpu' (plain JAX)"
        )
    return major == 9


def _multiprocessors(interpret: Interpret) -> int:
    """Persistent blocks to launch: one per multiprocessor, two if interpreted."""
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
    """Runs a kernel; body takes references of operands, outputs and, by name, the scratch."""
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
    """Runs a block: `copy` on one warpgroup, `multiply(warpgroup)` on the other two.

    Both take one of the kernel's `items` and the number of its first step, and return the step
    after its last. Their counts agree, so they use the same slots.
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
    """Calls body(item, step) -> next step for this block's items; steps number ring slots."""
    block, stride = lax.axis_index("sm"), lax.axis_size("sm")
    mine = lax.div(jnp.maximum(count - block + stride - 1, 0), jnp.int32(stride))
    lax.fori_loop(0, mine, lambda i, step: body(i * stride + block, step), jnp.int32(0))


# --- tiles of rows --------------------------------------------------------------------------

# Type checkers wrongly consider these abstract.
_Tiling: Any = plgpu.TilingTransform
_Swizzle: Any = plgpu.SwizzleTransform


def swizzled(dtype: DTypeLike, row_bytes: int = SWIZZLE_BYTES) -> tuple[Any, Any]:
    """Layout of shared memory that wgmma reads and TMA writes without bank conflicts."""
    return _Tiling((8, row_bytes // jnp.dtype(dtype).itemsize)), _Swizzle(row_bytes)


def padded(x: Array) -> Array:
    """Pads x with zeros to TMA's requirements on the last two axes: multiples of 8 and 64."""
    missing = [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % 8), (0, -x.shape[-1] % STEP)]
    return jnp.pad(x, missing) if any(after for _, after in missing) else x


def work(
    group_sizes: Array, rows: int, tile_rows: int, first_expert: Array | int = 0
) -> tuple[Array, Array]:
    """Returns tiles of rows, int32 [4, tiles], and the number in use, int32 [1].

    For each tile: its expert plus first_expert, its first row (a multiple of 8), and, relative to
    that row, the first and one past the last of the expert's own rows.
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
    """Returns the first row of a tile of `work`."""
    return eights(table[1, tile])


def own_rows(table: Any, tile: Array, first: Array | int) -> tuple[Array, Array]:
    """Returns a tile's own rows (start, stop) relative to the 64 rows from its row `first` on."""
    start, stop = table[2, tile], table[3, tile]
    return jnp.clip(start - first, 0, WARPGROUP_ROWS), jnp.clip(stop - first, 0, WARPGROUP_ROWS)


def eights(row: Array) -> Array:
    """Marks row as a multiple of 8."""
    return pl.multiple_of(row, 8)


# --- the ring -------------------------------------------------------------------------------


class Ring(NamedTuple):
    """Slots of shared memory, each with both operands of a step, and their barriers."""

    left: Any  # [slots, ...]
    right: Any  # [slots, ...]
    filled: Any  # [slots] barriers: all copies of the step have arrived
    freed: Any  # [slots] barriers: both warpgroups have multiplied the slot

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.filled.shape[0]


def ring_scratch(
    slots: int, dtype: DTypeLike, arrivals: int = 2, **operands: tuple[int, int]
) -> dict[str, Any]:
    """Scratch of a ring: operands by name with a slot's shape; `arrivals` copies fill a slot."""
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
    """Starts the copies of `steps` steps, each once its slot is free; returns the next step.

    copies(i) lists those of step i: (source, left or right of the ring, rows of the slot).
    `missing` is the number of copies fewer than the ring's arrivals.
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
    """Calls multiply(i, slot) for each filled slot, which starts `products` wgmma products.

    A slot is freed one step later, when its products are done.
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
    """Returns float32 [64, columns] in registers for each of `columns`.

    accumulate(*accumulators) starts products into them and waits until they are done.
    """

    def scope(*accumulators: Any) -> list[Array]:
        accumulate(*accumulators)
        return [each[...] for each in accumulators]

    return pl.run_scoped(scope, *[plgpu.ACC((WARPGROUP_ROWS, each)) for each in columns])


# --- stores ---------------------------------------------------------------------------------


class Stage(NamedTuple):
    """Shared memory between registers and HBM, for both warpgroups."""

    whole: Any  # [2 halves, 2 warpgroups, 64, columns], in TMA's tiles of eight rows
    partial: Any  # [2 warpgroups, 64, columns], untiled: any rows can be written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch:
    """The last references of every kernel: its ring and its stage."""

    x_ring: Any
    filled: Any
    freed: Any
    stage_whole: Any
    stage_partial: Any

    @property
    def stage(self) -> Stage:
        """The references of the stage."""
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
    """Returns the Target that starts at row `first` and column `column` of out."""
    return lambda row, rows, at, columns: out.at[
        pl.ds(first + row, rows), pl.ds(column + at, columns)
    ]


def store_whole(values: Array, stage: Any, warpgroup: Array, target: Target) -> None:
    """Writes a warpgroup's [64, columns] to target(row, rows, column, columns)."""
    columns = stage.shape[-1]
    pieces = -(-values.shape[1] // columns)
    for i in range(pieces):
        # The copy that last used this half must have read it; the first piece follows the last one
        # of the previous tile.
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

    TMA cannot write a number of rows known only at run time, so they are written in powers of two
    from untiled shared memory.
    """
    stage, columns = stage.at[warpgroup], stage.shape[-1]
    rows = jnp.maximum(own[1] - own[0], 0)
    for at in range(0, values.shape[1], columns):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _store_untiled(stage, values[:, at : at + columns].astype(stage.dtype))
        plgpu.commit_smem()
        size = WARPGROUP_ROWS
        while size:
            row = own[0] + (rows & ~(2 * size - 1))

            @pl.when((rows & size) != 0)
            def _copy(size=size, row=row, at=at):
                plgpu.copy_smem_to_gmem(stage.at[pl.ds(row, size)], target(row, size, at, columns))

            size //= 2


def _store_untiled(stage: Any, values: Array) -> None:
    """Stores values to untiled shared memory, where bank conflicts cannot be avoided."""
    if hasattr(plgpu, "store"):
        plgpu.store(stage, values, optimized=False)
    else:  # before JAX 0.12, which rejects this assignment because of the conflicts
        stage[...] = values
