"""Grouped-query attention and its KV cache. Axis letters: config/model.py."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.config.model import ModelConfig
from finermoe_jax.layers import cpu
from finermoe_jax.layers.basic import RMSNorm, normal, param, project, rotate
from finermoe_jax.layers.causal import causal_attention
from finermoe_jax.layers.sharding import ONE_DEVICE, Placement


class LayerCache(NamedTuple):
    """Keys (rotated) and values of a stack of layers; each head's slots lie side by side."""

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


class KVCache(NamedTuple):
    """Preallocated cache of S slots; the first `length` are written.

    valid marks slots that hold a real token, positions is each row's next position.
    """

    layers: tuple[tuple[LayerCache, ...], ...]
    valid: Bool[Array, "B S"]
    length: Int[Array, ""]
    positions: Int[Array, " B"]


class CacheUse(NamedTuple):
    """What one layer needs of the cache: its stack and place there, the next slot, and which slots
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


def attend_one(
    q: Float[Array, "B 1 N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B 1 N H"]:
    """softmax(q k^T / sqrt(H)) v of one query a row over the visible slots; in float32."""
    batch, _, heads, width = q.shape
    kv_heads = keys.shape[1]
    f32 = jnp.float32
    keys, values = cpu.widened(keys), cpu.widened(values)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, width).astype(keys.dtype)
    scores = jnp.einsum("BKGH,BKSH->BKGS", grouped, keys, preferred_element_type=f32)
    scores = jnp.where(visible[:, None, None], scores / width**0.5, jnp.finfo(f32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    y = jnp.einsum("BKGS,BKSH->BKGH", probabilities, values)
    return y.reshape(q.shape).astype(q.dtype)


class Attention(nnx.Module):
    """Rotary positions; N / K query heads share k and v; no bias on the output projection.

    As the config says, with biases on q, k, v (Qwen2) and RMSNorm over head_dim of q and k (Qwen3).
    """

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
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.query_norm = RMSNorm(h, config.rms_norm_eps, dtype, rngs)
            self.key_norm = RMSNorm(h, config.rms_norm_eps, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]],
        segment_ids: Int[Array, "B T"] | None,
        placement: Placement = ONE_DEVICE,
        cache: CacheUse | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attends causally within segments (flash.causal_attention, which also says where).

        With a cache k and v are also written there, and a single token attends to what it holds;
        several must be its first.
        """
        q = project("BTD,NHD->BTNH", x, self.query[...])
        k = project("BTD,KHD->BTKH", x, self.key[...])
        v = project("BTD,KHD->BTKH", x, self.value[...])
        if self.bias:
            q += self.query_bias[...].astype(x.dtype)[None, None]
            k += self.key_bias[...].astype(x.dtype)[None, None]
            v += self.value_bias[...].astype(x.dtype)[None, None]
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, *angles), rotate(k, *angles)
        written = None
        if cache is not None:
            written = cache.stack.write(cache.layer, cache.slot, k, v)
        if cache is None or written is None or x.shape[1] > 1:
            y = causal_attention(q, k, v, segment_ids, placement)
        else:
            keys = jax.lax.dynamic_index_in_dim(written.keys, cache.layer, keepdims=False)
            values = jax.lax.dynamic_index_in_dim(written.values, cache.layer, keepdims=False)
            y = attend_one(q, keys, values, cache.visible)
        return project("BTNH,DNH->BTD", y, self.out[...]), written
