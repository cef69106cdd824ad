"""Bi-level routing: pure functions of arrays.

One router drives both levels (paper §3, Algorithm 1). The sparse sum layer selects the T_I best
experts in every group; the sparse concatenation layer keeps one group per output slot. Expert e =
((slot * R_O + candidate) * R_I + copy) * G_I + slice.

If r neighbouring layers share a pool of r * N experts (experts_across, ReXMoE, arXiv 2510.17483),
each routes to the whole pool. Pool expert p = e * r + j is expert e of the pool's layer j (`home`).
The layers alternate, so every device of an expert-parallel mesh has experts of all r layers.
docs/pooling.md. Letters: config/model.py.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from finermoe_jax.config.arguments import check_integer
from finermoe_jax.config.model import MoEConfig
from finermoe_jax.errors import InputError


class Routing(NamedTuple):
    """A router's decision; the active experts are sorted by decreasing logit."""

    logits: Float[Array, "*T E"]  # the router's, of all experts of the pool
    experts: Int[Array, "*T A"]  # active experts' numbers in the pool, by falling logit
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
    allowed: Bool[Array, " E"] | None = None,
) -> tuple[Routing, Int[Array, "*T A"]]:
    """Chooses G_O * T_I experts per token and their weights (paper Algorithm 1).

    Args:
      logits: the router's raw logits; the selection uses their dtype.
      moe: granularities and variants.
      weight_dtype: dtype of the weights, cast from a float32 softmax.
      candidate_logits: a second router's logits of the candidate groups, for separate_routers only.
      even: assigns tokens to experts in turn (`even_experts`), whatever the logits say.
      bias: added for the choice only; the weights are those of the raw logits.
      allowed: False at experts that no token may choose (moe/psr.py). Their logits are excluded
        from all sums and softmaxes. None: all are allowed.

    Returns:
      The routing, and the order [*T, A] that sorts its experts by slot: applied to `experts` or
      `weights` along the last axis, it puts the T_I experts of slot 0 first.
    """
    open_logits = logits if allowed is None else where_allowed(allowed, logits, -jnp.inf)
    if even:
        experts, scale = even_experts(logits.shape[:-1], moe), None
    elif moe.plain_top_k:
        _, experts = jax.lax.top_k(_biased(open_logits, bias), moe.num_active)
        scale = None
    else:
        experts, scale = _select_in_groups(open_logits, moe, candidate_logits, bias, allowed)
    # Sort by decreasing logit; ties keep slot order, the lower expert first.
    selected = jnp.take_along_axis(logits, experts, axis=-1)
    by_logit = jnp.argsort(-selected, axis=-1, stable=True)
    slot_order = jnp.argsort(by_logit, axis=-1)
    experts = jnp.take_along_axis(experts, by_logit, axis=-1)
    selected = jnp.take_along_axis(selected, by_logit, axis=-1).astype(jnp.float32)

    if moe.pre_softmax:
        total = jax.nn.logsumexp(open_logits.astype(jnp.float32), axis=-1, keepdims=True)
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

    Every slot takes its candidate groups in turn, and the experts of each group in turn; with
    plain_top_k, all its experts in turn. Loads are exactly even if the number of tokens is a
    multiple of the candidate groups times the experts of a group.
    """
    slots, candidates, group = moe.output_granularity, moe.pool_candidates, moe.pool_group_size
    if moe.plain_top_k:
        candidates, group = 1, candidates * group
    token = jnp.arange(math.prod(tokens))[:, None, None]
    turn = token // candidates * moe.active_per_group + jnp.arange(moe.active_per_group)[None, None]
    first = (jnp.arange(slots)[None, :, None] * candidates + token % candidates) * group
    return _in_pool((first + turn % group).reshape(*tokens, moe.num_active), moe)


def home(
    expert: Int[Array, "*N"] | int, experts_across: int = 1, layer: int = 0
) -> tuple[Int[Array, "*N"] | int, Int[Array, "*N"] | int]:
    """Returns the layer that owns an expert of a pool, and the expert's number in that layer.

    Args:
      expert: numbers in the pool, such as `out.routing[layer].experts`.
      experts_across: r, the layers of a pool; 1: every layer has its own experts.
      layer: index of the layer that chose the expert, counting MoE layers from 0.

    Returns:
      The index of the owner among the MoE layers, and e = (slot, candidate, copy, slice) in it.

    Raises:
      InputError: a number that is not an integer or is too small.

    Examples:
      >>> import finermoe_jax as fm
      >>> fm.home(7, experts_across=2, layer=4)  # layers 4 and 5 share a pool
      (5, 3)
    """
    check_integer("experts_across", experts_across, 1)
    check_integer("layer", layer, 0)
    if isinstance(expert, (np.ndarray, jax.Array)) and expert.ndim:
        if not jnp.issubdtype(expert.dtype, jnp.integer):
            raise InputError(f"expert is an array of {expert.dtype}; it must contain integers")
    else:
        check_integer("expert", expert, 0)
    return layer - layer % experts_across + expert % experts_across, expert // experts_across


def in_groups(pool: Shaped[Any, "*T E"], moe: MoEConfig) -> Shaped[Any, "*T O R G"]:
    """Sorts an array over the pool's experts into slots, candidate groups and their members.

    A NumPy array stays one.
    """
    slots, candidates, across = moe.output_granularity, moe.output_expansion, moe.experts_across
    first = pool.shape[:-1]
    if moe.pooled_as == "copies" or across == 1:
        return pool.reshape(*first, slots, candidates, moe.pool_group_size)
    apart = pool.reshape(*first, slots, candidates, moe.group_size, across)
    return apart.swapaxes(-1, -2).reshape(*first, slots, moe.pool_candidates, moe.group_size)


def out_of_groups(grouped: Shaped[Array, "*T O R G"], moe: MoEConfig) -> Shaped[Array, "*T E"]:
    """Reverses `in_groups`."""
    first, across = grouped.shape[:-3], moe.experts_across
    if moe.pooled_as == "candidates" and across > 1:
        grouped = grouped.reshape(*first, moe.num_groups, across, moe.group_size).swapaxes(-1, -2)
    return grouped.reshape(*first, moe.pool_size)


def _in_pool(place: Int[Array, "*T A"], moe: MoEConfig) -> Int[Array, "*T A"]:
    """Returns the experts' numbers in the pool from their places in `in_groups`."""
    if moe.pooled_as == "copies" or moe.experts_across == 1:
        return place
    return in_groups(jnp.arange(moe.pool_size), moe).reshape(-1)[place]


