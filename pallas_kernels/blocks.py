"""Blocks of rows, each of one expert: what the plain-JAX kernels loop over.

Work and memory traffic are proportional to the rows; only experts that own a row are read. A
block may reach past its expert's last row: what it writes there is overwritten by the next
block, since blocks run in the order of the rows. Letters: E experts, M rows.
"""

import jax.numpy as jnp
from jax import Array, lax

# Rows per block: about an expert's mean share, so that balanced groups fit one block; at least
# enough to feed the vector units, at most what stays in the second-level cache.
_MIN_BLOCK, _MAX_BLOCK = 8, 128


def block_rows(rows: int, experts: int) -> int:
    """Rows per block, for `rows` rows of `experts` experts."""
    mean = max(1, rows // experts)
    return min(max(1 << (mean - 1).bit_length(), _MIN_BLOCK), _MAX_BLOCK)


def blocks(
    group_sizes: Array, rows: int, block: int, skip: int = 0
) -> tuple[Array, Array, Array, Array]:
    """Number of blocks in use, and each block's expert, first row and rows of its own.

    The first `skip` rows of each expert are in none.
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
    """The first `count` rows of every expert, and where they are found again.

    Returns:
      Rows [E, count], and which of them are the expert's own, bool [E, count]; for each row of all
      its place [M] in the flattened heads, and whether it has one, bool [M].
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
    """`x` and one block of zeros after its last row, so that every block is inside."""
    return jnp.pad(x, ((0, block),) + ((0, 0),) * (x.ndim - 1))


def take(x: Array, start: Array, block: int) -> Array:
    """The block at `start` of a padded array, in float32."""
    return lax.dynamic_slice_in_dim(x, start, block).astype(jnp.float32)
