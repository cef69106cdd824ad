"""The KV cache of generation: what it holds, and how it is written. Letters: config/model.py."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.config.model import ModelConfig


class LayerCache(NamedTuple):
    """Keys (rotated) and values of a stack of layers; each head's slots are contiguous."""

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]

    def write(self, layer: Array, slot: Array, k: Array, v: Array) -> "LayerCache":
        """With k, v [B, T, K, H] of one layer in the slots from `slot` on."""
        zero = jnp.int32(0)
        at = (layer, zero, zero, slot, zero)
        new = (jnp.einsum("BTKH->BKTH", x).astype(self.keys.dtype)[None] for x in (k, v))
        return LayerCache(
            *(jax.lax.dynamic_update_slice(a, n, at) for a, n in zip(self, new, strict=True))
        )

    def read(self, layer: Array) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Keys and values of one layer, all slots."""
        keys, values = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in self)
        return keys, values


class KVCache(NamedTuple):
    """Preallocated cache of S slots; the first `length` are written.

    valid marks slots that hold a real token, positions is each row's next position.
    """

    layers: tuple[tuple[LayerCache, ...], ...]
    valid: Bool[Array, "B S"]
    length: Int[Array, ""]
    positions: Int[Array, " B"]

    def visible(self, real: Bool[Array, "B T"]) -> Bool[Array, "B S"]:
        """`valid` with the next T slots as `real` says."""
        return jax.lax.dynamic_update_slice(self.valid, real, (0, self.length))

    def advanced(
        self, layers: tuple[tuple[LayerCache, ...], ...], real: Bool[Array, "B T"]
    ) -> "KVCache":
        """The cache after T more tokens of every row, whose keys and values `layers` hold."""
        positions = self.positions + real.sum(axis=1, dtype=jnp.int32)
        return KVCache(layers, self.visible(real), self.length + real.shape[1], positions)


class CacheUse(NamedTuple):
    """One layer's part of the cache: its stack and place there, the next slot, and the slots that
    its token sees."""

    stack: LayerCache
    layer: Int[Array, ""]
    slot: Int[Array, ""]
    visible: Bool[Array, "B S"]


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> KVCache:
    """An empty cache for `batch` rows of at most `slots` tokens, padding included."""
    shape = (batch, config.num_key_value_heads, slots, config.attention_head_dim)
    layers = tuple(
        tuple(
            LayerCache(jnp.zeros((repeats, *shape), dtype), jnp.zeros((repeats, *shape), dtype))
            for _ in pattern
        )
        for pattern, repeats in config.layer_runs
    )
    return KVCache(
        layers, jnp.zeros((batch, slots), bool), jnp.int32(0), jnp.zeros(batch, jnp.int32)
    )
