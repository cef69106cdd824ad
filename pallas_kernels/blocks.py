"""Blocks of rows, each of one expert: the plain-JAX kernels loop over these.

Work and memory traffic are proportional to the rows; only experts with rows are read. A block may
reach past its expert's last row: blocks run in the order of the rows, so the next block overwrites
that part. Letters: E experts, M rows.
"""

import jax.numpy as jnp
from jax import Array, lax

# Rows per block: about an expert's mean share, so that balanced groups fit one block; at least
# enough for the vector units, at most what fits the second-level cache.
_MIN_BLOCK, _MAX_BLOCK = 8, 128


def block_rows(rows: int, experts: int) -> int:
    """Returns the rows per block, for `rows` rows of `experts` experts."""
    mean = max(1, rows // experts)
    return min(max(1 << (mean - 1).bit_length(), _MIN_BLOCK), _MAX_BLOCK)


def blocks(
    group_sizes: Array, rows: int, block: int, skip: int = 0
) -> tuple[Array, Array, Array, Array]:
    """Returns the number of blocks in use, and each block's expert, first row and own rows.

    Skips the first `skip` rows of each expert.
    """
    experts = group_sizes.shape[0]
    sizes = jnp.maximum(group_sizes - skip, 0)
    per_expert = -(-sizes // block)
    last = jnp.cumsum(per_expert)
    index = jnp.arange(max(1, rows // block + min(experts, rows)))
    expert = jnp.minimum(jnp.searchsorted(last, index, side="right"), experts - 1)
    done = (index - (last - per_expert)[expert]) * block
    start = (jnp.cumsum(group_sizes) - group_sizes)[expert] + skip + done
    return last[-1], expert, start, sizes[expert] - done


def heads(group_sizes: Array, rows: int, count: int) -> tuple[Array, Array, Array, Array]:
    """Returns the first `count` rows of every expert, and the map from all rows to these.

    Returns:
      Rows [E, count]; True for the expert's own rows, bool [E, count]; for each of all rows, its
      place [M] in the flattened heads, and True if it has one, bool [M].
    """
    experts = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)
    start = ends - group_sizes
    places = jnp.arange(count)
    head = jnp.minimum(start[:, None] + places[None], rows - 1)
    own = places[None] < group_sizes[:, None]
    row = jnp.arange(rows)
    expert = jnp.minimum(jnp.searchsorted(ends, row, side="right"), experts - 1)
    place = row - start[expert]
    inside = place < jnp.minimum(count, group_sizes[expert])
    return head, own, expert * count + jnp.minimum(place, count - 1), inside


def pad(x: Array, block: int) -> Array:
    """Appends one block of zero rows to x, so that every block is inside."""
    return jnp.pad(x, ((0, block),) + ((0, 0),) * (x.ndim - 1))


def take(x: Array, start: Array, block: int) -> Array:
    """Returns the block at `start` of a padded array, in float32."""
    return lax.dynamic_slice_in_dim(x, start, block).astype(jnp.float32)
