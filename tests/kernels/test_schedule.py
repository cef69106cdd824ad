"""The visits of a grouped kernel against a plain walk over the rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.schedule import schedule, visits


def walk(sizes, tile_rows, visit_idle):
    tiles, row = -(-sum(sizes) // tile_rows), 0
    for expert, size in enumerate(sizes):
        if size:
            for tile in range(row // tile_rows, (row + size - 1) // tile_rows + 1):
                yield expert, tile
        elif visit_idle:
            yield expert, min(row // tile_rows, tiles - 1)
        row += size


@pytest.mark.slow
@pytest.mark.parametrize("visit_idle", [False, True])
@pytest.mark.parametrize("tile_rows", [1, 4, 8, 16])
def test_visits_are_a_walk_over_the_rows(tile_rows, visit_idle):
    rng = np.random.default_rng(tile_rows)
    for _ in range(25):
        experts, rows = rng.integers(1, 9), int(rng.integers(1, 60))
        sizes = rng.multinomial(rows, rng.dirichlet(np.full(experts, 0.3)))
        wanted = list(walk(sizes, tile_rows, visit_idle))
        plan = schedule(jnp.asarray(sizes, jnp.int32), rows, tile_rows, visit_idle)
        expert, loaded, tile, start, stop, count, _ = map(np.asarray, plan)
        (count,) = count
        assert count == len(wanted) <= len(expert) == visits(rows, experts, tile_rows)
        got = list(zip(expert.tolist(), tile.tolist(), strict=True))
        assert got[:count] == wanted
        assert all(visit == wanted[-1] for visit in got[count:])
        assert (np.diff(loaded) >= 0).all(), "an expert's weights come once"
        assert all(sizes[e] > 0 for e in loaded), "an idle expert's weights stay where they are"
        assert all(loaded[i] == e for i, (e, _) in enumerate(wanted) if sizes[e])
        assert (stop - start == sizes).all() and stop[-1] == rows
