"""Compiles attention over long sequences for TPUs and GPUs and tabulates its temporaries.

    python benchmarks/attention.py [--targets=v5e,v5p,v6e,h100] [--tokens=8192]

The figures are compiler estimates; nothing runs on a TPU or GPU. Each covers one sequence, with
and without segment ids, forward alone and with gradients. On a GPU they omit cuDNN's own
workspace. The script fails if temporaries exceed a quarter of the full score matrices.

Takes about a minute per target; each is compiled in its own process. TPUs need the extra
`compile-tpu`. h100 needs `compile-cuda` and cuDNN (the packages nvidia-cudnn-cu13 and
nvidia-cublas) on the loader's path, because JAX asks cuDNN for its version.
"""

import argparse
import json
import os
import sys
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from benchmarks import tpu_compiler

# Query heads, k, v heads and head dim of the published sizes.
SIZES = {"0.5B": (14, 2, 64), "1.5B": (12, 2, 128), "7B": (28, 4, 128)}
CASES = [
    (size, dtype, segments)
    for size in SIZES
    for dtype in ("bfloat16", "float32")
    for segments in (False, True)
]


def main() -> None:
    """Prints the table. Exits with 1 if a target does not compile or needs too much memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="v5e,v5p,v6e,h100", help="chips, separated by commas")
    parser.add_argument("--tokens", type=int, default=8192, help="length of the sequence")
    parser.add_argument("--job", type=json.loads, help="internal")
    options = parser.parse_args()
    if options.job:
        print(json.dumps(work(options.job)))
        return
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    print(f"Compiled for one sequence of {options.tokens} tokens, not run. Temporaries in MB.\n")
    print(
        "| target | size | dtype | segment ids | forward | with gradients | all scores |\n"
        "|---|---|---|---|---|---|---|"
    )
    failed = []
    for target in options.targets.split(","):
        result = tpu_compiler.estimate(__file__, {"target": target, "tokens": options.tokens})
        if "error" in result:
            failed.append(f"{target}: {result['error']}")
            continue
        for (size, dtype, segments), temporaries in zip(CASES, result["cases"], strict=True):
            scores = 4 * SIZES[size][0] * options.tokens**2
            row = [target, size, dtype, "yes" if segments else "no"]
            print("|", " | ".join(row + [f"{b / 1e6:.0f}" for b in (*temporaries, scores)]), "|")
            if max(temporaries) > scores / 4:
                failed.append(f"{row}: temporaries of {max(temporaries)} bytes")
    if failed:
        sys.exit("\n".join(failed))


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes of temporaries of every case, forward and with gradients."""
    import jax
    import jax.numpy as jnp

    from finermoe_jax.layers.causal import causal_attention

    def forward(q: Any, k: Any, v: Any, *ids: Any) -> Any:
        return causal_attention(q, k, v, ids[0] if ids else None)

    def gradients(dy: Any, q: Any, k: Any, v: Any, *ids: Any) -> Any:
        y, pull = jax.vjp(lambda *qkv: forward(*qkv, *ids), q, k, v)
        return y, pull(dy)

    tpu = job["target"] in tpu_compiler.TOPOLOGIES
    place = tpu_compiler.chip(job["target"]) if tpu else gpu(job["target"])
    cases = []
    with place as sharding:
        for size, dtype, segments in CASES:
            heads, kv_heads, width = SIZES[size]
            q, k = (
                jax.ShapeDtypeStruct((1, job["tokens"], n, width), dtype) for n in (heads, kv_heads)
            )
            ids = [jax.ShapeDtypeStruct((1, job["tokens"]), jnp.int32)] * segments
            programs = [(forward, [q, k, k, *ids]), (gradients, [q, q, k, k, *ids])]
            compiled = [
                tpu_compiler.compile_for(*program, sharding, platform="tpu" if tpu else "cuda")
                for program in programs
            ]
            cases.append([c.memory_analysis().temp_size_in_bytes for c in compiled])
    return {"cases": cases}


def gpu(name: str) -> Any:
    """tpu_compiler.chip for a GPU described in finermoe_jax/analysis/targets."""
    from finermoe_jax.analysis.topology import target_description

    description = target_description(name)
    return tpu_compiler.one_device(
        platform="cuda", topology_name="", target_config=description, topology="1x1x1"
    )


if __name__ == "__main__":
    main()
