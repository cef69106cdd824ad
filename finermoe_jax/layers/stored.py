"""Weights as generation reads them: layers in place in their stack, and int8 with scales.

Generation reads every weight once per token, so a copy would double its time, and a scan over a
stack of layers hands out copies. `OfLayer` leaves a layer in its stack: accelerators fuse the slice
into the product, and kernels take the stack. XLA on a CPU copies there too; for it layers/cpu.py
holds the layers as arrays of their own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class OfLayer:
    """Layer `layer` of a stack [L, …], not yet cut out of it."""

    stack: Array
    layer: Int[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer's weight."""
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        """Axes of the layer's weight."""
        return self.stack.ndim - 1

    @property
    def dtype(self) -> jnp.dtype:
        """The stack's."""
        return self.stack.dtype

    def rows(self, start: Array | int, count: int) -> Array:
        """`count` entries of the first axis, from `start` on; the only ones that are read."""
        begin = (self.layer, start, *(0,) * (self.ndim - 1))
        return lax.dynamic_slice(self.stack, begin, (1, count, *self.shape[1:]))[0]

    def whole(self) -> Array:
        """A copy, unless the compiler can read it in place."""
        return lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)

    def astype(self, dtype: DTypeLike) -> Array:
        """The whole weight, cast."""
        return self.whole().astype(dtype)

    def reshape(self, *shape: int) -> "OfLayer":
        """Another shape of the same weight; its stack stays in place."""
        return OfLayer(self.stack.reshape(self.stack.shape[0], *shape), self.layer)

    def __getitem__(self, index: Any) -> Any:
        return self if index is ... else self.whole()[index]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """values * scale: int8 weights with one float32 scale for each output.

    values, int8, has the shape of the weight. scale has its first axes for [out, …, in] matrices,
    that is all but the summed ones; for the experts' down [E, F, W] it is [E, W]. Of a stack of
    layers both are OfLayer or Apart where those are asked for.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Axes of the weight."""
        return self.values.ndim

    def __getitem__(self, index: Any) -> Any:
        return self if index is ... else self.rows(index)

    def rows(self, index: Array) -> Array:
        """float32 rows of a [V, D] table."""
        return self.values[index].astype(jnp.float32) * self.scale[index][..., None]


def in_stack(weight: Array | OfLayer) -> OfLayer:
    """The weight as a layer of a stack; an array of its own is a stack of one."""
    return weight if isinstance(weight, OfLayer) else OfLayer(weight[None], jnp.int32(0))


type Weight = Array | OfLayer | Quantized


def quantize(weight: Float[Array, "..."], summed: tuple[int, ...]) -> Quantized:
    """Rounded to int8, symmetrically, by the largest value along the `summed` axes of each output.

    A scale is that value / 127; outputs that are all zero have scale 0.
    """
    weight = weight.astype(jnp.float32)
    largest = jnp.abs(weight).max(axis=summed, keepdims=True)
    scale = largest / 127
    values = jnp.round(weight / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
    return Quantized(values, scale.squeeze(summed))
