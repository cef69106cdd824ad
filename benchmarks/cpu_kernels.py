"""Measures the CPU expert kernel: against lax.ragged_dot, under skew, and as a layer.

    python benchmarks/cpu_kernels.py

The FineRMoE layer is compared with a dense FFN of equal FLOPs. Figures are medians in float32,
from one process that interleaves all variants with a 2048^3 matrix product, the reference for the
rate.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.presets import QWEN2P5
from finermoe_jax.layers.basic import MLP
from finermoe_jax.moe.layer import FineRMoE
from finermoe_jax.runtime import host_memory
from finermoe_jax.weights.upcycle import upcycled_config
from pallas_kernels.expert_ffn import expert_ffn

D, F, W, E = 896, 152, 448, 128


def by_ragged_dot(
    rows: jax.Array, gate_up: jax.Array, down: jax.Array, sizes: jax.Array, weights: jax.Array
) -> jax.Array:
    """expert_ffn through XLA's ragged products, gate and up joined in one."""
    h, f = jax.lax.ragged_dot(rows, gate_up.swapaxes(1, 2), sizes), down.shape[1]
    active = jax.nn.silu(h[:, :f]) * h[:, f:] * weights[:, None]
    return jax.lax.ragged_dot(active.astype(rows.dtype), down, sizes)


def interleaved(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each variant; the variants take turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats + 1):
        for name, run in variants.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def main() -> None:
    """Measures all variants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds")
    parser.add_argument("--rows", type=int, default=2048, help="rows of all experts together")
    arguments = parser.parse_args()
    repeats, M = arguments.repeats, arguments.rows
    host_memory.keep_freed()
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * shape[-1] ** -0.5, jnp.float32)

    arrays = (draw(M, D), draw(E, 2 * F, D), draw(E, F, W), draw(M))
    sizes = {
        "balanced": jnp.full(E, M // E, jnp.int32),
        "one expert": jnp.zeros(E, jnp.int32).at[E // 2].set(M),
        "as drawn": jnp.asarray(rng.multinomial(M, np.full(E, 1 / E)), jnp.int32),
    }
    dy = draw(M, W)

    def build(function: Callable[..., jax.Array]) -> tuple[Any, Any]:
        def forward(sizes: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, w: jax.Array):  # type: ignore[no-untyped-def]
            return function(x, a, b, sizes, w)

        def both(sizes: jax.Array, *arrays: jax.Array) -> Any:
            y, pull = jax.vjp(lambda *a: forward(sizes, *a), *arrays)
            return y, pull(dy)

        return jax.jit(forward), jax.jit(both)

    ours, ours_both = build(functools.partial(expert_ffn, implementation="cpu"))
    theirs, theirs_both = build(by_ragged_dot)
    error = jnp.linalg.norm(ours(sizes["as drawn"], *arrays) - theirs(sizes["as drawn"], *arrays))
    assert error < 1e-5 * jnp.linalg.norm(ours(sizes["as drawn"], *arrays)), error
    square = draw(2048, 2048)
    product = jax.jit(jnp.dot)

    config = upcycled_config(QWEN2P5["0.5B"], MoEConfig())
    tokens = M // 2
    layer = FineRMoE(config, jnp.float32, nnx.Rngs(0))
    routed = 2 * (4 * D * F + 2 * F * W) + 2 * D * E
    hidden = config.intermediate_size + round(routed / (6 * D))
    dense = MLP(D, hidden, 0.02, jnp.float32, nnx.Rngs(0))
    x, mask = draw(1, tokens, D), jnp.ones((1, tokens), bool)
    layer_def, layer_state = nnx.split(layer)
    dense_def, dense_state = nnx.split(dense)
    run_layer = jax.jit(lambda s: nnx.merge(layer_def, s)(x, mask)[0])
    run_dense = jax.jit(lambda s: nnx.merge(dense_def, s)(x))

    took = interleaved(
        {f"forward, {name}": lambda s=s: ours(s, *arrays) for name, s in sizes.items()}
        | {
            f"forward and backward, {n}": lambda s=s: ours_both(s, *arrays)
            for n, s in sizes.items()
        }
        | {
            "2048^3 product": lambda: product(square, square),
            "FineRMoE layer": lambda: run_layer(layer_state),
            f"dense FFN of {hidden}": lambda: run_dense(dense_state),
        },
        repeats,
    )
    slow = interleaved(
        {
            "forward, balanced": lambda: ours(sizes["balanced"], *arrays),
            "forward, lax.ragged_dot": lambda: theirs(sizes["balanced"], *arrays),
            "forward and backward, balanced": lambda: ours_both(sizes["balanced"], *arrays),
            "forward and backward, lax.ragged_dot": lambda: theirs_both(sizes["balanced"], *arrays),
        },
        repeats,
    )
    peak = 2 * 2048**3 / took["2048^3 product"]
    flops = M * (4 * D * F + 2 * F * W)
    print(
        f"M={M} D={D} F={F} W={W} E={E} float32; a 2048^3 product runs at {peak / 1e9:.0f} GFLOP/s"
    )
    print("| what | ms | ratio |\n|---|---|---|")
    for name, seconds in took.items():
        kind, _, load = name.partition(", ")
        note = f"{seconds / took[f'{kind}, balanced']:.2f} of balanced" if load else ""
        if load == "balanced":
            work = flops * (1 if kind == "forward" else 19 / 5)
            note = f"{work / seconds / peak:.0%} of the product's rate"
        if name == "FineRMoE layer":
            note = f"{seconds / took[f'dense FFN of {hidden}']:.2f} of the dense FFN's"
        print(f"| {name} | {seconds * 1e3:.1f} | {note} |")
    pairs = {
        kind: (slow[f"{kind}, lax.ragged_dot"], slow[f"{kind}, balanced"])
        for kind in ("forward", "forward and backward")
    }
    first, both = pairs.values()
    pairs["backward alone"] = (both[0] - first[0], both[1] - first[1])
    for kind, (other, beside) in pairs.items():
        note = f"{other / beside:.0f} times this kernel's, {beside * 1e3:.1f}"
        print(f"| {kind}, lax.ragged_dot | {other * 1e3:.0f} | {note} |")


if __name__ == "__main__":
    main()
