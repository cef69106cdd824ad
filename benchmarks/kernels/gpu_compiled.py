"""Compiles the GPU kernels for an H100 and tabulates the compiler's report. Needs no GPU.

    python benchmarks/kernels/gpu_compiled.py [--sizes=0.5B,1.5B,7B] [--rows=16,128,512,2048]
        [--blackwell]

Nothing runs on a GPU. Registers, spills, shared memory and temporaries are the compiler's; bytes
are counted from the kernels' tiles (gpu_shapes.py). The script fails if a kernel spills registers
or exceeds the shared memory. --blackwell also compiles for a B200, where plain JAX replaces the
kernels.

Takes about half a minute per size and number of rows. Needs the extra `compile-cuda` (plugin, pjrt
and ptxas). Each compilation has its own process, because a compiler failure can end the process.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.kernels import gpu_shapes
from benchmarks.kernels.gpu_shapes import PASSES, SIZES

ROOT = Path(__file__).parents[2]
TARGETS = ROOT / "finermoe_jax" / "analysis" / "targets"


def main() -> None:
    """Prints the tables. Exits with 1 if a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(SIZES), help="sizes, separated by commas")
    parser.add_argument("--rows", default="16,128,512,2048", help="rows per expert")
    parser.add_argument("--blackwell", action="store_true", help="also compile for a B200")
    parser.add_argument("--one", nargs=3, metavar=("TARGET", "SIZE", "ROWS"), help="internal")
    options = parser.parse_args()
    if options.one:
        target, size, rows = options.one
        print(json.dumps(compile_one(target, size, int(rows))))
        return
    sizes, rows = options.sizes.split(","), [int(r) for r in options.rows.split(",")]
    results = {(size, r): in_process("h100", size, r) for size in sizes for r in rows}

    print("Compiled for an H100, not run on one.\n")
    print(
        "| size | kernel | registers | spilled bytes | shared memory, KiB |\n|---|---|---|---|---|"
    )
    spilled = 0
    for size in sizes:
        by_name: dict[str, list[tuple[int, int, int]]] = {}
        for r in rows:
            for name, *figures in results[size, r]["kernels"]:
                by_name.setdefault(name, []).append(tuple(figures))
        for name, figures in by_name.items():
            registers, spills, shared = (max(column) for column in zip(*figures, strict=True))
            spilled += spills
            print(f"| {size} | {name} | {registers} | {spills} | {shared / 1024:.0f} |")
    print_bytes(sizes, rows, results)
    if options.blackwell:
        for size in sizes:
            in_process("b200", size, rows[0])
        print("\nThe fallback compiles for a B200.")
    if spilled:
        sys.exit(f"{spilled} bytes of registers spilled")


def in_process(target: str, size: str, rows: int) -> dict:
    """Runs compile_one in its own process and adds the kernels of its dump."""
    with tempfile.TemporaryDirectory() as dump:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "MOSAIC_GPU_DUMP_TO": dump,
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run(
            [sys.executable, __file__, "--one", target, size, str(rows)],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{target}, {size}, {rows} rows per expert:\n{done.stderr}")
        result = json.loads(done.stdout.splitlines()[-1])
        result["kernels"] = kernels(Path(dump))
    if target == "h100" and {name for name, *_ in result["kernels"]} != KERNELS:
        sys.exit(f"{size}: compiled {result['kernels']}, expected {KERNELS}")
    return result


def print_bytes(sizes: list[str], rows: list[int], results: dict) -> None:
    """Prints the bytes of each pass, and those of the backward pass above its bound, by cause."""
    print(
        "\n| size | rows per expert | pass | bound, MB | HBM at best, MB | ratio | TMA copies, MB "
        "| temporaries, MB |\n|---|---|---|---|---|---|---|---|"
    )
    cases = list(itertools.product(sizes, rows))
    for (size, r), which in itertools.product(cases, PASSES):
        shape = SIZES[size]
        bound = gpu_shapes.bound(shape, r)[which]
        hbm = bound + (which == "backward") * sum(gpu_shapes.excess(shape, r).values())
        copies, temporaries = gpu_shapes.copies(shape, r)[which], results[size, r][which]
        print(
            f"| {size} | {r} | {which} | {bound / 1e6:.0f} | {hbm / 1e6:.0f} | {hbm / bound:.2f} "
            f"| {copies / 1e6:.0f} | {temporaries / 1e6:.1f} |"
        )
    causes = list(gpu_shapes.excess(SIZES[sizes[0]], rows[0]))
    print("\n| size | rows per expert | " + " | ".join(f"{cause}, MB" for cause in causes) + " |")
    print("|---|---" + "|---" * len(causes) + "|")
    for size, r in cases:
        each = gpu_shapes.excess(SIZES[size], r).values()
        print(f"| {size} | {r} | " + " | ".join(f"{count / 1e6:.0f}" for count in each) + " |")


KERNELS = {"expert_ffn", "expert_ffn_backward", "grouped_matmul", "weight_gradient"}


def kernels(dump: Path) -> list[tuple[str, int, int, int]]:
    """Name and maximum registers, spilled bytes and shared-memory bytes of each dumped kernel."""

    def most(name: str, kind: str, pattern: str) -> int:
        found = []
        for file in dump.glob(f"*.{kind}"):
            if re.fullmatch(rf"{name}_\d+\.{re.escape(kind)}", file.name):
                found += [sum(map(int, re.findall(pattern, file.read_text())))]
        if not found:
            raise ValueError(f"{name}: no *.{kind} among {sorted(os.listdir(dump))}")
        return max(found)

    return [
        (
            name,
            most(name, "ptxas", r"Used (\d+) registers"),
            most(name, "ptxas", r"(\d+) bytes spill"),
            most(name, "resources.txt", r"smem_scratch_bytes=(\d+)"),
        )
        for name in sorted({path.stem.rsplit("_", 1)[0] for path in dump.glob("*.ptxas")})
    ]


def compile_one(target: str, size: str, rows: int) -> dict:
    """Compiles forward, and forward with gradients; returns the bytes of temporaries of each."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from pallas_kernels.expert_ffn import expert_ffn
    from pallas_kernels.grouped_matmul import grouped_matmul

    d, f, w, experts = SIZES[size]
    m = experts * rows
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=(TARGETS / f"{target}.txtpb").read_text(),
        topology="1x1x1",
    )
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def array(dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    bf16, sizes = jnp.bfloat16, array(jnp.int32, experts)
    arrays = (
        array(bf16, m, d),
        array(bf16, experts, 2 * f, d),
        array(bf16, experts, f, w),
        array(jnp.float32, m),
    )

    def forward(sizes, x, w_in, w_out, weights):
        return expert_ffn(x, w_in, w_out, sizes, weights, "gpu")

    def gradients(sizes, dy, *arrays):
        y, pull = jax.vjp(lambda *arrays: forward(sizes, *arrays), *arrays)
        return y, pull(dy)

    def temporaries(function, *arguments) -> int:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            traced = jax.jit(function).trace(*arguments)
            compiled = traced.lower(lowering_platforms=("cuda",)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # The backward pass of small experts does not use it.
    temporaries(lambda x, w, sizes: grouped_matmul(x, w, sizes, True, "gpu"), *arrays[:2], sizes)
    return {
        "forward": temporaries(forward, sizes, *arrays),
        "backward": temporaries(gradients, sizes, array(bf16, m, w), *arrays),
    }


if __name__ == "__main__":
    main()
