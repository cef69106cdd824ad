"""Tiles of the TPU kernels by chip and size, chosen by the compiler's cycle estimates."""

from collections.abc import Iterator

# (chip, kind, D, F): for a mean number of rows per expert, (rows of a tile, rows of a step,
# buffers of weights). Printed by benchmarks/tpu_kernels.py --tune.
TABLE: dict[tuple[str, str, int, int], dict[int, tuple[int, int, int]]] = {}

_SMALLEST, _LARGEST = 128, 512


def choices(chip: str, kind: str, d: int, f: int, mean_rows: int) -> Iterator[tuple[int, int, int]]:
    """(rows, step, buffers), best first; the caller takes the first that fits on the chip."""
    table = TABLE.get((chip, kind, d, f), {})
    if table and mean_rows >= min(table) // 2:
        yield table[min(table, key=lambda mean: abs(mean - mean_rows))]
    # Else about an expert's share, so that balanced experts own whole tiles.
    share = 1 << max(0, mean_rows - 1).bit_length()
    rows = min(max(share, _SMALLEST), _LARGEST)
    while rows >= _SMALLEST:
        yield rows, _SMALLEST, 2
        rows //= 2
    yield _SMALLEST, _SMALLEST, 1
