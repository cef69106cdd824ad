"""Tiles of the TPU kernels by chip and size, chosen by the compiler's cycle estimates."""

from collections.abc import Iterator

# (chip, kind, D, F): for each mean number of rows per expert, (rows of a tile, rows of a step).
# Written by benchmarks/tpu_kernels.py --tune.
TABLE: dict[tuple[str, str, int, int], dict[int, tuple[int, int]]] = {}


def choices(chip: str, kind: str, d: int, f: int, mean_rows: int) -> Iterator[tuple[int, int, int]]:
    """(rows, step, buffers), best first; the caller takes the first that fits."""
    table = TABLE.get((chip, kind, d, f))
    if table:
        rows, step = table[min(table, key=lambda mean: abs(mean - mean_rows))]
        yield rows, step, 2
    # Else about an expert's share, so that balanced experts own whole tiles.
    share = 1 << max(0, mean_rows - 1).bit_length()
    for rows in (512, 256, 128):
        if rows <= max(128, share):
            yield rows, 128, 2
    yield 128, 128, 1
