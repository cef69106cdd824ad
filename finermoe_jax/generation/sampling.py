"""Selects the next token from its logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.config.arguments import is_integer, is_number
from finermoe_jax.errors import InputError

NO_TOKEN = -1  # marks logits that are not finite


class Sampling(NamedTuple):
    """Sampling settings. Changing them does not recompile.

    Applied in this order:
      repetition_penalty: divides positive and multiplies negative logits of tokens that already
        occurred in the row; 1: no penalty.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keeps the k most likely tokens; 0: all.
      top_p: of these keeps the fewest tokens whose total probability is at least top_p.
      seed: each row has a separate key, derived from the seed.
    """

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0  # 1: all tokens
    repetition_penalty: float = 1.0  # 1: none
    seed: int = 0  # of the draws

    def check(self) -> None:
        """Raises InputError for a value of the wrong type or out of range."""
        for name, default in self._field_defaults.items():
            value, whole = getattr(self, name), isinstance(default, int)
            if not (is_integer if whole else is_number)(value):
                kind = "an integer" if whole else "a number"
                raise InputError(f"{name}={value!r} must be {kind}")
        for name, right, what in (
            ("temperature", 0 <= self.temperature <= 1e6, "0 (greedy), or up to 1e6"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (all tokens), or less than 2^31"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            (
                "repetition_penalty",
                1e-6 <= self.repetition_penalty <= 1e12,
                "1 (none), or in 1e-6 … 1e12",
            ),
            ("seed", 0 <= self.seed < 2**32, "in 0 … 2^32 - 1"),
        ):
            if not right:  # also rejects NaN
                raise InputError(f"{name}={getattr(self, name)} must be {what}")

    def scalars(self) -> "Sampling":
        """Converts the settings to scalars of fixed dtypes, so that no value recompiles."""
        kinds = (np.float32, np.int32, np.float32, np.float32, np.uint32)
        return jax.tree.map(lambda kind, x: kind(x), Sampling(*kinds), self)  # type: ignore


def choose(
    logits: Float[Array, "B V"], sampling: Sampling, seen: Bool[Array, "B V"], step: Int[Array, ""]
) -> Int[Array, " B"]:
    """Returns each row's next token, int32 [B]; NO_TOKEN if its largest logit is not finite.

    `sampling` contains scalars; `step` counts the previous new tokens. NaN counts as the largest.
    """
    penalty = jnp.asarray(sampling.repetition_penalty, jnp.float32)
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalized, logits)

    def draw() -> Int[Array, " B"]:
        # Some devices flush subnormal temperatures to 0.
        temperature = jnp.maximum(sampling.temperature, 1e-30)
        # Relative to the largest, so that a low temperature overflows only to -inf.
        largest = logits.max(axis=-1, keepdims=True)
        scaled = (logits - largest) / temperature
        restricted = (sampling.top_k > 0) | (sampling.top_p < 1)
        least = jax.lax.cond(
            restricted,
            lambda: _least_kept(scaled, sampling),
            lambda: jnp.full(scaled.shape[:1], -jnp.inf),
        )
        scaled = jnp.where(scaled >= least[:, None], scaled, -jnp.inf)
        key = jax.random.fold_in(jax.random.key(sampling.seed), step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(scaled)))
        drawn = jax.vmap(jax.random.categorical)(keys, scaled)
        return jnp.where(jnp.isfinite(largest[:, 0]), drawn, NO_TOKEN)

    def most_likely() -> Int[Array, " B"]:
        best = jnp.argmax(logits, axis=-1)
        largest = jnp.take_along_axis(logits, best[:, None], axis=-1)[:, 0]
        return jnp.where(jnp.isfinite(largest), best, NO_TOKEN)

    return jax.lax.cond(sampling.temperature > 0, draw, most_likely).astype(jnp.int32)


def _least_kept(scaled: Float[Array, "B V"], sampling: Sampling) -> Float[Array, " B"]:
    """Returns the smallest logit [B] that top_k and top_p keep; ties are kept too."""
    falling = -jnp.sort(-scaled, axis=-1)
    vocab = scaled.shape[-1]
    count = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    falling = jnp.where(jnp.arange(vocab)[None] < count, falling, -jnp.inf)
    probabilities = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    first = (jnp.arange(vocab) == 0)[None]  # kept even if top_p is 0 in float32
    kept = first | (before < sampling.top_p) & (falling > -jnp.inf)
    return jnp.where(kept, falling, jnp.inf).min(axis=-1)
