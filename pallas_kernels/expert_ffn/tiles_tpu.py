"""Tile sizes of the TPU kernels by chip and size, chosen by the compiler's cycle estimates."""

from collections.abc import Iterator

# (chip, kind, D, F): {mean rows per expert: (rows of a tile, rows of a step, weight buffers)}.
# Printed by benchmarks/tpu_kernels.py --tune.
TABLE: dict[tuple[str, str, int, int], dict[int, tuple[int, int, int]]] = {
    ("v5e", "forward", 896, 152): {512: (512, 128, 2), 2048: (512, 128, 2)},
    ("v5e", "backward", 896, 152): {512: (512, 128, 2)},
    ("v5e", "forward", 1536, 280): {512: (512, 128, 2), 2048: (512, 128, 2)},
    ("v5e", "backward", 1536, 280): {512: (512, 128, 2)},
    ("v5e", "forward", 3584, 592): {512: (512, 128, 2), 2048: (512, 128, 2)},
    ("v5e", "backward", 3584, 592): {512: (512, 128, 2)},
    ("v5p", "forward", 896, 152): {512: (512, 128, 2), 2048: (1024, 128, 2)},
    ("v5p", "backward", 896, 152): {512: (512, 128, 2)},
    ("v5p", "forward", 1536, 280): {512: (512, 128, 2), 2048: (1024, 128, 2)},
    ("v5p", "backward", 1536, 280): {512: (512, 128, 2)},
    ("v5p", "forward", 3584, 592): {512: (512, 128, 2), 2048: (1024, 128, 2)},
    ("v5p", "backward", 3584, 592): {512: (128, 128, 1)},
    ("v6e", "forward", 896, 152): {512: (512, 128, 2), 2048: (1024, 128, 2)},
    ("v6e", "backward", 896, 152): {512: (512, 128, 2)},
    ("v6e", "forward", 1536, 280): {512: (512, 128, 2), 2048: (1024, 128, 2)},
    ("v6e", "backward", 1536, 280): {512: (512, 128, 2)},
    ("v6e", "forward", 3584, 592): {512: (512, 128, 2), 2048: (1024, 128, 2)},
    ("v6e", "backward", 3584, 592): {512: (512, 128, 2)},
    ("tpu7x", "forward", 896, 152): {512: (512, 128, 2), 2048: (1024, 128, 2)},
    ("tpu7x", "backward", 896, 152): {512: (512, 128, 2)},
    ("tpu7x", "forward", 1536, 280): {512: (512, 128, 2), 2048: (1024, 128, 2)},
    ("tpu7x", "backward", 1536, 280): {512: (512, 128, 2)},
    ("tpu7x", "forward", 3584, 592): {512: (512, 128, 2), 2048: (1024, 128, 2)},
    ("tpu7x", "backward", 3584, 592): {512: (128, 128, 1)},
}

_SMALLEST, _LARGEST = 128, 512


def choices(chip: str, kind: str, d: int, f: int, mean_rows: int) -> Iterator[tuple[int, int, int]]:
    """Yields (rows, step, buffers), best first; the caller takes the first that fits on chip."""
    table = TABLE.get((chip, kind, d, f), {})
    if table and mean_rows >= min(table) // 2:
        yield table[min(table, key=lambda mean: abs(mean - mean_rows))]
    # Otherwise about an expert's share, so that balanced experts own whole tiles.
    share = 1 << max(0, mean_rows - 1).bit_length()
    rows = min(max(share, _SMALLEST), _LARGEST)
    while rows >= _SMALLEST:
        yield rows, _SMALLEST, 2
        rows //= 2
    yield _SMALLEST, _SMALLEST, 1
