"""Measures generation with the experts in host memory: peak memory, and tokens per second.

    python benchmarks/host_experts.py --shape=1.5B --work=/tmp/host

Writes a Hugging Face directory of the config's model, upcycled, with random bfloat16 weights, piece
by piece. Another process then loads it with experts="host" and generates. Memory is that process's
peak of RssAnon in /proc, sampled every 20 ms; pages mapped from files are omitted.

On a CPU, host memory and device memory are one: the speed says nothing about an accelerator.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from benchmarks.convert import make_source
from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.config.presets import QWEN2P5
from finermoe_jax.generation.decode import stream
from finermoe_jax.weights.source import open_model, read_model

TINY = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, rope_theta=1e6, rms_norm_eps=1e-6,
    max_position_embeddings=256, tie_word_embeddings=False,
)  # fmt: skip
SHAPES = QWEN2P5 | {"tiny": TINY}


def generate(directory: Path, experts: str, prompt: int, tokens: int) -> None:
    """Loads the model, generates, and prints the seconds and the bytes of its weights as JSON."""
    began = time.perf_counter()
    source = open_model(directory)
    model = read_model(source, directory, experts=experts)
    loaded = time.perf_counter()
    ids = np.random.default_rng(0).integers(0, source.config.vocab_size, (1, prompt))
    times = [time.perf_counter() for _ in stream(model, ids, None, tokens)]
    figures = {
        "weights": sum(array.nbytes for array in source.weights.values()),
        "load": loaded - began,
        "first": times[0] - loaded,
        "later": (times[-1] - times[0]) / (len(times) - 1),
    }
    print(json.dumps(figures))


def peak_memory(process: subprocess.Popen) -> int:
    """Waits for a process to end; returns its peak of anonymous memory in bytes."""
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.02)
    return peak


def main() -> None:
    """Writes the model, generates in another process, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1.5B", choices=sorted(SHAPES))
    parser.add_argument("--experts", default="host", help="device, host or host_compute")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate, at least 2")
    parser.add_argument("--work", type=Path, required=True, help="directory for the model")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    source = given.work / "model"
    if given.child:
        generate(source, given.experts, given.prompt, given.tokens)
        return
    upcycled = {"moe": MoEConfig(), "tie_word_embeddings": False}
    shutil.rmtree(source, ignore_errors=True)
    make_source(dataclasses.replace(SHAPES[given.shape], **upcycled), source)
    process = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--child"], stdout=subprocess.PIPE
    )
    peak = peak_memory(process)
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the generating process ended with {process.returncode}")
    figures = json.loads(output)
    shutil.rmtree(source)
    beyond = peak - figures["weights"]
    print(f"{given.shape}, experts={given.experts}: {figures['weights'] / 1e9:.2f} GB of weights")
    print(f"peak memory   {peak / 1e9:8.2f} GB, {beyond / 2**20:.0f} MiB beyond the weights")
    print(f"loading       {figures['load']:8.1f} s")
    print(f"first token   {figures['first']:8.1f} s, with compilation")
    print(f"later tokens  {1 / figures['later']:8.2f} tokens/s")


if __name__ == "__main__":
    main()
