"""Tile sizes of the TPU kernels."""

import math
from collections.abc import Iterator

_STEP = 128
_MOST = {"forward": 1152, "backward": 640}


def choices(chip: str, kind: str, mean_rows: int) -> Iterator[tuple[int, int, int]]:
    """Yields (rows, step, buffers), best first; the caller takes the first that fits on chip.

    A span holds the rows of nearly every balanced expert, or an equal part of them: the mean, its
    random deviation, and the rows before it in its first tile.
    """
    most = 640 if chip == "v5e" else _MOST[kind]
    needed = mean_rows + 3 * math.isqrt(mean_rows) + 16
    rows = -(-needed // -(-needed // most))
    rows = -(-rows // _STEP) * _STEP
    while rows > 0:
        yield rows, _STEP, 2
        rows -= _STEP
    yield _STEP, _STEP, 1
