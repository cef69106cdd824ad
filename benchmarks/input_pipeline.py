"""Measures tokens per second of the input pipeline from memory-mapped files, on one core.

    python benchmarks/input_pipeline.py [--tokens=134217728] [--batches=20]

Writes a prepared directory and a Megatron pair of random documents into a temporary directory.
Then it reads global batches as training does (data.train_batches, without its threads). The limit
is copying as many bytes from one memory-mapped file. Figures are medians of five.
"""

import argparse
import hashlib
import json
import statistics
import struct
import tempfile
import time
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np

from finermoe_jax.config.run import DataConfig
from finermoe_jax.data.batches import batch_reader, split_held_out
from finermoe_jax.data.megatron import open_megatron
from finermoe_jax.data.packing import Batch
from finermoe_jax.data.rows import Mixture
from finermoe_jax.data.token_files import (
    MANIFEST,
    Manifest,
    Settings,
    Shard,
    open_prepared,
    shard_files,
    shard_name,
)

_SHARDS = 4
_BATCH_TOKENS = 1 << 20
_VOCABULARY = 151_936


def _documents(rng: np.random.Generator, total: int) -> np.ndarray:
    """Document lengths with the long tail of web text: mean about 1000 tokens, median about 500."""
    lengths = rng.lognormal(6.2, 1.1, total // 500).astype(np.int64) + 2
    return lengths[: int(np.searchsorted(np.cumsum(lengths), total))]


def _prepared(place: Path, rng: np.random.Generator, total: int) -> None:
    place.mkdir()
    shards = []
    for number in range(_SHARDS):
        lengths = _documents(rng, total // _SHARDS)
        tokens = rng.integers(0, _VOCABULARY, lengths.sum(), dtype=np.uint32)
        name = shard_name(number)
        data, documents = shard_files(place, name)
        tokens.tofile(data)
        np.save(documents, np.cumsum(lengths) - lengths)
        none = hashlib.sha256().hexdigest()  # not read here
        shards.append(
            Shard(name, len(tokens), len(lengths), int(tokens.max()), (), none, none, (0, 0), False)
        )
    settings = Settings("", _VOCABULARY, None, "uint32", "text", "train", total // _SHARDS, (), ())
    (place / MANIFEST).write_text(json.dumps(asdict(Manifest.of(settings, shards))))


def _megatron(prefix: Path, rng: np.random.Generator, total: int) -> None:
    lengths = _documents(rng, total).astype("<i4")
    rng.integers(0, _VOCABULARY, lengths.sum(), dtype=np.int32).tofile(f"{prefix}.bin")
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * 4
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 4))
        file.write(struct.pack("<QQ", len(lengths), len(lengths) + 1))
        for array in (lengths, pointers, np.arange(len(lengths) + 1)):
            array.tofile(file)


def _speed(read, first: int, count: int) -> float:
    """Tokens per second of `count` calls of read(i), median of five."""
    speeds = []
    for turn in range(5):
        began = time.perf_counter()
        tokens = sum(read(first + turn * count + i) for i in range(count))
        speeds.append(tokens / (time.perf_counter() - began))
    return statistics.median(speeds)


def main() -> None:
    """Prints one line per row length, packing and source."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1 << 27, help="tokens of each source")
    parser.add_argument("--batches", type=int, default=20, help="batches per measurement")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        _prepared(place / "ours", rng, arguments.tokens)
        _megatron(place / "theirs", rng, arguments.tokens)
        sources = [open_prepared(place / "ours", "", None), open_megatron(place / "theirs")]
        mapped = sources[1].tokens.arrays[0]
        for tokens in (a for s in sources for a in s.tokens.arrays):
            tokens.max()  # into the page cache, like everything that is read twice
        starts = rng.integers(0, len(mapped) - 8193, 1 << 16)
        print(f"{'':34}{'tokens/s':>14}{'of raw':>8}{'filled':>8}")
        for length in (8192, 256):
            rows = _BATCH_TOKENS // length
            out = np.empty((rows, length + 1), np.int32)

            def raw(step: int, out: np.ndarray = out, length: int = length) -> int:
                for row in range(len(out)):
                    start = starts[(step * len(out) + row) % len(starts)]
                    out[row] = mapped[start : start + length + 1]
                return out.size - len(out)

            limit = _speed(raw, 0, arguments.batches)
            print(f"{f'raw copies of {length}':34}{limit:14,.0f}{1:8.0%}")
            for packing in ("stream", "documents"):
                for chosen in (sources[:1], sources[1:], sources):
                    config = DataConfig(
                        sequence_length=length, global_batch_size=rows, packing=packing,
                        eval_fraction=0.0, path="benchmark",
                    )  # fmt: skip
                    began = time.perf_counter()
                    weights = [Fraction(7, 10), Fraction(3, 10)][: len(chosen)]
                    mixture, _ = split_held_out(list(zip(chosen, weights, strict=True)), config)
                    opened = time.perf_counter() - began
                    read = batch_reader(mixture, config, range(rows))
                    speed = _speed(lambda step, read=read: _real(read(step)), 0, arguments.batches)
                    kind = "mixture" if len(chosen) > 1 else chosen[0].identity["kind"]
                    print(
                        f"{f'{packing} {length}, {kind}':34}{speed:14,.0f}{speed / limit:8.0%}"
                        f"{_filled(mixture):8.1%}   opened in {opened:.2f} s"
                    )


def _real(batch: Batch) -> int:
    """Number of inputs of a batch, without padding."""
    if batch.segment_ids is None:
        return batch.tokens[:, 1:].size
    return int(np.count_nonzero(batch.segment_ids[:, :-1]))


def _filled(mixture: Mixture) -> float:
    """The share of inputs that are not padding."""
    if not mixture.packed:
        return 1.0
    sizes = np.concatenate([np.diff(p.ranges, axis=1)[:, 0] for p in mixture.parts])
    return float(np.minimum(sizes, mixture.length).mean() / mixture.length)


if __name__ == "__main__":
    main()
