"""Progressive scaling of routing (PSR, ReXMoE, arXiv 2510.17483, Eq. 6).

During training, some of a pool's experts are masked at random, fewer over time: N_t of r * N
experts may be chosen until psr_start, all of them from psr_end on. The same number of experts is
masked in every candidate group, so that the groups' scores stay comparable. What is masked
(`_units`):

    pooled_as=copies      single experts of each candidate group, r * G_I * R_I
    pooled_as=candidates  whole candidate groups of each slot, r * R_O
    plain_top_k           single experts of all r * N, as in the paper

psr_mask=random draws among all of them. psr_mask=foreign (not in the paper) keeps the layer's own
experts, so the first steps equal those of a model without pools. Each layer draws its own mask in
each step, the same for all tokens, devices and microbatches. The paper does not specify this.

With experts_across=1, N_t grows from half of the layer's own experts to all of them. This control
shows what PSR does without pools. docs/pooling.md. Letters: config/model.py.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.run import TrainConfig


class Reuse(NamedTuple):
    """The masks of one training step; `key` differs from step to step."""

    kept: Int[Array, ""]  # units (`_units`) that each set keeps
    key: Array
    mask: Literal["random", "foreign"]

    def allowed(self, moe: MoEConfig, layer: Array | int, place: int) -> Bool[Array, " E"]:
        """Returns the pool's experts that a layer may choose.

        Args:
          moe: the layer's config.
          layer: index among the MoE layers.
          place: index of the layer in its pool.
        """
        sets, units = _units(moe)
        draw = jax.random.uniform(jax.random.fold_in(self.key, layer), (sets, units))
        if self.mask == "foreign":  # a layer's own come first
            own = jnp.arange(units) % moe.experts_across == place
            draw = jnp.where(own[None], 2.0, draw)
        rank = jnp.argsort(jnp.argsort(-draw, axis=1), axis=1)
        kept = rank < self.kept
        if _masks_groups(moe):  # [G_O, R_O, r] → [G_O, R_O, G_I * R_I, r]
            apart = kept.reshape(-1, 1, moe.experts_across)
            kept = jnp.broadcast_to(apart, (apart.shape[0], moe.group_size, moe.experts_across))
        return kept.reshape(-1)


def _masks_groups(moe: MoEConfig) -> bool:
    return moe.pooled_as == "candidates" and moe.experts_across > 1


def _units(moe: MoEConfig) -> tuple[int, int]:
    """Returns the number of sets that are masked alike, and the units (experts, groups) in each."""
    if moe.plain_top_k:
        return 1, moe.pool_size
    if _masks_groups(moe):
        return moe.output_granularity, moe.pool_candidates
    return moe.num_groups, moe.pool_group_size


def first_kept(moe: MoEConfig) -> int:
    """Returns the units that each set keeps before psr_start."""
    return _units(moe)[1] // max(moe.experts_across, 2)


def reuse_at(step: Int[Array, ""], train: TrainConfig, moe: MoEConfig | None) -> Reuse | None:
    """Returns the masks of a step, counted from 0; None without PSR.

    linear: each set of r * M units keeps floor((1 + (r - 1) (t - t_s) / (t_e - t_s)) M) of them,
    M before t_s and r * M from t_e on. stepwise: M more at each of r - 1 steps evenly spaced from
    t_s to t_e, as in the paper's 64, 128, 192, 256 of 256 experts. t_s and t_e are psr_start and
    psr_end times train.steps, rounded.
    """
    if train.psr == "none" or moe is None:
        return None
    begin, end = (round(share * train.steps) for share in (train.psr_start, train.psr_end))
    first = first_kept(moe)
    more = _units(moe)[1] - first
    at: np.ndarray  # the step from which one more unit is kept
    if train.psr == "linear":
        # In integers, so without rounding.
        at = begin - (-np.arange(1, more + 1) * (end - begin) // more)
    else:
        times = max(moe.experts_across - 1, 1)
        at = np.linspace(begin, end, times).round()[np.arange(more) * times // more]
    kept = first + jnp.searchsorted(jnp.asarray(at, jnp.int32), step, side="right")
    key = jax.random.fold_in(jax.random.key(train.seed), step)
    return Reuse(kept, key, train.psr_mask)
