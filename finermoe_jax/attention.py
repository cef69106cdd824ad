"""Grouped-query attention, its masks and its KV cache.

Axis letters: finermoe_jax/config.py; here G is the queries that share one k, v head, Q all of them
over all tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.config import ModelConfig
from finermoe_jax.layers import normal, param, project, rotate


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


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B 1 T S"],
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v; each of the K heads serves N / K queries. Scores are float32.

    The queries of one k, v head are stacked along the token axis, so that both products are
    plain batched ones. Masked scores are finite: a fully masked row stays free of NaN.
    """
    batch, tokens, heads, width = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, tokens, kv_heads, heads // kv_heads, width)
    q = jnp.einsum("BTKGH->BKGTH", q).reshape(batch, kv_heads, -1, width)
    k, v = jnp.einsum("BSKH->BKSH", k), jnp.einsum("BSKH->BKSH", v)
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32)
    mask = jnp.tile(mask, (1, 1, heads // kv_heads, 1))
    scores = jnp.where(mask, scores / width**0.5, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum("BKQS,BKSH->BKQH", probabilities, v)
    y = y.reshape(batch, kv_heads, heads // kv_heads, tokens, width)
    return jnp.einsum("BKGTH->BTKGH", y).reshape(batch, tokens, heads, width)


class Attention(nnx.Module):
    """Qwen2's attention: biases on q, k, v only; rotary positions; N / K query heads share k, v."""

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
        q = project("BTD,NHD->BTNH", x, self.query[...])
        k = project("BTD,KHD->BTKH", x, self.key[...])
        v = project("BTD,KHD->BTKH", x, self.value[...])
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
        y = attend(q, k, v, mask)
        return project("BTNH,DNH->BTD", y, self.out[...]), cache
