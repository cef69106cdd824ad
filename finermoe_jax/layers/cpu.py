"""Code paths for XLA on a CPU. On other platforms nothing here changes a program.

The model calls these functions on every platform, so its own code has no branch for a CPU.

* Few rows (`few_rows`): decoding reads every weight for one or a few rows. XLA on a CPU has a fast
  product of a float32 matrix and one vector. Its other small products run several times slower than
  memory bandwidth allows, those of bfloat16 up to thirty times (`widened`, `activation_dtype`).
* Separate layers (`separate_layers`): slicing a layer out of its stack copies it, for every token.
* Materialized operands (`materialized`): XLA fuses the computation of an operand into its
  transpose.

benchmarks/inference.py and benchmarks/train_step.py measure the effect. The kernels' CPU code is in
pallas_kernels (cpu.py, blocks.py, unrolled.py).
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

from finermoe_jax.layers.stored import LayerView
from pallas_kernels.platform import platform
from pallas_kernels.unrolled import partial_sums, row_products

FEW_ROWS = 16  # products with at most so many rows are bound by reading the weight
# float32 bytes copied or cast at a time; they stay in cache.
_BLOCK_BYTES = 2 * 2**20
# Most bytes of one row's partial sums.
_SUMS_BYTES = 8 * 2**20


def uses_few_rows(rows: int) -> bool:
    """True if products of this many rows use `few_rows` on the platform compiled for."""
    return rows <= FEW_ROWS and platform() == "cpu"


def few_rows(x: Float[Array, "M K"], weight: Array | LayerView) -> Float[Array, "M N"]:
    """Returns x @ weight.T in float32, in forms that run at memory bandwidth on a CPU."""
    outputs, width = weight.shape
    if isinstance(weight, Array):
        if len(x) == 1 and weight.dtype != jnp.float32:
            # No loop: the body of a short loop runs on one core.
            count = -(-outputs * partial_sums(width) * 4 // _SUMS_BYTES)
            parts = jnp.array_split(weight, count)
            return jnp.concatenate([_times(x, part) for part in parts], axis=1)
        if weight.dtype == jnp.float32 or _splits(weight):
            return _times(x, weight)
    count = -(-outputs * width * 4 // _BLOCK_BYTES)
    block = -(-outputs // count)

    def body(i: Array, y: Array) -> Array:
        start = jnp.minimum(i * block, outputs - block)
        if isinstance(weight, LayerView):
            part = weight.rows(start, block)
        else:
            part = jax.lax.dynamic_slice_in_dim(weight, start, block)
        return jax.lax.dynamic_update_slice(y, _times(x, part), (0, start))

    y = jnp.zeros((len(x), outputs), jnp.float32)
    return jax.lax.fori_loop(0, count, body, y)


def _splits(weight: Array | LayerView) -> bool:
    return weight.dtype == jnp.bfloat16 and _multiplies_bfloat16()


# Compiled as one function: layers written out share its trace, which has dozens of terms.
@jax.jit
def _times(x: Float[Array, "M K"], weight: Array) -> Float[Array, "M N"]:
    if len(x) == 1 and weight.dtype == jnp.float32:
        return (weight @ x[0])[None]
    if len(x) == 1:
        return row_products(lambda start, stop: weight[:, start:stop], x)[None]
    if _splits(weight):
        # Both halves together keep 16 of x's 24 bits: errors are close to float32's.
        high = x.astype(jnp.bfloat16)
        low = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
        halves = jnp.concatenate([high, low])
        y = jnp.einsum("MK,NK->MN", halves, weight, preferred_element_type=jnp.float32)
        return y[: len(x)] + y[len(x) :]
    return x @ weight.astype(jnp.float32).T


@functools.cache
def _multiplies_bfloat16() -> bool:
    """True if the CPU multiplies bfloat16 natively (AVX-512 BF16 or AMX)."""
    try:
        features = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in features or "amx_bf16" in features


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Casts x to float32 on a CPU, whose small bfloat16 products are slow."""
    return x.astype(jnp.float32) if platform() == "cpu" else x


def activation_dtype(stored: DTypeLike) -> DTypeLike:
    """Returns float32 on a CPU, `stored` elsewhere.

    On a CPU products of few bfloat16 rows run far below memory bandwidth.
    """
    return jnp.dtype(jnp.float32) if platform() == "cpu" else stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SeparateLayers:
    """All layers of a stack as separate arrays."""

    layers: tuple[Any, ...]  # arrays, or their shapes


def separate_layers(stack: Array) -> Array | SeparateLayers:
    """On a CPU, returns the layers as arrays that share the stack's memory; elsewhere the stack.

    Layers whose size is not a multiple of 64 bytes, which are small, are copied.
    """
    if len(stack.devices()) > 1 or next(iter(stack.devices())).platform != "cpu":
        return stack
    layers = (jax.device_put(layer, may_alias=True) for layer in np.asarray(stack))
    return SeparateLayers(tuple(layers))


def after(x: Array, layer: Array | int) -> tuple[Array, Array | int]:
    """Returns both; on a CPU the layer's number is known once x is computed.

    If layers are written out, its compiler would otherwise slice and cast all of them first.
    """
    if platform() != "cpu":
        return x, layer
    return jax.lax.optimization_barrier((x, jnp.int32(layer)))


def materialized(arrays: Any) -> Any:
    """Keeps XLA on a CPU from fusing the computation of these arrays into their uses.

    It would fuse element-wise work into the transposes that weight gradients need, which is several
    times slower than either.
    """
    return jax.lax.platform_dependent(
        arrays, cpu=jax.lax.optimization_barrier, default=lambda arrays: arrays
    )
