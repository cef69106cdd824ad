"""Rows on their way to experts: copied, sorted, and put back.

Both maps are permutations (one after a repeat), so their transposes are gathers too. Left to JAX
they would be scatter-adds, which are slow everywhere and have been miscompiled inside scans
(openxla/xla issue 49143).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def inverse_of(order: Int[Array, " M"]) -> Int[Array, " M"]:
    """The permutation that undoes `order`."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))


@jax.custom_vjp
def permute(
    x: Float[Array, "M *C"], order: Int[Array, " M"], inverse: Int[Array, " M"]
) -> Float[Array, "M *C"]:
    """x[order], for a permutation and its inverse."""
    return x[order]


permute.defvjp(
    lambda x, order, inverse: (x[order], inverse),
    lambda inverse, g: (g[inverse], None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dispatch(
    x: Float[Array, "T D"], order: Int[Array, " M"], inverse: Int[Array, " M"], active: int
) -> Float[Array, "M D"]:
    """Each token's row `active` times, in the given order of the M = T * active copies."""
    return x[order // active]


dispatch.defvjp(
    lambda x, order, inverse, active: (dispatch(x, order, inverse, active), inverse),
    lambda active, inverse, g: (
        g[inverse].reshape(-1, active, g.shape[-1]).sum(axis=1),
        None,
        None,
    ),
)
