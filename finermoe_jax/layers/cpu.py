"""Products of a few rows with a weight on a CPU, in the forms that XLA runs near memory's speed.

Decoding reads every weight for one row, or a few. XLA on a CPU has a fast product of a float32
matrix and one vector; its other small products run several times, those of bfloat16 up to thirty
times, below the speed of the memory. benchmarks/inference.py measures what comes of it.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from finermoe_jax.layers.stored import OfLayer
from pallas_kernels.written_out import partial_sums, row_products

FEW_ROWS = 16  # up to which a product is bound by reading the weight
# Of what has to be copied or cast on its way, so much float32 at a time: it stays in cache.
_BLOCK_BYTES = 2 * 2**20
# So much of the partial sums of one row.
_SUMS_BYTES = 8 * 2**20


def few_rows(x: Float[Array, "M K"], weight: Array | OfLayer) -> Float[Array, "M N"]:
    """x @ weight.T in float32, in the forms that XLA runs at a CPU's memory speed."""
    outputs, width = weight.shape
    if isinstance(weight, Array):
        if len(x) == 1 and weight.dtype != jnp.float32:
            # No loop: what a short one does runs on one core.
            count = -(-outputs * partial_sums(width) * 4 // _SUMS_BYTES)
            parts = jnp.array_split(weight, count)
            return jnp.concatenate([_times(x, part) for part in parts], axis=1)
        if weight.dtype == jnp.float32 or _splits(weight):
            return _times(x, weight)
    count = -(-outputs * width * 4 // _BLOCK_BYTES)
    block = -(-outputs // count)

    def body(i: Array, y: Array) -> Array:
        start = jnp.minimum(i * block, outputs - block)
        if isinstance(weight, OfLayer):
            part = weight.rows(start, block)
        else:
            part = jax.lax.dynamic_slice_in_dim(weight, start, block)
        return jax.lax.dynamic_update_slice(y, _times(x, part), (0, start))

    y = jnp.zeros((len(x), outputs), jnp.float32)
    return jax.lax.fori_loop(0, count, body, y)


def _splits(weight: Array | OfLayer) -> bool:
    return weight.dtype == jnp.bfloat16 and _multiplies_bfloat16()


def _times(x: Float[Array, "M K"], weight: Array) -> Float[Array, "M N"]:
    if len(x) == 1 and weight.dtype == jnp.float32:
        return (weight @ x[0])[None]
    if len(x) == 1:
        return row_products(lambda start, stop: weight[:, start:stop], x)[None]
    if _splits(weight):
        # The two halves together have 16 bits of x's 24: their errors are float32's, nearly.
        high = x.astype(jnp.bfloat16)
        low = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
        halves = jnp.concatenate([high, low])
        y = jnp.einsum("MK,NK->MN", halves, weight, preferred_element_type=jnp.float32)
        return y[: len(x)] + y[len(x) :]
    return x @ weight.astype(jnp.float32).T


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU does so natively (AVX-512 BF16 or AMX); elsewhere it is slow."""
    try:
        features = Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return False
    return "avx512_bf16" in features or "amx_bf16" in features
