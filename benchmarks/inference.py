"""Measures prefill and decoding on a CPU, with Qwen2.5-0.5B's shapes and random weights.

    python benchmarks/inference.py bounds
    python benchmarks/inference.py architectures --plot=docs/inference.png

`bounds` compares FineRMoE with the limits of the machine, measured in the same process between the
runs. A decoding step is compared with the bytes it must read at the speed of reading 256 MiB.
These bytes are all weights except the embedding table and the experts that no row chose, plus the
tokens in the cache. A prefill of 512 tokens is compared with float32 products of 2048 x 2048
matrices.

`architectures` is the paper's Table 6 at this scale: time to the first token of a prompt of 512,
and tokens per second after it, at batch 1 in bfloat16. All architectures have the same number of
layers, are in memory together, and take turns in every round. C4A2 is sparse upcycling with
FineRMoE's memory; it is not in the paper.

Figures are medians. All architectures run the same two programs
(finermoe_jax/generation/decode.py).
"""

import argparse
import dataclasses
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from tqdm import tqdm

from finermoe_jax.config.flops import forward_flops
from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.config.presets import ARCHITECTURES, QWEN2P5
from finermoe_jax.generation.decode import (
    _Running,
    bucket,
    decode,
    init_cache,
    layers_apart,
    prefill,
)
from finermoe_jax.generation.sampling import Sampling
from finermoe_jax.model.decoder import Decoder, parameter_kinds, parameter_shapes, with_params
from finermoe_jax.runtime import host_memory
from finermoe_jax.training import style

PROMPT, NEW = 512, 64
GREEDY = Sampling().scalars()
TABLE_6: dict[str, MoEConfig | None] = {
    name: ARCHITECTURES[variant].moe
    for name, variant in {
        "FineRMoE": "inter_out_fg", "S16A4": "s16a4", "DU": "du", "NVShard": "nvshard",
        "dense base": "pt", "C32A2": "c32a2",
    }.items()
}  # fmt: skip
# Not in the paper: as many whole FFNs as fit in FineRMoE's memory, 2 of them active.
TABLE_6["C4A2"] = dataclasses.replace(ARCHITECTURES["c32a2"].moe, intermediate_expansion=4)


# --- limits of the machine ------------------------------------------------------------------


class Machine:
    """Measures the current speed of memory and of matrix products."""

    def __init__(self) -> None:
        self.values = jnp.ones(64 << 20, jnp.float32)
        self.matrix = jnp.ones((2048, 2048), jnp.float32)
        self.read, self.multiply = jax.jit(jnp.sum), jax.jit(jnp.matmul)
        self.bandwidth(), self.flops()

    def bandwidth(self) -> float:
        """Bytes per second of reading 256 MiB."""
        return self.values.nbytes / seconds(lambda: self.read(self.values), 3)

    def flops(self) -> float:
        """Float32 operations per second."""
        return 2 * 2048**3 / seconds(lambda: self.multiply(self.matrix, self.matrix), 3)


def seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    """Median seconds of a call until its result is ready."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# --- models ---------------------------------------------------------------------------------


def random_model(
    config: ModelConfig, dtype: str, shared: dict[tuple, jax.Array], compute: str = "float32"
) -> Decoder:
    """A decoder of repeated random weights; reuses those in `shared` and adds new ones to it."""
    piece = np.random.default_rng(0).standard_normal(1 << 20, np.float32) * 0.02
    piece = piece.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    params: dict = {}
    for path, shape in parameter_shapes(config).items():
        if path not in shared:
            values = _aligned(int(np.prod(shape)), piece.dtype)
            for start in range(0, values.size, piece.size):
                part = values[start : start + piece.size]
                # Rolled for every place, so that no two experts or layers are equal.
                part[:] = np.roll(piece, start // 977 + len(path))[: part.size]
            shared[path] = jax.device_put(values.reshape(shape), may_alias=True)
        place = params
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = shared[path]
    return with_params(config, params, dtype=compute)


def _aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """An empty array aligned to 64 bytes, which JAX uses without a copy."""
    raw = np.empty(size * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * dtype.itemsize].view(dtype)


class Served:
    """A model with a running request of `batch` rows, with a prompt of `prompt` tokens each."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        batch: int,
        shared: dict | None = None,
        compute: str = "float32",
        prompt: int = PROMPT,
    ):
        self.config, self.batch, self.compute = config, batch, compute
        model = random_model(config, dtype, {} if shared is None else shared, compute)
        self.graphdef, self.stacked = nnx.split(model)
        self.state = layers_apart(self.stacked)
        self.itemsize = 2 if dtype == "bfloat16" else 4
        rng = np.random.default_rng(1)
        self.prompt = rng.integers(0, config.vocab_size, (batch, prompt)).astype(np.int32)
        self.token, self.running = self.prefill()

    def prefill(self) -> tuple[jax.Array, _Running]:
        """Prefills a new cache with the prompt and returns the first token."""
        length = self.prompt.shape[1]
        cache = init_cache(self.config, self.batch, bucket(length + NEW), self.compute)
        jax.block_until_ready(cache)
        lengths = np.full(self.batch, length, np.int32)
        return prefill(self.graphdef, self.stacked, self.prompt, lengths, cache, GREEDY)

    def decode(self) -> jax.Array:
        """Decodes the next token of every row."""
        arguments = self.state, self.token, self.running, GREEDY
        self.token, self.running = decode(self.graphdef, *arguments)
        return self.token

    def bytes(self) -> tuple[int, int]:
        """Bytes of all weights, and bytes that the next step reads, tokens of the cache included.

        Counts the experts that the routers choose.
        """
        total = needed = 0
        kinds = parameter_kinds(self.config)
        chosen = _chosen(self.graphdef, self.stacked, self.token, self.running.cache)
        own = [len(np.unique(layer)) for layer in chosen]
        for path, shape in parameter_shapes(self.config).items():
            size = int(np.prod(shape)) * self.itemsize
            total += size
            if kinds[path].bank:
                size = size // shape[0] // shape[1] * sum(own)
            elif path[0] == "embed" and not self.config.tie_word_embeddings:
                size = self.batch * shape[1] * self.itemsize
            needed += size
        for keys, values in (place for run in self.running.cache.layers for place in run):
            used = int(self.running.cache.length) / keys.shape[3]
            needed += round((keys.nbytes + values.nbytes) * used)
        return total, needed

    def prefill_flops(self) -> float:
        """FLOPs of a prefill: logits are computed for the last token of each row only."""
        length = self.prompt.shape[1]
        token = forward_flops(self.config, length)
        return self.batch * (length * (sum(token.values()) - token["lm_head"]) + token["lm_head"])


@functools.partial(jax.jit, static_argnums=0)
def _chosen(graphdef: Any, state: Any, token: jax.Array, cache: Any) -> list[jax.Array]:
    features = nnx.merge(graphdef, state).features(token[:, None], cache=cache)
    return [routing.experts for routing in features.routing]


def shapes(moe: MoEConfig | None, layers: int) -> ModelConfig:
    """Qwen2.5-0.5B with these experts and untied embeddings, like all upcycled models."""
    base = dataclasses.replace(QWEN2P5["0.5B"], num_hidden_layers=layers)
    return dataclasses.replace(base, moe=moe, tie_word_embeddings=False)


# --- the two measurements -------------------------------------------------------------------


def bounds(layers: int, rounds: int) -> list[dict[str, Any]]:
    """Measures FineRMoE in float32 and bfloat16, at batch 1 and 8."""
    machine, rows = Machine(), []
    for dtype in ("float32", "bfloat16"):
        shared: dict[tuple, jax.Array] = {}
        for batch in (1, 8):
            served = Served(shapes(TABLE_6["FineRMoE"], layers), dtype, batch, shared)
            jax.block_until_ready((served.decode(), served.prefill()))
            _, needed = served.bytes()
            decode, bandwidth, prefill, peak = [], [], [], []
            for _ in tqdm(range(rounds), desc=f"{dtype}, batch {batch}", file=sys.stderr):
                bandwidth.append(machine.bandwidth())
                decode.append(seconds(served.decode, 3))
                if batch == 1:
                    peak.append(machine.flops())
                    prefill.append(seconds(served.prefill))
            row: dict[str, Any] = dict(weights=dtype, batch=batch, bytes=needed)
            row["step_s"] = statistics.median(decode)
            row["bandwidth"] = statistics.median(bandwidth)
            row["decode_share"] = needed / row["step_s"] / row["bandwidth"]
            if prefill:
                row["prefill_s"], row["peak"] = map(statistics.median, (prefill, peak))
                row["prefill_share"] = served.prefill_flops() / row["prefill_s"] / row["peak"]
            rows.append(row)
            print(_bounds_line(row), flush=True)
            del served
            gc.collect()
    return rows


