"""Load balance: tokens per expert, the losses, and the selection biases and their update.

config.BalanceConfig chooses one of these functions (docs/howto/balance.md). Padding never counts.
Letters: config/model.py.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.run import BalanceConfig
from finermoe_jax.moe.routing import Routing, SelectionBias, in_groups, out_of_groups, where_allowed


class Balance(NamedTuple):
    """The losses of one MoE layer, without weights, and its load."""

    aux_loss: Float[Array, ""]
    expert_tokens: Float[Array, "B E"]
    z_loss: Float[Array, ""] | None  # None unless config.balance.z_loss is positive


def measure(
    routing: Routing,
    aux_loss: Float[Array, ""],
    mask: Bool[Array, "B T"],
    config: BalanceConfig,
    allowed: Bool[Array, " E"] | None = None,
    before: Float[Array, " E"] | None = None,
) -> Balance:
    """Returns the losses and the load that `config` asks for.

    aux_loss is the layer's Eq. 11 per sequence. kind="batch" replaces it. `allowed` as in `route`,
    `before` as in `batch_load_balancing_loss`.
    """
    # The losses count the tokens too; XLA merges the computations.
    tokens = expert_tokens(routing.experts, mask, routing.logits.shape[-1])
    if config.kind == "batch":
        aux_loss = batch_load_balancing_loss(routing.logits, routing.experts, mask, allowed, before)
    z_loss = router_z_loss(routing.logits, mask, allowed) if config.z_loss else None
    return Balance(aux_loss, tokens, z_loss)


def expert_tokens(
    experts: Int[Array, "B T A"], mask: Bool[Array, "B T"], num_experts: int
) -> Float[Array, "B E"]:
    """Counts the real tokens of each sequence that selected each expert, as float32.

    mask is False at padding. No gradient.
    """
    real = mask.astype(jnp.float32)
    counts = jax.vmap(lambda e, r: jnp.zeros(num_experts).at[e].add(r[:, None]))(experts, real)
    return jax.lax.stop_gradient(counts)


def load_balancing_loss(
    logits: Float[Array, "B T E"],
    experts: Int[Array, "B T A"],
    mask: Bool[Array, "B T"],
    allowed: Bool[Array, " E"] | None = None,
) -> Float[Array, ""]:
    """Returns the sequence-level load-balancing loss, without weight (arXiv 2603.13364, Eq. 11).

    Per sequence of L real tokens: the sum over experts of f_i * P_i, P_i the mean over tokens of
    the softmax over all experts, f_i = N / (A * L) * (tokens that selected i). Averaged over the
    sequences with a real token. A sequence is a row of the batch, even if it packs several
    documents. f has no gradient. `allowed`: experts that tokens may choose (`route`); the softmax
    and N are those of these experts alone.
    """
    return _over_sequences(*_shares(logits, experts, mask, allowed), mask)


def batch_load_balancing_loss(
    logits: Float[Array, "B T E"],
    experts: Int[Array, "B T A"],
    mask: Bool[Array, "B T"],
    allowed: Bool[Array, " E"] | None = None,
    before: Float[Array, " E"] | None = None,
) -> Float[Array, ""]:
    """Returns Eq. 11 over the whole batch as one sequence, weight not applied (arXiv 2501.11873).

    The sum over experts of f_i * P_i: P_i is the mean over the batch's real tokens of the softmax
    over all experts, f_i = N / (A * real tokens) * (tokens that selected i). So only the batch must
    be balanced, not each sequence. On a mesh the sums cover the batches of all devices, for any
    sharding. f has no gradient. `allowed` as in `load_balancing_loss`.

    With gradient accumulation the batch is a microbatch, and a step's loss is the mean over its
    microbatches. `before` then counts the tokens of the step's earlier microbatches that selected
    each expert. f covers them and this microbatch, P this microbatch alone.
    """
    fraction, mean_probability = _shares(logits, experts, mask, allowed, True, before)
    return (fraction * mean_probability).sum()


def pool_balancing_loss(
    layers: list[tuple[Routing, Bool[Array, " E"] | None, Float[Array, " E"] | None]],
    mask: Bool[Array, "B T"],
    kind: Literal["sequence", "batch", "bias", "none"],
) -> Float[Array, ""]:
    """Returns the balancing loss of a pool's layers together (balance.over="pool").

    f and P of Eq. 11 are means over the r layers. `layers` has each layer's routing, its `allowed`
    (`route`) and its `before` (`batch_load_balancing_loss`).
    """
    shares = [
        _shares(each.logits, each.experts, mask, allowed, kind == "batch", before)
        for each, allowed, before in layers
    ]
    fraction, mean_probability = (sum(values) / len(layers) for values in zip(*shares, strict=True))
    if kind == "batch":
        return (fraction * mean_probability).sum()
    return _over_sequences(fraction, mean_probability, mask)


def _open(
    logits: Float[Array, "B T E"], allowed: Bool[Array, " E"] | None
) -> tuple[Float[Array, "B T E"], Array | int]:
    """Returns the logits, -inf where not allowed, and the number of allowed experts."""
    if allowed is None:
        return logits, logits.shape[-1]
    return where_allowed(allowed, logits, -jnp.inf), allowed.sum()


def _shares(
    logits: Float[Array, "B T E"],
    experts: Int[Array, "B T A"],
    mask: Bool[Array, "B T"],
    allowed: Bool[Array, " E"] | None,
    whole_batch: bool = False,
    before: Float[Array, " E"] | None = None,
) -> tuple[Float[Array, "S E"], Float[Array, "S E"]]:
    """Returns f and P of every sequence, S = B, or of the whole batch as one, S = 1.

    Of the whole batch, f covers the choices that `before` counts, too.
    """
    num_experts, active = logits.shape[-1], experts.shape[-1]
    logits, choices = _open(logits, allowed)
    real = mask.astype(jnp.float32)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    length = real.sum(axis=1)[:, None]
    probability = jnp.einsum("BTE,BT->BE", probabilities, real)
    tokens = expert_tokens(experts, mask, num_experts)
    if whole_batch:
        length, probability, tokens = (
            each.sum(axis=0, keepdims=True) for each in (length, probability, tokens)
        )
    counted = length
    if whole_batch and before is not None:
        tokens, counted = tokens + before[None], length + before.sum() / active
    length, counted = (jnp.maximum(each, 1.0) for each in (length, counted))
    return tokens * choices / (active * counted), probability / length


def _over_sequences(
    fraction: Float[Array, "B E"], mean_probability: Float[Array, "B E"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Returns the sum over experts of f_i * P_i, averaged over sequences with a real token."""
    per_sequence = jnp.einsum("BE,BE->B", fraction, mean_probability)
    holds_token = mask.any(axis=1)
    return jnp.where(holds_token, per_sequence, 0.0).sum() / jnp.maximum(holds_token.sum(), 1)


