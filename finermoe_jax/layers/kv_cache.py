"""The KV cache of generation. Letters: config/model.py."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.config.model import ModelConfig


class LayerCache(NamedTuple):
    """Rotated keys and values of a stack of layers; each head's slots are contiguous."""

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]

    def write(self, layer: Array, slot: Array, k: Array, v: Array) -> "LayerCache":
        """Writes k, v [B, T, K, H] of one layer into the slots from `slot` on."""
        zero = jnp.int32(0)
        at = (layer, zero, zero, slot, zero)
        new = (jnp.einsum("BTKH->BKTH", x).astype(self.keys.dtype)[None] for x in (k, v))
        return LayerCache(
            *(jax.lax.dynamic_update_slice(a, n, at) for a, n in zip(self, new, strict=True))
        )

    def read(self, layer: Array) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Returns keys and values of one layer, all slots."""
        keys, values = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in self)
        return keys, values


class KVCache(NamedTuple):
    """Preallocated cache of S slots; the first `length` are written.

    valid marks slots with a real token; positions is each row's next position.
    """

    layers: tuple[tuple[LayerCache, ...], ...]
    valid: Bool[Array, "B S"]
    length: Int[Array, ""]
    positions: Int[Array, " B"]

    def visible(self, real: Bool[Array, "B T"]) -> Bool[Array, "B S"]:
        """Returns `valid` with the next T slots set to `real`."""
        return jax.lax.dynamic_update_slice(self.valid, real, (0, self.length))

    def advanced(
        self, layers: tuple[tuple[LayerCache, ...], ...], real: Bool[Array, "B T"]
    ) -> "KVCache":
        """Returns the cache after T more tokens per row, with their keys and values in `layers`."""
        positions = self.positions + real.sum(axis=1, dtype=jnp.int32)
        return KVCache(layers, self.visible(real), self.length + real.shape[1], positions)


class CacheUse(NamedTuple):
    """One layer's part of the cache.

    Its stack and layer number, the next slot, and the slots that a single token sees.
    """

    stack: LayerCache
    layer: Int[Array, ""]
    slot: Int[Array, ""]
    visible: Bool[Array, "B S"]


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> KVCache:
    """Returns an empty cache for `batch` rows of at most `slots` tokens, padding included."""
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
