"""Measures the training step on a CPU against a matrix product and the dense model's step.

    python benchmarks/train_step.py [--layers=4] [--repeats=9] [--unroll=4] [--remat=none]
    python benchmarks/train_step.py --config=configs/smollm2_135m.py --layers=10

By default the model is FineRMoE (32, 2, 1, 2) with layers of Qwen2.5-0.5B's width, vocabulary
32000, batch 2 x 256, float32 and random weights. --config takes model, batch and remat from a
config file.

Forward and backward, the whole step with AdamW, the dense model's whole step and the matrix
products take turns, so that other jobs on the machine affect all of them. Prints medians, the
share of the fastest product, and the ratio to the dense step, round by round. FLOPs are those of
finermoe_jax/config/flops.py.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from finermoe_jax.analysis.params import run_model
from finermoe_jax.config.flops import training_flops
from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.config.parse import preset, run_config
from finermoe_jax.config.presets import QWEN2P5
from finermoe_jax.config.run import DataConfig, MeshConfig, RunConfig, TrainConfig
from finermoe_jax.data.packing import Batch
from finermoe_jax.layers import sharding
from finermoe_jax.layers.parameters import trained_kinds
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.runtime import host_memory
from finermoe_jax.training.optimizer import optimizer
from finermoe_jax.training.step import batch_loss, init_optimizer, jit_step


def settings(arguments: argparse.Namespace) -> tuple[ModelConfig, RunConfig]:
    """The model config and run config: from a config file, or with Qwen2.5-0.5B's widths."""
    if arguments.config:
        run = run_config(preset(arguments.config).to_dict())
        shape = run_model(run)
    else:
        run = RunConfig(
            dense=QWEN2P5["0.5B"],
            data=DataConfig(sequence_length=256, global_batch_size=2),
            train=TrainConfig(compute_dtype="float32", remat=arguments.remat or "none"),
        )
        shape = dataclasses.replace(
            QWEN2P5["0.5B"], vocab_size=32000, tie_word_embeddings=False, moe=MoEConfig()
        )
    remat = arguments.remat or run.train.remat
    train = dataclasses.replace(
        run.train,
        steps=1000,
        remat=remat,
        scan_unroll=arguments.unroll or run.train.scan_unroll,
        compute_dtype="float32",
        param_dtype="float32",
    )
    shape = dataclasses.replace(
        shape, num_hidden_layers=arguments.layers or shape.num_hidden_layers, initializer_range=0.02
    )
    return shape, dataclasses.replace(run, train=train)


class Stepper:
    """A model of random weights with its optimizer state and a batch.

    Attributes:
      flops: FLOPs of a step's forward and backward pass (finermoe_jax/config/flops.py).
      parameters: number of parameters.
    """

    def __init__(self, shape: ModelConfig, config: RunConfig):
        dtypes = {
            "dtype": config.train.compute_dtype, "param_dtype": config.train.param_dtype
        }  # fmt: skip
        model = nnx.jit(lambda: Decoder(shape, **dtypes, rngs=nnx.Rngs(0)))()
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        model.placement = Placement(mesh)
        shardings, _ = sharding.param_shardings(model, mesh)
        graphdef, state = nnx.split(model)
        batch, length = config.data.global_batch_size, config.data.sequence_length
        self.flops = training_flops(shape, length) * batch * length
        params = jax.device_put(nnx.to_pure_dict(state), shardings)
        tx = optimizer(
            config.optimizer, config.train.steps, trained_kinds(model, config.train.freeze)
        )
        del state, model
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        opt_state = init_optimizer(tx, params, shardings, mesh)
        self._step, places = jit_step(graphdef, config, tx, params, opt_state, shardings, mesh)
        self._held = list(jax.device_put((params, opt_state), places, donate=True))
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, shape.vocab_size, (batch, length + 1)).astype(np.int32)
        self._batch = Batch(jax.device_put(tokens, sharding.batch_sharding(mesh)))
        self._both = jax.jit(
            lambda p, b: jax.value_and_grad(batch_loss, argnums=2, has_aux=True)(
                graphdef, config, p, b
            )
        )

    def forward_and_backward(self) -> Any:
        """Computes the loss and the gradient; keeps neither parameters nor state."""
        return self._both(self._held[0], self._batch)

    def step(self) -> Any:
        """Takes a step and returns its metrics."""
        self._held[0], self._held[1], metrics = self._step(*self._held, self._batch)
        return metrics


def timed(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every variant in each round; drops two warm-up rounds, except of products."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats + 2):
        for name, run in variants.items():
            for _ in range(3 if "matmul" in name else 1):
                began = time.perf_counter()
                jax.block_until_ready(run())
                times[name].append(time.perf_counter() - began)
    return {n: t if "matmul" in n else t[2:] for n, t in times.items()}


def main() -> None:
    """Measures all variants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--config", default="", help="a config file (default: Qwen2.5-0.5B's width)"
    )
    parser.add_argument(
        "--layers", type=int, default=0, help="number of layers (default: 4, or the config's)"
    )
    parser.add_argument("--repeats", type=int, default=9, help="measured rounds")
    parser.add_argument(
        "--unroll", type=int, default=0, help="train.scan_unroll (default: 4, or the config's)"
    )
    parser.add_argument("--remat", default="", help="train.remat (default: none, or the config's)")
    parser.add_argument(
        "--free", action="store_true", help="return freed memory to the system after each step"
    )
    arguments = parser.parse_args()
    if not arguments.config:
        arguments.layers, arguments.unroll = arguments.layers or 4, arguments.unroll or 4
    if not arguments.free:
        host_memory.keep_freed()
    shape, config = settings(arguments)
    model = Stepper(shape, config)
    dense = Stepper(
        dataclasses.replace(shape, moe=None, tie_word_embeddings=config.dense.tie_word_embeddings),
        config,
    )
    variants: dict[str, Callable[[], Any]] = {
        "forward and backward": model.forward_and_backward,
        "whole step": model.step,
        "dense model's step": dense.step,
    }
    multiply = jax.jit(jnp.matmul)
    rng = np.random.default_rng(0)
    for size in (1024, 2048):
        a, b = (jnp.asarray(rng.standard_normal((size, size)), jnp.float32) for _ in "ab")
        variants[f"matmul {size}"] = lambda a=a, b=b: multiply(a, b)  # type: ignore[misc]
    times = timed(variants, arguments.repeats)
    peak = max(2 * size**3 / min(times[f"matmul {size}"]) for size in (1024, 2048))
    median = max(2 * size**3 / statistics.median(times[f"matmul {size}"]) for size in (1024, 2048))
    print(f"{model.parameters:,} parameters, {model.flops / 1e9:.1f} GFLOP forward and backward; "
          f"dense {dense.parameters:,}, {dense.flops / 1e9:.1f}")  # fmt: skip
    print(f"best matmul {peak / 1e9:.0f} GFLOP/s, median {median / 1e9:.0f}")
    for name in list(variants)[:3]:
        flops = dense.flops if "dense" in name else model.flops
        seconds = statistics.median(times[name])
        print(
            f"{name:<22} {seconds:6.3f} s (fastest {min(times[name]):.3f})  "
            f"{flops / seconds / 1e9:6.1f} GFLOP/s  {flops / seconds / peak:6.1%} of the best, "
            f"{flops / seconds / median:6.1%} of the median matmul"
        )
    ratios = [a / b for a, b in zip(times["whole step"], times["dense model's step"], strict=True)]
    print(
        f"step / dense model's step: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to "
        f"{max(ratios):.2f}; of their FLOPs {model.flops / dense.flops:.3f}"
    )


if __name__ == "__main__":
    main()
