"""The FineRMoE layer: route, exchange, experts, combine (paper §3).

Dropless: routed rows are sorted by expert, computed in groups of any size, and returned to their
slots (moe/exchange.py). Letters: config/model.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.config.model import ModelConfig
from finermoe_jax.layers.basic import MLP, normal, param, project
from finermoe_jax.layers.sharding import ONE_DEVICE, Placement
from finermoe_jax.moe.balance import load_balancing_loss
from finermoe_jax.moe.bank import ExpertBank, HostBank, bank_of_layer
from finermoe_jax.moe.exchange import routed_experts
from finermoe_jax.moe.routing import Routing, SelectionBias, route


@dataclasses.dataclass
class Chosen:
    """A layer's choice of experts.

    Attributes:
      routing: as `FineRMoE.route` returns it.
      experts: [B, T, A] in slot order, numbers in `bank`.
      weights: [B, T, A] in slot order.
      bank: the experts.
    """

    routing: Routing
    experts: Int[Array, "B T A"]
    weights: Float[Array, "B T A"]
    bank: ExpertBank | HostBank


class FineRMoE(nnx.Module):
    """The FineRMoE layer: fine-grained routed experts plus a gated shared expert (paper §3).

    Subclass it and override `route` or `__call__` to try another router (`with_layer`).

    Examples:
      >>> import dataclasses
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import finermoe_jax as fm
      >>> dense = fm.load_hf("finermoe_jax/demo/model").config
      >>> config = dataclasses.replace(dense, moe=fm.MoEConfig(intermediate_granularity=8))
      >>> layer = fm.FineRMoE(config, "float32", nnx.Rngs(0))
      >>> y, routing, aux_loss = jax.jit(layer)(jnp.ones((1, 3, 128)), jnp.ones((1, 3), bool))
      >>> y.shape, routing.experts.shape  # two slots, one active expert each
      ((1, 3, 128), (1, 3, 2))
    """

    # Set by model/stack.py for each layer: its pool's experts, which of them tokens may choose, the
    # choices of earlier microbatches (balance.kind="batch"), and the layer's choice, if it was made
    # while an earlier layer was computed.
    bank: ExpertBank | HostBank | None = None
    allowed: Bool[Array, " E"] | None = None
    tokens_before: Float[Array, " E"] | None = None
    chosen: Chosen | None = None

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs, place: int = 0):
        """Draws random weights.

        Args:
          config: the architecture, with experts.
          dtype: of the weights.
          rngs: source of the random keys.
          place: index of the layer in its pool of experts_across layers. The layer at 0 has the
            parameters of all the pool's experts; the others need `bank`.
        """
        assert config.moe is not None
        self.moe = moe = config.moe
        self.place = place
        d, e = config.hidden_size, moe.pool_size
        init = normal(config.initializer_range)
        self.router = param(rngs, (e, d), ("router", "embed"), dtype, init)
        if moe.separate_routers:
            groups = moe.output_granularity * moe.pool_candidates
            self.group_router = param(rngs, (groups, d), ("router", "embed"), dtype, init)
        if moe.depth_vector:
            self.depth_vector = param(rngs, (d,), ("depth",), dtype, nnx.initializers.zeros)
        if place == 0:
            self._draw_experts(config, dtype, rngs)
        if config.shared_expert_size:
            std, width = config.initializer_range, config.shared_expert_size
            self.shared = MLP(d, width, std, dtype, rngs, hidden_axis="shared_mlp")
            self.shared_gate = param(rngs, (d,), ("gate_in",), dtype, init)
        if moe.concat_proj != "none":
            self.concat_proj = param(rngs, (d, d), ("concat", "embed"), dtype, init)
        if moe.selection_bias:
            zeros = nnx.initializers.zeros
            self.expert_bias = param(rngs, (e,), ("router",), jnp.float32, zeros)
            if not moe.plain_top_k:
                groups = moe.output_granularity * moe.pool_candidates
                self.group_bias = param(rngs, (groups,), ("router",), jnp.float32, zeros)

    def _draw_experts(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        d, e = config.hidden_size, self.moe.pool_size
        f, w = config.expert_intermediate_size, config.expert_output_size
        init = normal(config.initializer_range)
        # Gate rows first, then up rows. The model width is the minor axis: otherwise XLA pads a
        # copy of all experts at every call on a TPU.
        self.gate_up = param(
            rngs, (e, 2 * f, d), ("expert", "expert_mlp", "expert_in"), dtype, init
        )
        self.down = param(rngs, (e, f, w), ("expert", "expert_mlp", "expert_out"), dtype, init)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        placement: Placement = ONE_DEVICE,
        router_input: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing, Float[Array, ""]]:
        """Computes the layer.

        Args:
          x: [B, T, D].
          mask: bool [B, T], True at real tokens; only the loss uses it.
          placement: the devices and the kernel that compute the experts.
          router_input: [B, T, D], an earlier layer's input, from which the experts are chosen
            (moe.route_ahead); None: x.

        Returns:
          The output [B, T, D] in the dtype of x, the `Routing` of every token, and the float32 loss
          of Eq. 11, weight not applied.
        """
        with jax.named_scope("router"):
            routed, chosen = self._with_depth(x), self.chosen
            if chosen is None:
                chosen, x = self.choose(x if router_input is None else router_input, x, placement)
            routing = chosen.routing
            aux_loss = load_balancing_loss(  # Eq. 11
                routing.logits, routing.experts, mask, self.allowed
            )
        with jax.named_scope("exchange"):
            y = routed_experts(routed, chosen.experts, chosen.weights, chosen.bank, placement)
            y = self._combine(y)  # Eq. 7, [B, T, A, W] to [B, T, D]
        if self.moe.concat_proj == "routed":
            y = self._project(y)
        if hasattr(self, "shared"):
            with jax.named_scope("shared_expert"):
                y += self._gated_shared(x, placement)
        if self.moe.concat_proj == "all":
            y = self._project(y)
        return y, routing, aux_loss

    def choose(
        self, router_input: Float[Array, "B T D"], x: Float[Array, "B T D"], placement: Placement
    ) -> tuple[Chosen, Float[Array, "B T D"]]:
        """Chooses experts and makes their bank ready (`HostBank.fetch`).

        Args:
          router_input: what the router reads.
          x: the FFN input of the layer that is computed meanwhile.
          placement: as in `__call__`.

        Returns:
          The choice, and x, whose use is scheduled after it.
        """
        routing, slot_order = self.route(self._with_depth(router_input))  # Algorithm 1
        if placement.force_balance:
            routing, slot_order = route(routing.logits, self.moe, x.dtype, even=True)
        experts, weights = (
            jnp.take_along_axis(chosen, slot_order, axis=-1)
            for chosen in (routing.experts, routing.weights)
        )
        bank, experts, x = self.experts(placement).fetch(experts, x)
        return Chosen(routing, experts, weights, bank), x

    def _with_depth(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if not self.moe.depth_vector:
            return x
        return x + self.depth_vector[...].astype(x.dtype)[None, None]

    def route(self, x: Float[Array, "B T D"]) -> tuple[Routing, Int[Array, "B T A"]]:
        """Chooses each token's experts (Algorithm 1).

        A subclass may choose in another way. Each slot must get T_I of its own experts. If
        `self.allowed` is set (train.psr), all of them must be allowed.

        Args:
          x: [B, T, D], the layer's input or, with moe.route_ahead, an earlier layer's.

        Returns:
          A `Routing`, and int [B, T, A]: the order that sorts its experts by slot
          (`moe.routing.route`).
        """
        dtype = jnp.dtype(self.moe.router_dtype)

        def logits(weight: nnx.Param, across: int) -> Float[Array, "B T E"]:
            tokens, rows = x.astype(dtype), weight[...].astype(dtype)
            if across == 1:
                return _product(tokens, rows)
            # One product for each layer's experts, because the last bits of a product depend on
            # its number of columns. If all other layers' experts are masked, the results equal
            # those of experts_across=1 bit by bit.
            apart = rows.reshape(-1, across, rows.shape[1])
            each = [_product(tokens, apart[:, j]) for j in range(across)]
            return jnp.stack(each, axis=-1).reshape(*x.shape[:2], -1)

        moe, candidates = self.moe, None
        if moe.separate_routers:
            candidates = logits(self.group_router, moe.pool_candidates // moe.output_expansion)
        chosen = logits(self.router, moe.experts_across)
        bias = self.selection_bias()
        return route(chosen, moe, x.dtype, candidates, bias=bias, allowed=self.allowed)

    def selection_bias(self) -> SelectionBias | None:
        """Returns the biases of the choice of experts, or None if the model has none."""
        if not self.moe.selection_bias:
            return None
        groups = None if self.moe.plain_top_k else self.group_bias[...].astype(jnp.float32)
        return SelectionBias(self.expert_bias[...].astype(jnp.float32), groups)

    def experts(self, placement: Placement) -> ExpertBank | HostBank:
        """Returns the pool's experts, read in place if the loop over layers set `bank`."""
        if self.bank is not None:
            return self.bank
        return bank_of_layer(self.gate_up[...], self.down[...], placement)

    def _combine(self, y: Float[Array, "B T A W"]) -> Float[Array, "B T D"]:
        """Sums the T_I weighted experts of each slot and concatenates the slots."""
        slots, per_slot = self.moe.output_granularity, self.moe.active_per_group
        tokens = y.shape[:2]
        return y.reshape(*tokens, slots, per_slot, -1).sum(axis=3).reshape(*tokens, -1)

    def _gated_shared(
        self, x: Float[Array, "B T D"], placement: Placement
    ) -> Float[Array, "B T D"]:
        gate = jnp.einsum("BTD,D->BT", x, self.shared_gate[...].astype(x.dtype))
        return jax.nn.sigmoid(gate)[..., None] * self.shared(x, placement)

    def _project(self, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return project("BTC,DC->BTD", y, self.concat_proj[...])


def _product(x: Float[Array, "B T D"], weight: Float[Array, "E D"]) -> Float[Array, "B T E"]:
    # HIGHEST: with a TPU's default, bfloat16 operands, 0.08 % of the tokens choose other experts.
    return jnp.einsum("BTD,ED->BTE", x, weight, precision=jax.lax.Precision.HIGHEST)
