"""The visits of spans of rows against a plain walk over the rows, and transfers at every offset."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.expert_ffn import expert_ffn, tiles_tpu
from pallas_kernels.spans import ROWS, spans, visits
from tests.support.kernels import ARRAYS, GROUPS, TOLERANCE, assert_close, make, truth

STRICT = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


def walk(sizes, span_rows, visit_idle):
    """(expert, first row moved, first own row, one past the last own row) of every visit."""
    row = 0
    for expert, size in enumerate(sizes):
        first, stop = row // ROWS * ROWS, row + size
        if size == 0 and visit_idle:
            yield expert, first, row, row
        while size and first < stop:
            yield expert, first, max(row, first), min(stop, first + span_rows)
            first += span_rows
        row = stop


@pytest.mark.slow
@pytest.mark.parametrize("visit_idle", [False, True])
@pytest.mark.parametrize(("span_rows", "experts", "rows"), [(16, 8, 60), (48, 5, 200), (16, 1, 9)])
def test_visits_are_a_walk_over_the_rows(span_rows, experts, rows, visit_idle):
    rng = np.random.default_rng(span_rows)
    schedule = jax.jit(lambda sizes: spans(sizes, rows, span_rows, visit_idle))
    for past in (0, 0, 0, 1, 7, rows):
        sizes = rng.multinomial(rows - past, rng.dirichlet(np.full(experts, 0.3)))
        wanted = list(walk(sizes, span_rows, visit_idle))
        plan = schedule(jnp.asarray(sizes, jnp.int32))
        expert, loaded, first, start, stop, (count,), _ = map(np.asarray, plan)
        assert count == len(wanted) <= len(expert) == visits(rows, experts, span_rows)
        got = np.stack([expert, first, start, stop], axis=1)[:count]
        np.testing.assert_array_equal(got, np.reshape(wanted, (-1, 4)))
        assert (np.diff(loaded) >= 0).all(), "an expert's weights come once"
        assert not sizes.any() or all(sizes[e] > 0 for e in loaded), "idle experts load none"
        assert all(loaded[i] == e for i, (e, *_) in enumerate(wanted) if sizes[e])


# Rows of each expert: starts at every offset in a tile, single rows, empty groups, and spans of
# each kind: small, with a tail of 32 or 64 rows, whole, and more than one.
SIZES = [0, 2, 2, 9, 1, 42, 146, 18, 0, 185, 241, 267, 9, 5, 394, 2, 8, 4, 8, 0]
PAST = 5  # rows of no expert


@pytest.mark.slow
def test_groups_begin_anywhere(monkeypatch):
    """Output and gradients of spans of at most 256 rows, under the race detector."""
    starts = np.cumsum(SIZES) - SIZES
    assert {int(s) % ROWS for s, size in zip(starts, SIZES, strict=True) if size} == set(
        range(ROWS)
    )
    monkeypatch.setattr(tiles_tpu, "choices", lambda *_: iter([(256, 128, 2)]))
    # Drawn with one more expert, which takes the last rows.
    monkeypatch.setitem(GROUPS, "anywhere", ((8, 8, 8), [*SIZES, PAST]))
    arguments, cotangent = make("anywhere", jnp.bfloat16)
    wanted, rows = truth(arguments, cotangent), sum(SIZES)

    @jax.jit
    def compute(arguments, cotangent):
        def forward(rows, gate_up, down, row_weights):
            sizes = arguments["group_sizes"][:-1]
            return expert_ffn(rows, gate_up, down, sizes, row_weights, "tpu", STRICT)

        arrays = (arguments[name] for name in ARRAYS)
        x, gate_up, down, row_weights = arrays
        y, pull = jax.vjp(forward, x, gate_up[:-1], down[:-1], row_weights)
        return {"y": y} | dict(zip(ARRAYS, pull(cotangent), strict=True))

    got = compute(arguments, cotangent)
    own = {name: slice(rows) for name in ("y", "rows", "row_weights")}
    own |= {name: slice(len(SIZES)) for name in ("gate_up", "down")}
    assert_close(
        {name: array[own[name]] for name, array in got.items()},
        {name: array[own[name]] for name, array in wanted.items()},
        TOLERANCE[jnp.bfloat16],
    )
