"""Grouped-query attention, its masks and its KV cache. Axis letters: finermoe_jax/config.py."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.config import ModelConfig
from finermoe_jax.layers import normal, param, rotate


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer, or of a stack of layers with a leading axis."""

    keys: Float[Array, "*L B S K H"]
    values: Float[Array, "*L B S K H"]


class KVCache(NamedTuple):
    """Preallocated cache of S slots; the first `length` are written.

    valid marks slots that hold a real token, positions is each row's next position.
    """

    layers: tuple[tuple[LayerCache, ...], ...]
    valid: Bool[Array, "B S"]
    length: Int[Array, ""]
    positions: Int[Array, " B"]


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> KVCache:
    """An empty cache for `batch` rows of at most `slots` tokens, padding included."""
    shape = (batch, slots, config.num_key_value_heads, config.attention_head_dim)
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


def attention_mask(
    valid: Bool[Array, "B S"],
    query_slots: Int[Array, " T"],
    segment_ids: Int[Array, "B S"] | None = None,
) -> Bool[Array, "B 1 T S"]:
    """Which keys each query sees: real tokens at or before it, of its own segment.

    query_slots are the queries' places among the S keys. With segment_ids the queries are
    all S keys.
    """
    slots = jnp.arange(valid.shape[1])
    mask = valid[:, None, :] & (slots[None, None, :] <= query_slots[None, :, None])
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return mask[:, None]


class Attention(nnx.Module):
    """Qwen2's attention: biases (if any) on q, k, v only; rotary positions; N/K heads share k, v."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        d, h = config.hidden_size, config.attention_head_dim
        n, k = config.num_attention_heads, config.num_key_value_heads
        init = normal(config.initializer_range)
        q_axes, kv_axes = ("heads", "head_dim", "embed"), ("kv_heads", "head_dim", "embed")
        self.query = param(rngs, (n, h, d), q_axes, dtype, init)
        self.key = param(rngs, (k, h, d), kv_axes, dtype, init)
        self.value = param(rngs, (k, h, d), kv_axes, dtype, init)
        self.out = param(rngs, (d, n, h), ("embed", "heads", "head_dim"), dtype, init)
        self.bias = config.attention_bias
        if self.bias:
            zeros = nnx.initializers.zeros
            self.query_bias = param(rngs, (n, h), q_axes[:2], dtype, zeros)
            self.key_bias = param(rngs, (k, h), kv_axes[:2], dtype, zeros)
            self.value_bias = param(rngs, (k, h), kv_axes[:2], dtype, zeros)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]],
        mask: Bool[Array, "B 1 T S"],
        cache: LayerCache | None = None,
        cache_length: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attends; with a cache, writes k and v at slot cache_length and attends over all slots."""
        q = jnp.einsum("BTD,NHD->BTNH", x, self.query[...].astype(x.dtype))
        k = jnp.einsum("BTD,KHD->BTKH", x, self.key[...].astype(x.dtype))
        v = jnp.einsum("BTD,KHD->BTKH", x, self.value[...].astype(x.dtype))
        if self.bias:
            q += self.query_bias[...].astype(x.dtype)[None, None]
            k += self.key_bias[...].astype(x.dtype)[None, None]
            v += self.value_bias[...].astype(x.dtype)[None, None]
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            start = (0, cache_length, 0, 0)
            cache = LayerCache(
                jax.lax.dynamic_update_slice(cache.keys, k.astype(cache.keys.dtype), start),
                jax.lax.dynamic_update_slice(cache.values, v.astype(cache.values.dtype), start),
            )
            k, v = cache.keys.astype(x.dtype), cache.values.astype(x.dtype)
        # Masked scores are finite there, so a fully masked row stays free of NaN.
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return jnp.einsum("BTNH,DNH->BTD", y, self.out[...].astype(x.dtype)), cache
