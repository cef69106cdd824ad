"""Cross-entropy from hidden states, in chunks, so that [tokens, vocabulary] never exists whole."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.model import Decoder


def cross_entropy_sum(
    model: Decoder,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    chunk_tokens: int,
) -> Float[Array, ""]:
    """Sum over the masked positions of -log p(target), in nats, float32.

    Logits exist for about chunk_tokens positions at a time, and the backward pass computes them
    again.
    """
    batch, tokens, _ = hidden.shape
    chunk = max(1, min(tokens, chunk_tokens // batch))
    pad = -tokens % chunk

    def chunks(x: Array) -> Array:
        """[B, T, ...] → [chunks, B, chunk, ...]."""
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(total: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
        h, target, real = piece
        logits = model.logits(h)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - chosen
        return total + jnp.where(real, nll, 0.0).sum(), None

    pieces = (chunks(hidden), chunks(targets), chunks(mask))
    return jax.lax.scan(body, jnp.float32(0), pieces)[0]
