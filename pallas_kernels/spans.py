"""Spans of rows: the rows of one expert that a TPU kernel moves and computes in one visit.

Rows are sorted by expert. An expert's first span begins at its first row, rounded down to a
multiple of 16, because the TPU's DMA moves whole tiles. Each further span begins where the previous
one ends. An expert with g rows therefore needs ceil((g + its first row % 16) / span rows) visits,
wherever it begins. Letters: E experts, M rows, V visits.

A kernel calls `Streams.visit` with its computation. Reads and writes are double-buffered: the next
span arrives and the previous results leave during the computation. A tile that experts share is
completed on chip: each visit keeps its last tile, and the next one takes the rows before its own
first row from it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Rows of one bfloat16 tile, or of two float32 tiles, in HBM. DMA moves whole tiles.
ROWS = 16
LANES = 128


class Spans(NamedTuple):
    """Arrays of length V. Only the first `used` entries are visits."""

    expert: Array  # int32, whose rows and weight gradient the visit computes
    weights: Array  # int32, whose weights are on chip: `expert`, except that idle experts load none
    first: Array  # int32, first row moved, a multiple of ROWS
    start: Array  # int32, first own row
    stop: Array  # int32, one past the last own row
    used: Array  # int32 [1], number of real visits
    layer: Array  # int32 [1], layer of the stack that weight gradients are written to


def lane_length(rows: int, span_rows: int) -> int:
    """Returns the length of an array [1, M] along lanes, so that every span's buffer is inside."""
    return -(-rows // LANES) * LANES + span_rows + LANES


def visits(rows: int, experts: int, span_rows: int) -> int:
    """Returns the most visits that any distribution of the rows needs."""
    return (rows + experts * (span_rows + ROWS - 2)) // span_rows


def spans(group_sizes: Array, rows: int, span_rows: int, visit_idle: bool = False) -> Spans:
    """Returns the visits of int32 group_sizes [E] over `rows` rows, at most span_rows per visit.

    Experts without rows are omitted or, with visit_idle, visited once to write zeros as their
    weight gradients. Rows past the sum of group_sizes belong to no visit.
    """
    experts = group_sizes.shape[0]
    stop = jnp.cumsum(group_sizes, dtype=jnp.int32)
    start = stop - group_sizes
    base = start // ROWS * ROWS
    busy = group_sizes > 0
    per_expert = jnp.where(busy, -(-(stop - base) // span_rows), int(visit_idle))
    end = jnp.cumsum(per_expert)
    used = end[-1:]
    every = jnp.arange(visits(rows, experts, span_rows))
    visit = jnp.minimum(every, jnp.maximum(used - 1, 0))
    expert = jnp.minimum((visit[:, None] >= end[None]).sum(axis=1), experts - 1)
    first = base[expert] + (visit - (end - per_expert)[expert]) * span_rows
    own = jnp.maximum(start[expert], first)
    last = jnp.where(every < used, jnp.minimum(stop[expert], first + span_rows), own)
    # The last busy expert so far, or the first busy one.
    loaded = jnp.maximum(lax.cummax(jnp.where(busy, jnp.arange(experts), -1)), jnp.argmax(busy))
    parts = (expert, loaded[expert], first, own, last, used, jnp.zeros(1))
    return Spans(*(part.astype(jnp.int32) for part in parts))


@dataclasses.dataclass(frozen=True)
class Stream:
    """An array whose rows move between HBM and VMEM."""

    array: Any  # in HBM: [M, C], or [1, lane_length(M, span rows)] with rows along lanes
    buffer: Any  # in VMEM: [2, span rows, C], or [2, 1, span rows + 128]
    edge: Any = None  # in VMEM, of an array that is written: one tile, [ROWS, C] or [1, 128]

    @property
    def axis(self) -> int:
        """Axis of the rows."""
        return int(self.buffer.shape[1] == 1)

    @property
    def unit(self) -> int:
        """Rows of a tile."""
        return LANES if self.axis else ROWS

    def extent(self, plan: Spans, visit: Any) -> tuple[Any, Any]:
        """Returns the first row of a visit's tiles, and their number of rows.

        An array along lanes is small and moves as the whole buffer: a size that is known at compile
        time saves scalar work.
        """
        unit = self.unit
        first = plan.first[visit] & -unit
        if self.axis:
            return pl.multiple_of(first, unit), self.buffer.shape[2]
        size = ((plan.stop[visit] + unit - 1) & -unit) - first
        return pl.multiple_of(first, unit), pl.multiple_of(size, unit)

    def part(self, ref: Any, first: Any, size: Any) -> Any:
        """Returns the view of some rows."""
        return ref.at[:, pl.ds(first, size)] if self.axis else ref.at[pl.ds(first, size)]

    def copy(self, plan: Spans, visit: Any, semaphores: Any, out: bool) -> Any:
        """Returns the transfer of a visit's rows."""
        slot = visit & 1
        first, size = self.extent(plan, visit)
        ends = self.part(self.array, first, size), self.part(self.buffer.at[slot], 0, size)
        return pltpu.make_async_copy(*(ends[::-1] if out else ends), semaphores.at[slot])

    def join(self, plan: Spans, visit: Any) -> None:
        """Completes the first tile with the rows before the visit's, and keeps the last tile."""
        buffer, unit = self.buffer.at[visit & 1], self.unit
        first, _ = self.extent(plan, visit)
        head = self.part(buffer, 0, unit)
        row = lax.broadcasted_iota(jnp.int32, (1, unit) if self.axis else (unit, 1), self.axis)
        head[...] = jnp.where(row < plan.start[visit] - first, self.edge[...], head[...])
        # A span that ends with a tile leaves no rows to the next one: any tile will do.
        last = jnp.minimum(
            (plan.stop[visit] - first) & -unit, self.buffer.shape[1 + self.axis] - unit
        )
        self.edge[...] = self.part(buffer, pl.multiple_of(last, unit), unit)[...]


@dataclasses.dataclass(frozen=True)
class Streams:
    """The arrays that one kernel moves by rows, with two DMA semaphores for each side."""

    plan: Spans
    read: Sequence[Stream]
    written: Sequence[Stream]
    read_semaphores: Any
    write_semaphores: Any

    def busy(self, visit: Any) -> Any:
        """Returns True if a visit has rows."""
        return self.plan.stop[visit] > self.plan.start[visit]

    def visit(self, compute: Callable[[], None]) -> None:
        """Fetches the visit's rows, computes, and stores the results.

        Starts the next visit's reads before the computation, and waits for the previous visit's
        writes after it. A visit's last tile is written as a whole, and again by the next visit:
        their order matters.
        """
        visit, last = pl.program_id(0), pl.num_programs(0) - 1
        before = jnp.maximum(visit - 1, 0)
        written_before = (visit > 0) & self.busy(before)
        pl.when((visit == 0) & self.busy(visit))(lambda: self._start(visit))
        after = jnp.minimum(visit + 1, last)
        pl.when((visit < last) & self.busy(after))(lambda: self._start(after))

        @pl.when(self.busy(visit))
        def _() -> None:
            for stream in self.read:
                stream.copy(self.plan, visit, self.read_semaphores, False).wait()
            compute()
            for stream in self.written:
                stream.join(self.plan, visit)
            pl.when(written_before)(lambda: self._wait(before))
            for stream in self.written:
                stream.copy(self.plan, visit, self.write_semaphores, True).start()
            pl.when(visit == last)(lambda: self._wait(visit))

        pl.when(written_before & ~self.busy(visit))(lambda: self._wait(before))

    def _start(self, visit: Any) -> None:
        for stream in self.read:
            stream.copy(self.plan, visit, self.read_semaphores, False).start()

    def _wait(self, visit: Any) -> None:
        for stream in self.written:
            stream.copy(self.plan, visit, self.write_semaphores, True).wait()
