"""Upcycles SmolLM2-135M to every architecture of the paper and trains each for five steps.

    python benchmarks/architectures.py models/smollm2_135m OUT [--memory_gib=20] [--only="ct;du"]

Each architecture is one run of train.py with Adafactor on 2 x 128 tokens per step. If the whole
model does not fit in --memory_gib, the run uses its first four layers. Prints a table. OUT keeps
the files of each run except its checkpoints. configs/smollm2_135m.py says how to get the weights.
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
from safetensors import safe_open
from safetensors.numpy import save_file

from finermoe_jax.analysis.paper_tables import ROWS
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.presets import ARCHITECTURES, architecture
from finermoe_jax.model.counts import true_counts
from finermoe_jax.runtime.files import find
from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.weights.hf_weights import read_config
from finermoe_jax.weights.upcycle import upcycled_config

FEW_LAYERS = 4
# Bytes per parameter at the peak: float32 weights, gradients, updated weights, the stacks of the
# loop over layers, and a checkpoint being written.
PEAK_BYTES = 25
# Returns freed memory to the system, which host_memory.py would keep for the next step: half the
# speed, and at most two thirds of the memory.
GIVEN_BACK = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=8"}
# Without pt, which is ct before its first step. Settings: the numeric names, each once.
NAMES = [name for name in ARCHITECTURES if name != "pt"] + ["function_preserving"]
SETTINGS = list(dict.fromkeys(row.variant for row in ROWS if row.variant[0].isdigit()))


def first_layers(source: Path, target: Path) -> None:
    """Copies the first layers of a HF directory with a single safetensors file."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = FEW_LAYERS
    (target / "config.json").write_text(json.dumps(config))
    kept: dict[str, np.ndarray] = {}
    with safe_open(source / "model.safetensors", framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            layer = name.partition("model.layers.")[2].partition(".")[0]
            if not layer or int(layer) < FEW_LAYERS:
                kept[name] = tensors.get_tensor(name)
    save_file(kept, target / "model.safetensors")


def target_model(dense: ModelConfig, name: str) -> ModelConfig:
    """The model config that a run of this name trains."""
    moe = architecture("inter_out_fg" if name == "function_preserving" else name).moe
    return dense if moe is None else upcycled_config(dense, moe)


def run(name: str, source: Path, dense: ModelConfig, workdir: Path) -> str:
    """Trains one architecture and returns its row of the table."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [
            sys.executable, str(find("train.py")), f"--config=configs/smollm2_135m.py:{name}",
            f"--workdir={workdir}", f"--config.init_from={source}", "--config.prompts=()",
            f"--config.dense.num_hidden_layers={dense.num_hidden_layers}",
            "--config.data.sequence_length=128", "--config.data.eval_windows=4",
            "--config.train.steps=5", "--config.train.eval_every=5",
            "--config.train.checkpoint_every=5", "--config.optimizer.name=adafactor",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | GIVEN_BACK,
    )  # fmt: skip
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        print(said, file=sys.stderr)
        return f"| `{name}` | failed |"
    shutil.rmtree(workdir / "checkpoints")
    moe = target_model(dense, name).moe
    counts = true_counts(target_model(dense, name))
    losses = [line["loss"] for line in read_lines(workdir / "metrics.jsonl")]
    assert len(losses) == 5 and all(np.isfinite(losses)), losses
    scores = {e["name"]: e["loss"] for e in read_lines(workdir / "evals.jsonl")}
    experts = f"{moe.num_experts} / {moe.num_active}" if moe else "dense"
    return (
        f"| `{name}` | {dense.num_hidden_layers} | {experts} | {counts.total / 1e6:.1f} / "
        f"{counts.active / 1e6:.1f} | {usage.ru_maxrss / 2**20:.1f} | {losses[0]:.3f} → "
        f"{losses[-1]:.3f} | {scores['step 0']:.3f} → {scores['step 5']:.3f} | "
        f"{time.perf_counter() - begin:.0f} |"
    )


def main() -> int:
    """Runs all architectures, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="HF directory of SmolLM2-135M")
    parser.add_argument("out", type=Path, help="directory for the runs")
    parser.add_argument(
        "--memory_gib",
        type=float,
        default=20,
        help="GiB of memory for one run; larger models use their first four layers",
    )
    parser.add_argument(
        "--only", default="", help="architectures to run, separated by ; (default: all)"
    )
    given = parser.parse_args()
    names = given.only.split(";") if given.only else NAMES + SETTINGS
    whole = read_config(given.source)
    few = dataclasses.replace(whole, num_hidden_layers=FEW_LAYERS)
    given.out.mkdir(parents=True, exist_ok=True)
    short = given.out / "first_layers"
    if not short.exists():
        first_layers(given.source, short)
    print(
        "| variant | layers | experts / active | parameters / active (M) | peak (GiB) | "
        "training loss, step 1 → 5 | held-out loss, step 0 → 5 | seconds |\n" + "|---" * 8 + "|"
    )
    failed = 0
    for name in names:
        size = true_counts(target_model(whole, name)).total * PEAK_BYTES
        fits = size <= given.memory_gib * 2**30
        workdir = given.out / name
        shutil.rmtree(workdir, ignore_errors=True)
        line = run(name, given.source if fits else short, whole if fits else few, workdir)
        failed += "failed" in line
        print(line, flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
