"""Measures the memory and speed of converting models larger than memory.

    python benchmarks/convert.py --shape=7B --layers=4,8 --work=/tmp/convert
    python benchmarks/convert.py --shape=1.5B --work=/tmp/convert
    python benchmarks/convert.py --shape=7B --layers=4 --config=configs/qwen7b.py:du --work=…

Creates a dense source of the true shapes with random bfloat16 weights. Then it runs convert_hf.py:
to Orbax, upcycled with the published settings or --config's; --verify; to Hugging Face; --verify;
and back to Orbax. Each source is dropped from the page cache before it is read.

Memory is the peak of RssAnon in /proc, sampled every 20 ms. It omits pages mapped from files,
which the system can drop at any time.

Speed is compared with the disk's. Before and after each conversion, a plain loop writes as many
bytes (at most 8 GiB) to the same disk and calls fsync. The percentage is the conversion's speed
divided by the mean of the two loops. "direct" is the same loop with O_DIRECT. In a virtual machine
whose host reclaims free memory, the plain loop waits for pages and measures less than the disk's
speed.
"""

import argparse
import dataclasses
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.presets import QWEN2P5
from finermoe_jax.model.decoder import parameter_shapes
from finermoe_jax.runtime.files import forget
from finermoe_jax.weights.hf_config import model_config_to_hf
from finermoe_jax.weights.hf_names import parts
from finermoe_jax.weights.safetensors_files import Entry, write_tensors

ROOT = Path(__file__).parent.parent
_RAW_BYTES = 8 << 30


def make_source(config: ModelConfig, directory: Path) -> None:
    """Writes a dense HF directory of random weights in pieces; no two rows are equal."""
    import json

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(model_config_to_hf(config, "bfloat16")))
    shapes = parameter_shapes(config)
    dtype = np.dtype(ml_dtypes.bfloat16)
    entries = [
        Entry(name, shape, dtype)
        for path, where in parts(config, list(shapes)).items()
        for name, shape in where.shapes(shapes[path])
    ]
    rng = np.random.default_rng(0)

    def pieces() -> Iterator[tuple[str, np.ndarray]]:
        for entry in entries:
            left, width = entry.shape[0], int(np.prod(entry.shape[1:]))
            while left:
                rows = min(left, max(1, (16 << 20) // max(1, width)))
                values = (0.02 * rng.standard_normal((rows, width), np.float32)).astype(dtype)
                yield entry.name, values
                left -= rows

    with tqdm(total=sum(e.nbytes for e in entries), unit="B", unit_scale=True) as bar:
        bar.set_description("source")
        for size in write_tensors(directory, entries, pieces()):
            bar.update(size)


def raw_speed(directory: Path, size: int, direct: bool = False) -> float:
    """Bytes per second of a write loop with its fsync; direct: bypasses the page cache."""
    path, block = directory / "raw", mmap.mmap(-1, 16 << 20)  # aligned, as direct writes have to be
    block.write(np.random.default_rng(0).bytes(len(block)))
    count = max(1, min(size, _RAW_BYTES) // len(block))
    start = time.perf_counter()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0), 0o600)
    for _ in range(count):
        assert os.write(file, block) == len(block)
    os.fsync(file)
    os.close(file)
    seconds = time.perf_counter() - start
    path.unlink()
    return count * len(block) / seconds


@dataclasses.dataclass
class Run:
    """Wall time of a command in seconds and its peak anonymous memory in bytes."""

    seconds: float
    memory: int


def command(*arguments: str) -> Run:
    """Runs convert_hf.py with these arguments."""
    start, memory = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, str(ROOT / "convert_hf.py"), *arguments], cwd=ROOT)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                memory = max(memory, int(line.split()[1]) * 1024)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"convert_hf.py {' '.join(arguments)} ended with {process.returncode}")
    return Run(time.perf_counter() - start, memory)


def size_of(directory: Path) -> int:
    """Total bytes of all files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def measure(name: str, work: Path, written: Path | None, expected: int, *arguments: str) -> None:
    """Runs one command between two raw writes and prints its row.

    All files in `work` are dropped from the page cache first, so the command reads from the disk.
    """
    before = raw_speed(work, expected) if written else 0.0
    for path in work.rglob("*"):
        if path.is_file():
            forget(path)
    run = command(*arguments)
    line = f"{name:<28} {run.seconds:8.1f} s   {run.memory / 2**20:6.0f} MiB anonymous"
    if written:
        speed = size_of(written) / run.seconds
        raws = [before, raw_speed(work, expected)]
        direct = raw_speed(work, expected, direct=True)
        line += (
            f"   {size_of(written) / 1e9:6.2f} GB   {speed / 1e6:5.0f} MB/s"
            f"   plain loop {raws[0] / 1e6:5.0f}, {raws[1] / 1e6:5.0f} MB/s"
            f"   {speed / statistics.mean(raws):4.0%}   direct {direct / 1e6:5.0f} MB/s"
        )
    print(line, flush=True)


def main() -> None:
    """Runs the conversions of every number of layers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", default="7B", choices=sorted(QWEN2P5), help="size of the Qwen2.5 model"
    )
    parser.add_argument(
        "--layers", default="", help="numbers of layers, for example 4,8 (default: all layers)"
    )
    parser.add_argument("--config", default="", help="--config of convert_hf.py")
    parser.add_argument(
        "--work", type=Path, required=True, help="working directory, on the disk to measure"
    )
    arguments = parser.parse_args()
    shape = QWEN2P5[arguments.shape]
    counts = [int(n) for n in arguments.layers.split(",") if n] or [shape.num_hidden_layers]
    for layers in counts:
        work = arguments.work / f"{arguments.shape}-{layers}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        source, orbax, back = work / "source", work / "orbax", work / "back"
        make_source(dataclasses.replace(shape, num_hidden_layers=layers), source)
        title = f"{arguments.shape}, {layers} layers"
        print(f"{title}: a source of {size_of(source) / 1e9:.2f} GB", flush=True)
        config = [f"--config={arguments.config}"] if arguments.config else []
        given = (f"--source={source}", f"--target={orbax}", *config)
        measure("to Orbax, upcycled", work, orbax, 4 * size_of(source), *given)
        measure("verify", work, None, 0, *given, "--verify")
        given = (f"--source={orbax}", f"--target={back}", "--to=hf")
        measure("to Hugging Face", work, back, size_of(orbax), *given)
        measure("verify", work, None, 0, *given, "--verify")
        shutil.rmtree(orbax)
        given = (f"--source={back}", f"--target={orbax}")
        measure("to Orbax, as it is", work, orbax, size_of(back), *given)
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
