"""Weights as generation reads them: in place in their stack, in host memory, int8 with scales.

Generation reads every weight once per token, so a copy would double its time, and a scan copies the
layers of a stack. A `LayerView` avoids that: accelerators fuse the slice into the product, and
kernels take the whole stack. XLA on a CPU would still copy; layers/cpu.py stores separate arrays
there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class LayerView:
    """A view of one layer of a stacked parameter [L, …]."""

    stack: Array
    layer: Int[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight."""
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        """Axes of the layer's weight."""
        return self.stack.ndim - 1

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the stack."""
        return self.stack.dtype

    def rows(self, start: Array | int, count: int) -> Array:
        """Reads `count` entries of the first axis, from `start` on, and no others."""
        begin = (self.layer, start, *(0,) * (self.ndim - 1))
        return lax.dynamic_slice(self.stack, begin, (1, count, *self.shape[1:]))[0]

    def whole(self) -> Array:
        """Returns the weight; a copy, unless the compiler fuses the slice."""
        return lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)

    def astype(self, dtype: DTypeLike) -> Array:
        """Returns the whole weight, cast."""
        return self.whole().astype(dtype)

    def reshape(self, *shape: int) -> "LayerView":
        """Returns a view of the same weight in another shape."""
        return LayerView(self.stack.reshape(self.stack.shape[0], *shape), self.layer)

    def __getitem__(self, index: Any) -> Any:
        return self if index is ... else self.whole()[index]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """int8 weights with one float32 scale per output: values * scale.

    values, int8, has the shape of the weight. scale lacks the summed axes: for [out, …, in]
    matrices it has the first axes, for the experts' down [E, F, W] it is [E, W]. Both may be a
    LayerView, SeparateLayers or HostLayers.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Axes of the weight."""
        return self.values.ndim

    def __getitem__(self, index: Any) -> Any:
        return self if index is ... else self.rows(index)

    def rows(self, index: Array) -> Array:
        """Returns float32 rows of a [V, D] table."""
        return self.values[index].astype(jnp.float32) * self.scale[index][..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostLayers:
    """A stack [L, E, …] of experts in host memory: one row-major array [E, …] per layer.

    The layers are separate arrays, so that loading needs room for no second copy of the stack.
    `computed`: the host multiplies with them; otherwise the device copies the experts it needs.
    """

    layers: tuple[Any, ...]  # arrays, or their shapes
    computed: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stack."""
        return (len(self.layers), *self.layers[0].shape)

    @property
    def ndim(self) -> int:
        """Axes of the stack."""
        return self.layers[0].ndim + 1

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the layers."""
        return self.layers[0].dtype

    def __getitem__(self, index: Any) -> "HostLayers":
        assert index is ...
        return self

    def experts(self, layer: int, chosen: Int[Array, " S"]) -> Array:
        """Copies the chosen experts of a layer to the device, [S, …], one transfer for each."""
        stack = self.layers[layer]
        sizes = (1, *stack.shape[1:])
        rest = (0,) * (stack.ndim - 1)
        rows = (lax.dynamic_slice(stack, (chosen[i], *rest), sizes) for i in range(len(chosen)))
        return jnp.concatenate([jax.device_put(row, jax.memory.Space.Device) for row in rows])

    def whole(self, layer: int) -> Array:
        """Copies all experts of a layer to the device, [E, …]."""
        return jax.device_put(self.layers[layer], jax.memory.Space.Device)


type Weight = Array | LayerView | Quantized


def quantize(weight: Float[Array, "..."], summed: tuple[int, ...]) -> Quantized:
    """Rounds to int8, symmetrically; each output's scale is its largest magnitude / 127.

    `summed` are the axes within an output. Outputs that are all zero have scale 0.
    """
    weight = weight.astype(jnp.float32)
    largest = jnp.abs(weight).max(axis=summed, keepdims=True)
    scale = largest / 127
    values = jnp.round(weight / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
    return Quantized(values, scale.squeeze(summed))
