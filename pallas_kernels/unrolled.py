"""Unrolled sums of products, for the few rows of a decoding step on a CPU.

XLA on a CPU compiles element-wise work, casts and gathers included, into one parallel loop at
memory bandwidth. Its reductions and small matrix products need their operands in memory first, cast
and gathered. So a sum over n terms is written as n / 80 or more partial sums, each of at most 80
terms that the program adds one by one.

The terms of a few sums are one array of products, of which each sum reads a slice: XLA fuses it up
to 15 times. Its compiler needs memory that grows with the square of a program's length.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

_TERMS, _LANES, _TOGETHER = 80, 32, 14


def partial_sums(width: int) -> int:
    """Returns the number of partial sums for a sum over `width` products."""
    return max(_LANES, 1 << (-(-width // _TERMS) - 1).bit_length())


def row_products(columns: Callable[[int, int], Array], x: Array) -> Array:
    """Returns (w * x).sum(-1) in float32, for w [..., N, K] and float32 x [..., 1, K].

    columns(start, stop) returns those columns of w, sliced from where it is stored.
    """
    width = x.shape[-1]
    lanes = partial_sums(width)
    x = jax.lax.optimization_barrier(x)  # else it is recomputed for every output

    def products(start: int, stop: int) -> Array:
        return columns(start, stop).astype(jnp.float32) * x[..., start:stop]

    whole, sums, y = width - width % lanes, None, None
    for first in range(0, whole, lanes * _TOGETHER):
        terms = products(first, min(first + lanes * _TOGETHER, whole))
        for start in range(0, terms.shape[-1], lanes):
            term = terms[..., start : start + lanes]
            sums = term if sums is None else sums + term
    if sums is not None:
        y = sums @ jnp.ones(lanes)
    if whole < width:
        rest = products(whole, width).sum(axis=-1)
        y = rest if y is None else y + rest
    assert y is not None
    return y


def combined_rows(rows: Callable[[int, int, int], Array], a: Array) -> Array:
    """Returns (a[..., None] * w).sum(-2) in float32, for float32 a [..., F] and w [..., F, W].

    rows(start, stop, step) returns rows of w as [..., F / step, stop - start, W], sliced from where
    it is stored: start to stop - 1, the same + step, and so on.
    """
    count = a.shape[-1]
    # Every step-th row in one sum; a divisor, so that all sums have the same length.
    step = next(s for s in range(min(count, _TERMS), 0, -1) if count % s == 0)
    a = jax.lax.optimization_barrier(a).reshape(*a.shape[:-1], count // step, step, 1)
    y: Array | float = 0.0
    for first in range(0, step, _TOGETHER):
        stop = min(first + _TOGETHER, step)
        terms = rows(first, stop, step).astype(jnp.float32) * a[..., first:stop, :]
        for start in range(stop - first):
            y += terms[..., start, :]
    assert isinstance(y, Array)
    return y.sum(axis=-2)
