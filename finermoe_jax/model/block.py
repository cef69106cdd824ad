"""One layer of the decoder. Axis letters: config/model.py.

The named scopes are those of analysis/causes.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from finermoe_jax.config.model import LayerKind, ModelConfig
from finermoe_jax.config.run import BalanceConfig
from finermoe_jax.layers.attention import Attention
from finermoe_jax.layers.basic import MLP, RMSNorm
from finermoe_jax.layers.kv_cache import CacheUse, LayerCache
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.moe.balance import Balance, measure
from finermoe_jax.moe.layer import FineRMoE
from finermoe_jax.moe.routing import Routing


class EarlierInputs(NamedTuple):
    """FFN inputs, after post_norm, of the k = moe.route_ahead layers before a layer.

    The router of layer l reads that of layer max(l - k, 0). `choose(x, router_input)`, if given,
    chooses the next layer's experts: x is this layer's FFN input, router_input is what the next
    layer's router reads. Returns x.
    """

    inputs: tuple[Float[Array, "B T D"], ...] = ()  # of the k last layers, the last one first
    none_yet: Bool[Array, ""] | bool = False  # True for layer 0: its own input takes their place
    choose: Callable[[Array, Array], Array] | None = None

    def then(
        self, own: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"] | None, tuple[Array, ...]]:
        """Returns what the layer's router reads in place of `own`, and the next layer's inputs."""
        if not self.inputs:
            return None, ()
        if self.none_yet is False:
            inputs = self.inputs
        else:
            inputs = tuple(jnp.where(self.none_yet, own, each) for each in self.inputs)
        return inputs[-1], (own, *inputs[:-1])


class Block(nnx.Module):
    """Pre-norm attention and FFN, each added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        kind: LayerKind,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        place: int | None = None,
    ):
        """`place`: index of an MoE layer in its pool (`FineRMoE`)."""
        d, eps, std = config.hidden_size, config.rms_norm_eps, config.initializer_range
        self.input_norm = RMSNorm(d, eps, dtype, rngs)
        self.attention = Attention(config, dtype, rngs)
        self.post_norm = RMSNorm(d, eps, dtype, rngs)
        if kind == "moe":
            self.moe = FineRMoE(config, dtype, rngs, place or 0)
        else:
            self.mlp = MLP(d, config.intermediate_size, std, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Array, Array],
        segment_ids: Array | None,
        real: Array,
        cache: CacheUse | None,
        placement: Placement,
        balance: BalanceConfig,
        earlier: EarlierInputs,
    ) -> tuple[
        Array, LayerCache | None, tuple[Routing, Balance] | None, tuple[Float[Array, "B T D"], ...]
    ]:
        """Returns x, the written cache, an MoE layer's routing and balance, and `earlier.inputs`.

        The latter are those of the next layer.
        """
        with jax.named_scope("norms"):
            normed = self.input_norm(x)
        with jax.named_scope("attention"):
            attended, written = self.attention(normed, angles, segment_ids, placement, cache)
        with jax.named_scope("norms"):
            x = x + attended
            normed = self.post_norm(x)
            router_input, inputs = earlier.then(normed)
        if earlier.choose is not None:
            normed = earlier.choose(normed, inputs[-1])
        if not hasattr(self, "moe"):
            with jax.named_scope("dense_ffn"):
                return x + self.mlp(normed, placement), written, None, inputs
        # Subclasses of FineRMoE may lack the argument.
        ahead = {} if router_input is None else {"router_input": router_input}
        y, routing, aux_loss = self.moe(normed, real, placement, **ahead)
        with jax.named_scope("router"):
            load = measure(
                routing, aux_loss, real, balance, self.moe.allowed, self.moe.tokens_before
            )
        with jax.named_scope("norms"):
            return x + y, written, (routing, load), inputs