def router_z_loss(
    logits: Float[Array, "B T E"],
    mask: Bool[Array, "B T"],
    allowed: Bool[Array, " E"] | None = None,
) -> Float[Array, ""]:
    """Returns the router z-loss, weight not applied (ST-MoE, arXiv 2202.08906, Eq. 5).

    The mean over the batch's real tokens of (log sum exp of all experts' logits)^2. It keeps logits
    small. With separate_routers it applies to the experts' router. `allowed` as in
    `load_balancing_loss`.
    """
    real = mask.astype(jnp.float32)
    logits, _ = _open(logits, allowed)
    squares = jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))
    return (squares * real).sum() / jnp.maximum(real.sum(), 1.0)


def updated_bias(
    bias: SelectionBias, tokens: Int[Array, " E"], moe: MoEConfig, rate: float
) -> SelectionBias:
    """Returns one layer's selection biases after a step (arXiv 2408.15664, without a loss).

    As in that paper, each bias moves by a fixed rate: up if its load is below the mean, down if it
    is above, by the sign of the error alone. It is added to the logit for the choice of experts;
    the weights are those of the raw logits. The paper has one top-k over all experts, which is what
    plain_top_k does here.

    This project extends the rule to two levels of selection. An expert competes inside its group,
    so its load is compared with the mean of that group, and the biases of a group have zero mean. A
    group competes with the other candidates of its slot: its own bias is added to its sum of raw
    logits, and its load is compared with the mean of the slot. That sum has G_I * R_I terms (r
    times as many in a pool of copies), so the bias of a group moves by rate * sqrt(terms).

    Args:
      bias: the layer's biases, float32.
      tokens: real tokens of the step that selected each expert, over the global batch.
      moe: granularities.
      rate: step of an expert's bias, in units of the logits.
    """
    if bias.groups is None:
        return SelectionBias(_moved(bias.experts, tokens, rate), None)
    per_group = in_groups(tokens, moe)
    experts = _moved(in_groups(bias.experts, moe), per_group, rate)
    per_slot = per_group.sum(axis=-1)
    rate_of_groups = rate * math.sqrt(moe.pool_group_size)
    groups = _moved(bias.groups.reshape(per_slot.shape), per_slot, rate_of_groups)
    return SelectionBias(out_of_groups(experts, moe), groups.reshape(bias.groups.shape))


def _moved(bias: Float[Array, "*G E"], tokens: Int[Array, "*G E"], rate: float) -> Array:
    """Moves biases against the load error along the last axis, and makes their mean zero.

    The sign is computed in integers, so that it is exact and an even load moves nothing.
    """
    total, count = tokens.sum(axis=-1, keepdims=True), tokens.shape[-1]
    mean, rest = total // count, total % count
    below = (tokens < mean) | ((tokens == mean) & (rest > 0))
    sign = below.astype(jnp.float32) - (tokens > mean).astype(jnp.float32)
    moved = bias + rate * sign
    return moved - moved.mean(axis=-1, keepdims=True)
