"""The one log-likelihood: its value, and that training, held-out loss and scores are made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from finermoe_jax.evaluation.scoring import Continuation, score
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.model.losses import cross_entropy_sum, log_likelihood
from tests.support import SMALL


@pytest.mark.parametrize("size", [1, 30, 1e4])
def test_log_likelihood_is_the_softmaxs(size):
    rng = np.random.default_rng(0)
    logits = (size * rng.standard_normal((16, 300))).astype(np.float32)
    targets = rng.integers(0, 300, 16)
    chosen, log_p = jax.jit(log_likelihood)(jnp.asarray(logits), jnp.asarray(targets))
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exact = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(log_p, exact, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(chosen, np.asarray(log_p)[np.arange(16), targets])


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_losses_and_scores_are_the_same_sum(chunk):
    model = Decoder(SMALL, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (3, 20))

    @jax.jit
    def summed(tokens):
        hidden = model.features(tokens[:, :-1]).hidden
        mask = jnp.ones((3, 19), bool).at[:, 0].set(False)
        return cross_entropy_sum(model, hidden, tokens[:, 1:], mask, chunk)

    scores = score(model, [Continuation(row[:2].tolist(), row[2:].tolist()) for row in tokens])
    total = -sum(one.log_likelihood for one in scores)
    np.testing.assert_allclose(summed(jnp.asarray(tokens)), total, rtol=1e-6)
