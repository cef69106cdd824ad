"""Load balance: tokens per expert, and the loss of Eq. 11.

Letters: config/model.py.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.moe.routing import where_allowed


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
    """Returns the sequence-level load-balancing loss, weight not applied (paper Eq. 11).

    Per sequence of L real tokens: the sum over experts of f_i * P_i, P_i the mean over tokens of
    the softmax over all experts, f_i = N / (A * L) * (tokens that selected i). Averaged over the
    sequences with a real token. A sequence is a row of the batch, even if it packs several
    documents. f has no gradient. `allowed`: experts that tokens may choose (`route`); the softmax
    and N are those of these experts alone.
    """
    num_experts, active = logits.shape[-1], experts.shape[-1]
    choices: Array | int = num_experts
    if allowed is not None:
        logits, choices = where_allowed(allowed, logits, -jnp.inf), allowed.sum()
    real = mask.astype(jnp.float32)
    length = jnp.maximum(real.sum(axis=1), 1.0)[:, None]
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    mean_probability = jnp.einsum("BTE,BT->BE", probabilities, real) / length
    fraction = expert_tokens(experts, mask, num_experts) * choices / (active * length)
    per_sequence = jnp.einsum("BE,BE->B", fraction, mean_probability)
    holds_token = mask.any(axis=1)
    return jnp.where(holds_token, per_sequence, 0.0).sum() / jnp.maximum(holds_token.sum(), 1)
