"""Copies, for implementations that cannot access experts in place in their run of layers."""

import functools
from collections.abc import Sequence

from jax import Array, lax


def of_window(
    gate_up: Array, down: Array, first_expert: Array | int, experts: int
) -> tuple[Array, Array]:
    """Returns `experts` of the experts [N, ...] from first_expert on; a copy unless all."""
    if len(gate_up) == experts:
        return gate_up, down
    cut = functools.partial(lax.dynamic_slice_in_dim, start_index=first_expert, slice_size=experts)
    return cut(gate_up), cut(down)


def put(
    into: Sequence[Array], layer: Array | int, gradients: Sequence[Array], adds: bool
) -> tuple[Array, ...]:
    """Returns the stacks [L, E, ...] with a layer's gradients [E, ...] written or added."""
    if not into:
        return ()
    written = []
    for stack, gradient in zip(into, gradients, strict=True):
        if adds:
            gradient = gradient + lax.dynamic_index_in_dim(stack, layer, keepdims=False)
        gradient = gradient.astype(stack.dtype)
        written.append(lax.dynamic_update_index_in_dim(stack, gradient, layer, 0))
    return tuple(written)
