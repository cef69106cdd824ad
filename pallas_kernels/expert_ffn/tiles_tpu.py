"""Tile sizes of the TPU kernels."""

import math
from collections.abc import Iterator

_STEP = 128
_MOST = {"forward": 1152, "backward": 640}


def choices(chip: str, kind: str, mean_rows: int) -> Iterator[tuple[int, int, int]]:
    """Yields (rows, step, buffers), best first; the caller takes the first that fits on chip.

    A span has room for the mean number of rows per expert, three standard deviations more, and the
    rows before the expert in its first tile. If that is too long, for an equal part of them.
    """
    most = 640 if chip == "v5e" else _MOST[kind]
    needed = mean_rows + 3 * math.isqrt(mean_rows) + 16
    rows = -(-needed // -(-needed // most))
    rows = -(-rows // _STEP) * _STEP
    while rows > 0:
        yield rows, _STEP, 2
        rows -= _STEP
    yield _STEP, _STEP, 1
