"""The load-balancing loss in cases that can be worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finermoe_jax.moe.balance import load_balancing_loss


def test_aux_loss_of_uniform_routing_is_one_and_ignores_padding():
    experts = jnp.arange(8).reshape(1, 4, 2)
    logits = jnp.zeros((1, 4, 8))
    mask = jnp.ones((1, 4), bool)
    assert load_balancing_loss(logits, experts, mask) == pytest.approx(1.0)
    padded = (
        jnp.pad(logits, ((0, 1), (0, 3), (0, 0)), constant_values=7.0),
        jnp.pad(experts, ((0, 1), (0, 3), (0, 0))),
        jnp.pad(mask, ((0, 1), (0, 3))),
    )
    assert load_balancing_loss(*padded) == pytest.approx(1.0)


def test_aux_loss_gradient_flows_through_the_probabilities_only():
    logits = jnp.asarray([[[2.0, 0.0], [1.0, 0.0]]])
    experts = jnp.zeros((1, 2, 1), jnp.int32)
    grad = jax.grad(load_balancing_loss)(logits, experts, jnp.ones((1, 2), bool))
    p = jax.nn.softmax(logits, -1)
    # d/dlogit of f_0 * mean(p_0), with f_0 = 2 / (1 * 2) * 2 = 2 held fixed.
    slope = 2 * p[..., 0] * p[..., 1] / 2
    np.testing.assert_allclose(grad, jnp.stack([slope, -slope], -1), rtol=1e-6)