def _biased(logits: Float[Array, "*T E"], bias: SelectionBias | None) -> Float[Array, "*T E"]:
    if bias is None:
        return logits
    return logits + bias.experts.reshape((1,) * (logits.ndim - 1) + (-1,))


def _select_in_groups(
    logits: Float[Array, "*T E"],
    moe: MoEConfig,
    candidate_logits: Float[Array, "*T OR"] | None,
    bias: SelectionBias | None,
    allowed: Bool[Array, " E"] | None,
) -> tuple[Int[Array, "*T A"], Float[Array, "*T A"] | None]:
    """Returns experts in slot order and, with a second router, their factors.

    Logits are -inf where not allowed.
    """
    slots, candidates, group = moe.output_granularity, moe.pool_candidates, moe.pool_group_size
    tokens = logits.shape[:-1]
    grouped = in_groups(logits, moe)
    biased = grouped if bias is None else in_groups(_biased(logits, bias), moe)
    _, marked = jax.lax.top_k(biased, moe.active_per_group)
    # The sum is over all raw logits of a group, selected or not, as in the published model. Ties:
    # top_k and argmax both take the lowest index.
    scores = (
        _group_scores(grouped, moe, None if allowed is None else in_groups(allowed, moe))
        if candidate_logits is None
        else candidate_logits.reshape(*tokens, slots, candidates)
    )
    if allowed is not None and candidate_logits is not None:
        scores = where_allowed(in_groups(allowed, moe).any(axis=-1), scores, -jnp.inf)
    compared = scores
    if bias is not None and bias.groups is not None:
        compared = scores + bias.groups.reshape((1,) * len(tokens) + (slots, candidates))
    chosen = jnp.argmax(compared, axis=-1)
    inside = jnp.take_along_axis(marked, chosen[..., None, None], axis=-2)[..., 0, :]
    group_index = jnp.arange(slots).reshape((1,) * len(tokens) + (slots,)) * candidates + chosen
    experts = (group_index[..., None] * group + inside).reshape(*tokens, moe.num_active)
    experts = _in_pool(experts, moe)
    if candidate_logits is None:
        return experts, None
    # The paper gives no formula for separate routers. Through argmax alone the second router would
    # get no gradient, so this code scales each slot by the chosen candidate's probability.
    probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    scale = jnp.take_along_axis(probabilities, chosen[..., None], axis=-1)
    return experts, jnp.repeat(scale[..., 0], moe.active_per_group, axis=-1)


def _group_scores(
    grouped: Float[Array, "*T O R G"], moe: MoEConfig, allowed: Bool[Array, "O R G"] | None
) -> Float[Array, "*T O R"]:
    """Sums each group's allowed logits; -inf for groups without any.

    Each layer's experts are summed alone. If all other layers' experts are masked, the sums equal
    those of a single layer bit by bit.
    """
    if allowed is not None:
        grouped = where_allowed(allowed, grouped, 0.0)
    layers = moe.pool_group_size // moe.group_size
    if layers == 1:
        scores = grouped.sum(axis=-1)
    else:
        apart = grouped.reshape(*grouped.shape[:-1], moe.group_size, layers)
        sums = [apart[..., j].sum(axis=-1) for j in range(layers)]
        scores = functools.reduce(operator.add, sums)
    return scores if allowed is None else where_allowed(allowed.any(axis=-1), scores, -jnp.inf)


def where_allowed(
    allowed: Bool[Array, "*E"], values: Float[Array, "*TE"], other: float
) -> Float[Array, "*TE"]:
    """Replaces what is not allowed; `allowed` has the last axes of `values`."""
    first = (1,) * (values.ndim - allowed.ndim)
    return jnp.where(allowed.reshape(*first, *allowed.shape), values, other)
