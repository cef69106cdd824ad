"""Sums of products written out term by term, for the few rows of a decoding step on a CPU.

XLA on a CPU makes one loop on all cores of element-wise work, casts and gathers included, that runs
at the speed of the memory. Its sums and small matrix products want their operands in memory, cast
and gathered before. So sums over an axis of n are gathered in n / 80 or more partial sums, each of
at most 80 terms that are written out in the program one by one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

_TERMS, _LANES = 80, 32


def partial_sums(width: int) -> int:
    """The number of partial sums in a sum over `width` products."""
    return max(_LANES, 1 << (-(-width // _TERMS) - 1).bit_length())


def row_products(columns: Callable[[int, int], Array], x: Array) -> Array:
    """(w * x).sum(-1) in float32, of w [..., N, K] and float32 x [..., 1, K].

    columns(start, stop) are those columns of w, sliced from where it is stored.
    """
    width = x.shape[-1]
    lanes = partial_sums(width)
    x = jax.lax.optimization_barrier(x)  # its computation would be repeated for every output

    def terms(start: int, stop: int) -> Array:
        return columns(start, stop).astype(jnp.float32) * x[..., start:stop]

    whole, y = width - width % lanes, None
    if whole:
        sums = terms(0, lanes)
        for start in range(lanes, whole, lanes):
            sums += terms(start, start + lanes)
        y = sums @ jnp.ones(lanes)
    if whole < width:
        rest = terms(whole, width).sum(axis=-1)
        y = rest if y is None else y + rest
    assert y is not None
    return y


def combined_rows(rows: Callable[[int, int], Array], a: Array) -> Array:
    """(a[..., None] * w).sum(-2) in float32, of float32 a [..., F] and w [..., F, W].

    rows(start, step) are the rows start, start + step, … of w, sliced from where it is stored.
    """
    count = a.shape[-1]
    # Every step-th row in one sum; a divisor, so that all sums are of like length.
    step = next(s for s in range(min(count, _TERMS), 0, -1) if count % s == 0)
    a = jax.lax.optimization_barrier(a)
    y: Array | float = 0.0
    for start in range(step):
        y += rows(start, step).astype(jnp.float32) * a[..., start::step, None]
    assert isinstance(y, Array)
    return y.sum(axis=-2)
