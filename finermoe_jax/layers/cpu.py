"""Everything that exists only for XLA on a CPU. On another platform nothing here changes a program.

The model calls these functions on every platform, and reads without a branch for a CPU.

* Few rows (`few_rows`): decoding reads every weight for one row, or a few. XLA on a CPU has a fast
  product of a float32 matrix and one vector; its other small products run several times, those of
  bfloat16 up to thirty times, below the speed of the memory (`widened`, `activation_dtype`).
* Layers apart (`apart`): a layer cut out of its stack is copied, at every token.
* Arrays of their own (`materialized`): what made an operand would be fused into its transpose.

benchmarks/inference.py and benchmarks/train_step.py measure what comes of it. The kernels' CPU
forms are pallas_kernels' own (cpu.py, blocks.py, written_out.py).
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from finermoe_jax.layers.stored import OfLayer
from pallas_kernels.platform import platform
from pallas_kernels.written_out import partial_sums, row_products

FEW_ROWS = 16  # up to which a product is bound by reading the weight
# Of what has to be copied or cast on its way, so much float32 at a time: it stays in cache.
_BLOCK_BYTES = 2 * 2**20
# So much of the partial sums of one row.
_SUMS_BYTES = 8 * 2**20


def has_form_for(rows: int) -> bool:
    """Says that products of so many rows are `few_rows` on the platform compiled for."""
    return rows <= FEW_ROWS and platform() == "cpu"


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
    """Returns whether this CPU does so natively (AVX-512 BF16 or AMX); elsewhere it is slow."""
    try:
        features = Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return False
    return "avx512_bf16" in features or "amx_bf16" in features


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x in float32 on a CPU, whose small products of bfloat16 are slow; elsewhere x."""
    return x.astype(jnp.float32) if platform() == "cpu" else x


def activation_dtype(stored: DTypeLike) -> DTypeLike:
    """Returns the dtype of the activations of a model whose own is `stored`.

    It is float32 on a CPU, since products of few bfloat16 rows run far below the memory's bandwidth
    there, and elsewhere `stored`.
    """
    return jnp.dtype(jnp.float32) if platform() == "cpu" else stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """All layers of a stack, each an array of its own."""

    layers: tuple[Array, ...]


def apart(stack: Array) -> Array | Apart:
    """Returns the layers in the memory of their stack on a CPU; elsewhere the stack.

    Layers whose size is no multiple of 64 bytes, which are small, are copied.
    """
    if len(stack.devices()) > 1 or next(iter(stack.devices())).platform != "cpu":
        return stack
    return Apart(tuple(jax.device_put(layer, may_alias=True) for layer in np.asarray(stack)))


def materialized(arrays: Any) -> Any:
    """Returns the arrays, on a CPU as arrays of their own.

    XLA on a CPU would otherwise fuse the element-wise work that made them into the transposes that
    a weight's gradient needs, which is several times slower than either.
    """
    return jax.lax.platform_dependent(
        arrays, cpu=jax.lax.optimization_barrier, default=lambda arrays: arrays
    )