def _bounds_line(row: dict[str, Any]) -> str:
    line = (
        f"| {row['weights']} | {row['batch']} | {row['bytes'] / 1e9:.2f} GB | "
        f"{row['step_s'] * 1e3:.0f} ms | {row['batch'] / row['step_s']:.1f} | "
        f"{row['bandwidth'] / 1e9:.1f} GB/s | {row['decode_share']:.0%} |"
    )
    if "prefill_s" not in row:
        return line + " | | |"
    return line + (
        f" {row['prefill_s']:.2f} s | {row['peak'] / 1e9:.0f} GFLOP/s | "
        f"{row['prefill_share']:.0%} |"
    )


def architectures(layers: int, rounds: int, plot: str) -> list[dict[str, Any]]:
    """Measures time to first token and tokens per second of Table 6's architectures."""
    models: dict[str, Served] = {}
    embeddings: dict[tuple, jax.Array] = {}
    for name, moe in tqdm(TABLE_6.items(), desc="weights and programs", file=sys.stderr):
        shared = {path: w for path, w in embeddings.items() if path[0] != "runs"}
        models[name] = Served(shapes(moe, layers), "bfloat16", 1, shared)
        embeddings = shared
        jax.block_until_ready((models[name].decode(), models[name].prefill()))
    first: dict[str, list[float]] = {name: [] for name in models}
    step: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(rounds), desc="rounds", file=sys.stderr):
        for name, served in models.items():
            first[name].append(seconds(served.prefill))
            step[name].append(seconds(served.decode, 5))
    rows = []
    for name, served in models.items():
        total, needed = served.bytes()
        row = dict(name=name, total=total, needed=needed)
        row |= dict(first_s=statistics.median(first[name]), step_s=statistics.median(step[name]))
        # Each round against the same round's FineRMoE.
        for key, times in (("first", first), ("step", step)):
            pairs = zip(times[name], times["FineRMoE"], strict=True)
            row[f"{key}_ratio"] = statistics.median(a / b for a, b in pairs)
        rows.append(row)
        print(
            f"| {name} | {total / 1e9:.2f} GB | {needed / 1e9:.2f} GB | {row['first_s']:.2f} s | "
            f"{row['first_ratio']:.2f} | {1 / row['step_s']:.1f} | {1 / row['step_ratio']:.2f} |",
            flush=True,
        )
    if plot:
        draw(rows, layers, plot)
    return rows


@style.applied()
def draw(rows: list[dict[str, Any]], layers: int, path: str | Path) -> None:
    """Plots weights, time to first token and tokens per second, a bar per architecture."""
    picture = style.figure(7.5, 3.6)
    panels = picture.subplots(1, 3, sharey=True)
    names = [row["name"] for row in rows][::-1]
    colours = [style.BLUE if name == "FineRMoE" else style.GREY for name in names]
    for axes, title, values, form in (
        (panels[0], "bfloat16 weights, GB", [row["total"] / 1e9 for row in rows], "{:.2f}"),
        (panels[1], "time to first token, s", [row["first_s"] for row in rows], "{:.2f}"),
        (panels[2], "tokens per second", [1 / row["step_s"] for row in rows], "{:.1f}"),
    ):
        bars = axes.barh(names, values[::-1], color=colours)
        axes.bar_label(bars, [form.format(v) for v in values[::-1]], padding=3, fontsize=9)
        axes.set_title(title)
        axes.set_xlim(0, max(values) * 1.25)
        axes.grid(visible=False)
        axes.tick_params(axis="y", length=0)
    style.title(
        picture,
        f"Qwen2.5-0.5B's shapes, {layers} layers, prompt of {PROMPT}, 2 CPU cores",
    )
    picture.savefig(path)


def main() -> None:
    """Runs one of the two measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["bounds", "architectures"], help="the measurement")
    parser.add_argument(
        "--layers", type=int, help="number of layers (default: 24 for bounds, 10 for architectures)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument(
        "--plot", default="", help="with architectures: write the table as a plot to this file"
    )
    parser.add_argument("--output", default="", help="write the figures as JSON to this file")
    arguments = parser.parse_args()
    host_memory.keep_freed()
    if arguments.what == "bounds":
        print("| weights | batch | bytes to read | step | tokens/s | reads at | share | "
              "prefill of 512 | products at | share |\n" + "|---" * 10 + "|")  # fmt: skip
        rows = bounds(arguments.layers or 24, arguments.rounds)
    else:
        print("| | all weights | read by a step | first token | / FineRMoE | tokens/s | "
              "/ FineRMoE |\n" + "|---" * 7 + "|")  # fmt: skip
        rows = architectures(arguments.layers or 10, arguments.rounds, arguments.plot)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
