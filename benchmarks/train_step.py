"""The training step on a CPU against the machine's own matrix product.

    python benchmarks/train_step.py [--layers=4] [--repeats=9] [--unroll=4] [--remat=none]

Layers of Qwen2.5-0.5B's width as FineRMoE (32, 2, 1, 2), vocabulary 32000, batch 2 x 256, float32,
random weights. Forward and backward, and the whole step with AdamW, take turns with the matrix
products, so that what else runs on the machine meets all of them; medians, the products' fastest.
FLOPs: finermoe_jax/flops.py.
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

from finermoe_jax import host_memory, sharding
from finermoe_jax.config import MoEConfig
from finermoe_jax.flops import training_flops
from finermoe_jax.model import Decoder
from finermoe_jax.optim import optimizer
from finermoe_jax.packing import Batch
from finermoe_jax.published import QWEN2P5
from finermoe_jax.run_settings import DataConfig, MeshConfig, RunConfig, TrainConfig
from finermoe_jax.sharding import Placement
from finermoe_jax.step import batch_loss, init_optimizer, jit_step

BATCH, TOKENS = 2, 256


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--unroll", type=int, default=4, help="train.scan_unroll")
    parser.add_argument("--remat", default="none", help="train.remat")
    parser.add_argument("--free", action="store_true", help="give freed memory back each time")
    arguments = parser.parse_args()
    if not arguments.free:
        host_memory.keep_freed()
    shape = dataclasses.replace(
        QWEN2P5["0.5B"],
        num_hidden_layers=arguments.layers,
        vocab_size=32000,
        tie_word_embeddings=False,
        moe=MoEConfig(),
        initializer_range=0.02,
    )
    model = nnx.jit(
        lambda: Decoder(shape, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    )()
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    model.placement = Placement(mesh)
    config = RunConfig(
        model=dataclasses.replace(shape, moe=None),
        data=DataConfig(sequence_length=TOKENS, global_batch_size=BATCH),
        train=TrainConfig(
            steps=1000, compute_dtype="float32", remat=arguments.remat, scan_unroll=arguments.unroll
        ),
    )
    shardings, _ = sharding.param_shardings(model, mesh)
    graphdef, state = nnx.split(model)
    flops = training_flops(shape, TOKENS) * BATCH * TOKENS
    params = jax.device_put(nnx.to_pure_dict(state), shardings)
    del state, model
    tx = optimizer(config.optimizer, config.train.steps)
    opt_state = init_optimizer(tx, params, shardings, mesh)
    step, places = jit_step(graphdef, config, tx, params, opt_state, shardings, mesh)
    held = list(jax.device_put((params, opt_state), places, donate=True))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.vocab_size, (BATCH, TOKENS + 1)).astype(np.int32)
    batch = Batch(jax.device_put(tokens, sharding.batch_sharding(mesh)))
    both = jax.jit(
        lambda p, b: jax.value_and_grad(batch_loss, argnums=2, has_aux=True)(graphdef, config, p, b)
    )

    def whole() -> Any:
        held[0], held[1], metrics = step(held[0], held[1], batch)
        return metrics

    variants: dict[str, Callable[[], Any]] = {
        "forward and backward": lambda: both(held[0], batch),
        "whole step": whole,
    }
    multiply = jax.jit(jnp.matmul)
    for size in (1024, 2048):
        a, b = (jnp.asarray(rng.standard_normal((size, size)), jnp.float32) for _ in "ab")
        variants[f"matmul {size}"] = lambda a=a, b=b: multiply(a, b)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.repeats + 2):
        for name, run in variants.items():
            for _ in range(3 if "matmul" in name else 1):
                began = time.perf_counter()
                jax.block_until_ready(run())
                times[name].append(time.perf_counter() - began)
    peak = max(2 * size**3 / min(times[f"matmul {size}"]) for size in (1024, 2048))
    median = max(2 * size**3 / statistics.median(times[f"matmul {size}"]) for size in (1024, 2048))
    count = sum(leaf.size for leaf in jax.tree.leaves(held[0]))
    print(f"{count:,} parameters, {flops / 1e9:.1f} GFLOP forward and backward")
    print(f"best matmul {peak / 1e9:.0f} GFLOP/s, median {median / 1e9:.0f}")
    for name in ("forward and backward", "whole step"):
        seconds = statistics.median(times[name][2:])
        print(
            f"{name:<22} {seconds:6.3f} s (fastest {min(times[name][2:]):.3f})  "
            f"{flops / seconds / 1e9:6.1f} GFLOP/s  {flops / seconds / peak:6.1%} of the best, "
            f"{flops / seconds / median:6.1%} of the median matmul"
        )


if __name__ == "__main__":
    main()
