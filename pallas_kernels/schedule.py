"""The order of a grouped kernel's visits: (tile of rows, expert) pairs.

Rows are sorted by expert and cut into tiles of equal size. A tile with rows of several experts is
visited once for each of them. Visits follow the order of the rows, so a tile stays on chip until
its last visit and an expert's weights until its last row: each is moved once. Letters: E experts, M
rows.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Schedule(NamedTuple):
    """Arrays of length `visits(...)`; entries past `used` repeat the last visit and do nothing."""

    expert: Array  # int32, whose rows and weight gradient the visit computes
    weights: Array  # int32, whose weights are on chip: `expert`, except that idle experts load none
    tile: Array  # int32
    start: Array  # int32 [E], each expert's first row
    stop: Array  # int32 [E], one past its last row
    used: Array  # int32 [1], number of real visits
    layer: Array  # int32 [1], layer of the stack that weight gradients are written to


def visits(rows: int, experts: int, tile_rows: int) -> int:
    """Returns the most visits that any distribution of the rows needs."""
    return -(-rows // tile_rows) + experts - 1


def schedule(group_sizes: Array, rows: int, tile_rows: int, visit_idle: bool = False) -> Schedule:
    """Returns the visits of int32 group_sizes [E] over `rows` rows in tiles of `tile_rows`.

    Experts without rows are omitted or, with visit_idle, visited once to write zeros as their
    weight gradients. Rows past the sum of group_sizes belong to no visit.
    """
    experts = group_sizes.shape[0]
    stop = jnp.cumsum(group_sizes, dtype=jnp.int32)
    start = stop - group_sizes
    busy = group_sizes > 0
    first = jnp.minimum(start // tile_rows, -(-rows // tile_rows) - 1)
    per_expert = jnp.where(busy, (stop - 1) // tile_rows - first + 1, int(visit_idle))
    end = jnp.cumsum(per_expert)
    used = end[-1:]
    visit = jnp.minimum(jnp.arange(visits(rows, experts, tile_rows)), jnp.maximum(used - 1, 0))
    expert = jnp.minimum((visit[:, None] >= end[None]).sum(axis=1), experts - 1)
    tile = first[expert] + visit - (end - per_expert)[expert]
    # The last busy expert so far, or the first busy one.
    loaded = jnp.maximum(lax.cummax(jnp.where(busy, jnp.arange(experts), -1)), jnp.argmax(busy))
    parts = (expert, loaded[expert], tile, start, stop, used, jnp.zeros(1))
    return Schedule(*(part.astype(jnp.int32) for part in parts))
