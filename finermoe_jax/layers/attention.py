"""Grouped-query attention as a module. Axis letters: config/model.py."""

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from finermoe_jax.config.model import ModelConfig
from finermoe_jax.layers.basic import RMSNorm, normal, param, project, rotate
from finermoe_jax.layers.causal import attend_one, causal_attention
from finermoe_jax.layers.kv_cache import CacheUse, LayerCache
from finermoe_jax.layers.sharding import ONE_DEVICE, Placement


class Attention(nnx.Module):
    """Rotary grouped-query attention: N / K query heads share k and v; no output bias.

    The config adds biases on q, k, v (Qwen2) or RMSNorm over head_dim of q and k (Qwen3).
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
        """Attends causally within segments (`causal.causal_attention`).

        With a cache, k and v are also written there. A single token attends to the cache; several
        tokens must be the cache's first.
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
        written = None if cache is None else cache.stack.write(cache.layer, cache.slot, k, v)
        if cache is None or written is None or x.shape[1] > 1:
            y = causal_attention(q, k, v, segment_ids, placement)
        else:
            y = attend_one(q, *written.read(cache.layer), cache.visible)
        return project("BTNH,DNH->BTD", y, self.out[...]), written
