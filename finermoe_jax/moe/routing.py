"""Bi-level routing: pure functions of arrays.

One router drives both levels (paper §3, Algorithm 1). The sparse sum layer selects the T_I best
experts in every group; the sparse concatenation layer keeps one group per output slot. Expert e =
((slot * R_O + candidate) * R_I + copy) * G_I + slice. Letters: config/model.py.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from finermoe_jax.config.model import MoEConfig


class Routing(NamedTuple):
    """A router's decision; the active experts are sorted by decreasing logit."""

    logits: Float[Array, "*T E"]  # the router's, of all experts
    experts: Int[Array, "*T A"]  # active experts, by falling logit
    weights: Float[Array, "*T A"]  # their weights


class SelectionBias(NamedTuple):
    """Float32 biases that change which experts are chosen, not their weights (moe/balance.py)."""

    experts: Float[Array, " E"]  # added to the logits to choose experts inside a group
    groups: Float[Array, " OR"] | None  # added to the groups' sums; None with plain_top_k


def route(
    logits: Float[Array, "*T E"],
    moe: MoEConfig,
    weight_dtype: DTypeLike,
    candidate_logits: Float[Array, "*T OR"] | None = None,
    even: bool = False,
    bias: SelectionBias | None = None,
) -> tuple[Routing, Int[Array, "*T A"]]:
    """Chooses G_O * T_I experts per token and their weights (paper Algorithm 1).

    Args:
      logits: the router's raw logits; the selection uses their dtype.
      moe: granularities and variants.
      weight_dtype: dtype of the weights, cast from a float32 softmax.
      candidate_logits: a second router's logits of the candidate groups, for separate_routers only.
      even: assigns tokens to experts in turn (`even_experts`), whatever the logits say.
      bias: added for the choice only; the weights are those of the raw logits.

    Returns:
      The routing, and the order [*T, A] that sorts its experts by slot: applied to `experts` or
      `weights` along the last axis, it puts the T_I experts of slot 0 first.
    """
    if even:
        experts, scale = even_experts(logits.shape[:-1], moe), None
    elif moe.plain_top_k:
        _, experts = jax.lax.top_k(_biased(logits, bias), moe.num_active)
        scale = None
    else:
        experts, scale = _select_in_groups(logits, moe, candidate_logits, bias)
    # Sort by decreasing logit; ties keep slot order, the lower expert first.
    selected = jnp.take_along_axis(logits, experts, axis=-1)
    by_logit = jnp.argsort(-selected, axis=-1, stable=True)
    slot_order = jnp.argsort(by_logit, axis=-1)
    experts = jnp.take_along_axis(experts, by_logit, axis=-1)
    selected = jnp.take_along_axis(selected, by_logit, axis=-1).astype(jnp.float32)

    if moe.pre_softmax:
        total = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1, keepdims=True)
        weights = jnp.exp(selected - total)
    else:
        weights = jax.nn.softmax(selected, axis=-1)
    if moe.norm_topk_prob:
        weights /= weights.sum(axis=-1, keepdims=True)
    if scale is not None:
        weights *= jnp.take_along_axis(scale, by_logit, axis=-1)
    return Routing(logits, experts.astype(jnp.int32), weights.astype(weight_dtype)), slot_order


def even_experts(tokens: tuple[int, ...], moe: MoEConfig) -> Int[Array, "*T A"]:
    """Returns experts in slot order for tokens of this shape, each expert equally often.

    Every slot takes its candidate groups in turn, and the experts of each group in turn. Loads are
    exactly even if the number of tokens is a multiple of R_O times the experts of a group.
    """
    slots, candidates, group = moe.output_granularity, moe.output_expansion, moe.group_size
    token = jnp.arange(math.prod(tokens))[:, None, None]
    turn = token // candidates * moe.active_per_group + jnp.arange(moe.active_per_group)[None, None]
    first = (jnp.arange(slots)[None, :, None] * candidates + token % candidates) * group
    return (first + turn % group).reshape(*tokens, moe.num_active)


def _biased(logits: Float[Array, "*T E"], bias: SelectionBias | None) -> Float[Array, "*T E"]:
    if bias is None:
        return logits
    return logits + bias.experts.reshape((1,) * (logits.ndim - 1) + (-1,))


def _select_in_groups(
    logits: Float[Array, "*T E"],
    moe: MoEConfig,
    candidate_logits: Float[Array, "*T OR"] | None,
    bias: SelectionBias | None,
) -> tuple[Int[Array, "*T A"], Float[Array, "*T A"] | None]:
    """Returns experts in slot order and, with a second router, their factors."""
    slots, candidates, group = moe.output_granularity, moe.output_expansion, moe.group_size
    tokens = logits.shape[:-1]
    grouped = logits.reshape(*tokens, slots, candidates, group)
    biased = grouped if bias is None else _biased(logits, bias).reshape(grouped.shape)
    _, marked = jax.lax.top_k(biased, moe.active_per_group)
    # The sum is over all raw logits of a group, selected or not, as in the published model. Ties:
    # top_k and argmax both take the lowest index.
    scores = (
        grouped.sum(axis=-1)
        if candidate_logits is None
        else candidate_logits.reshape(*tokens, slots, candidates)
    )
    compared = scores
    if bias is not None and bias.groups is not None:
        compared = scores + bias.groups.reshape((1,) * len(tokens) + (slots, candidates))
    chosen = jnp.argmax(compared, axis=-1)
    inside = jnp.take_along_axis(marked, chosen[..., None, None], axis=-2)[..., 0, :]
    group_index = jnp.arange(slots).reshape((1,) * len(tokens) + (slots,)) * candidates + chosen
    experts = (group_index[..., None] * group + inside).reshape(*tokens, moe.num_active)
    if candidate_logits is None:
        return experts, None
    # The paper gives no formula for separate routers. Through argmax alone the second router would
    # get no gradient, so this code scales each slot by the chosen candidate's probability.
    probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    scale = jnp.take_along_axis(probabilities, chosen[..., None], axis=-1)
    return experts, jnp.repeat(scale[..., 0], moe.active_per_group, axis=-1)
