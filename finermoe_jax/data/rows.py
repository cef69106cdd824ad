"""Rows of tokens: windows or packed documents of one source, and mixtures of sources."""

import bisect
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from finermoe_jax.data.packing import Batch, pack
from finermoe_jax.data.token_files import TokenStream


class Windows:
    """Windows of length + 1 tokens, every `length`, in a stream's tokens first … last - 1."""

    packed = False  # rows have no segments

    def __init__(self, tokens: TokenStream, length: int, first: int = 0, last: int | None = None):
        self.tokens, self.length, self.first = tokens, length, first
        self.count = max(0, ((len(tokens) if last is None else last) - first - 1) // length)

    def __len__(self) -> int:
        return self.count

    def first_token(self, index: int) -> int:
        """Returns the first token of window `index` in the source."""
        return self.first + index * self.length

    def read(self, index: int, tokens: np.ndarray, segments: np.ndarray | None) -> None:
        """Writes window `index` into `tokens`, int32 [length + 1]."""
        self.tokens.read(self.first_token(index), tokens)


class Packed:
    """Whole documents of a stream's tokens first … last - 1 (data/packing.py)."""

    packed = True

    def __init__(self, tokens: TokenStream, starts: np.ndarray, length: int, first: int, last: int):
        self.tokens, self.starts, self.length = tokens, starts, length
        empty = np.zeros((0, 2), np.int64)
        self.ranges = pack(starts, first, last, length + 1) if last > first else empty

    def __len__(self) -> int:
        return len(self.ranges)

    def first_token(self, index: int) -> int:
        """Returns the first token of row `index` in the source."""
        return int(self.ranges[index, 0])

    def read(self, index: int, tokens: np.ndarray, segments: np.ndarray | None) -> None:
        """Writes row `index` into int32 [length + 1] arrays; padded with token 0 and segment 0."""
        assert segments is not None
        begin, end = self.ranges[index].tolist()
        size = end - begin
        self.tokens.read(begin, tokens[:size])
        tokens[size:] = 0
        places = slice(*np.searchsorted(self.starts, (begin + 1, end)))
        segments[:size] = 0
        np.add.at(segments, self.starts[places] - begin, 1)
        np.cumsum(segments[:size], out=segments[:size])
        segments[:size] += 1
        segments[size:] = 0


Rows = Windows | Packed


class Mixture:
    """Rows of several sources, numbered source by source, and their mixing weights.

    Attributes:
      length: input tokens of a row.
      packed: True if rows have segments.
    """

    def __init__(self, parts: Sequence[Rows], names: Sequence[str], weights: Sequence[Fraction]):
        self.parts, self.names = list(parts), list(names)
        self.length, self.packed = parts[0].length, parts[0].packed
        self.starts = [0, *itertools.accumulate(len(part) for part in parts)]
        scale = math.lcm(*(weight.denominator for weight in weights))
        self.weights = [int(weight * scale) for weight in weights]

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, indices: Sequence[int]) -> Batch:
        """Returns these rows: int32 [R, length + 1] tokens, and segments or None."""
        tokens = np.empty((len(indices), self.length + 1), np.int32)
        segments = np.empty_like(tokens) if self.packed else None
        for row, index in enumerate(indices):
            part, inside = self.locate(index)
            self.parts[part].read(inside, tokens[row], None if segments is None else segments[row])
        return Batch(tokens, segments)

    def locate(self, index: int) -> tuple[int, int]:
        """Returns a row's source and its number there. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = bisect.bisect_right(self.starts, index) - 1
        return part, index - self.starts[part]

    def turn(self, place: int) -> tuple[int, int]:
        """Returns the source at `place` of the endless mixture, and how often it came before.

        After any n rows each source has supplied its share of n, off by at most the number of
        sources. The arithmetic is exact.
        """
        # Distributes `place` and `place + 1` places over the sources: each takes its share, rounded
        # up, and leaves the rest to the following ones.
        rest, following, total = place, place + 1, sum(self.weights)
        for part, weight in enumerate(self.weights):
            left = rest * (total - weight) // total
            left_following = following * (total - weight) // total
            if following - left_following > rest - left:
                return part, rest - left
            rest, following, total = left, left_following, total - weight
        raise AssertionError("every place belongs to a source")

    def in_order(self, count: int) -> list[int]:
        """Returns up to `count` different row numbers in proportion to the weights, unshuffled."""
        found: list[int] = []
        while len(found) < count:
            part, inside = self.turn(len(found))
            if inside >= len(self.parts[part]):
                break
            found.append(self.starts[part] + inside)
        return found
