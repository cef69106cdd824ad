"""Compiles the GPU kernels for an H100 and tabulates the compiler's report. Needs no GPU.

    python benchmarks/gpu_kernels.py [--sizes=0.5B,1.5B,7B] [--rows=16,128,512,2048] [--blackwell]

Nothing runs on a GPU. Registers, spills, shared memory and temporaries are the compiler's; bytes
are counted from the kernels' tiles. The script fails if a kernel spills registers or exceeds the
shared memory. --blackwell also compiles for a B200, where plain JAX replaces the kernels.

Takes about half a minute per size and number of rows. Needs the extra `compile-cuda` (plugin, pjrt
and ptxas). Each compilation has its own process, because a compiler failure can end the process.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGETS = ROOT / "finermoe_jax" / "analysis" / "targets"
EXPERTS = 128
# D and F of the published sizes; W = D / 2.
SIZES = {"0.5B": (896, 152), "1.5B": (1536, 280), "7B": (3584, 592)}


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
    print(
        "\n| size | rows per expert | pass | bound, MB | HBM at best, MB | ratio | TMA copies, MB "
        "| temporaries, MB |\n|---|---|---|---|---|---|---|---|"
    )
    for size in sizes:
        for r in rows:
            for which in ("forward", "backward"):
                figures = results[size, r][which]
                bound, hbm, copies, temporaries = (figures[k] / 1e6 for k in FIGURES)
                print(
                    f"| {size} | {r} | {which} | {bound:.0f} | {hbm:.0f} | {hbm / bound:.2f} "
                    f"| {copies:.0f} | {temporaries:.1f} |"
                )
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


KERNELS = {"expert_ffn", "expert_ffn_backward", "grouped_matmul", "weight_gradient"}
FIGURES = ("bound", "hbm", "copies", "temporaries")


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
    """Compiles forward, and forward with gradients, at one size; returns bytes and temporaries."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from pallas_kernels.expert_ffn import expert_ffn

    (d, f), m = SIZES[size], EXPERTS * rows
    w = d // 2
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

    bf16, sizes = jnp.bfloat16, array(jnp.int32, EXPERTS)
    arrays = (
        array(bf16, m, d),
        array(bf16, EXPERTS, 2 * f, d),
        array(bf16, EXPERTS, f, w),
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

    result = {
        "forward": {"temporaries": temporaries(forward, sizes, *arrays)},
        "backward": {"temporaries": temporaries(gradients, sizes, array(bf16, m, w), *arrays)},
    }
    for which, counts in zip(("forward", "backward"), count_bytes(d, f, w, rows), strict=True):
        result[which] |= dict(zip(FIGURES, counts, strict=False))
    return result


def count_bytes(d: int, f: int, w: int, rows: int) -> list[tuple[int, int, int]]:
    """Bytes of each pass: the lower bound, HBM if L2 serves repeated reads, and all TMA copies.

    For balanced groups of a multiple of eight rows and two-byte elements. The bound reads rows,
    cotangent and weights once and writes output and gradients once.
    """
    from pallas_kernels import hopper
    from pallas_kernels.expert_ffn import mosaic_gpu as ffn
    from pallas_kernels.grouped_matmul import mosaic_gpu as matmul

    m, weights = EXPERTS * rows, EXPERTS * 3 * f * d - EXPERTS * f * (d - w)
    f_blocks = -(-f // ffn.BLOCK)
    f_padded = f_blocks * ffn.BLOCK

    bound = m * d + weights + m * w
    tile = ffn.tile_rows(f)
    w_tiles = -(-w // (ffn.W_BLOCKS * ffn.BLOCK))
    w_wide = w_tiles * ffn.W_BLOCKS * ffn.BLOCK
    each = -(-f_blocks // 2) * tile * d + 2 * f_padded * d + f_padded * w_wide
    tiles = EXPERTS * -(-rows // tile)
    forward = (bound, bound, tiles * each + m * w)

    def product(k: int, n: int) -> tuple[int, int]:
        columns = matmul.tile_columns(n)
        tiles = EXPERTS * -(-rows // hopper.TILE_ROWS) * -(-n // columns)
        weights_k = k  # with the rows' padding: TMA fills it, and copies nothing for it
        return m * k + EXPERTS * weights_k * n + m * n, tiles * k * (hopper.TILE_ROWS + columns)

    def gradient(k: int, k_wide: int, n: int) -> tuple[int, int]:
        columns = matmul.tile_columns(n)
        tiles = -(-k_wide // hopper.TILE_ROWS) * -(-n // columns) * EXPERTS
        depth = -(-rows // hopper.STEP) * hopper.STEP
        return m * (k_wide + n) + EXPERTS * k * n, tiles * depth * (hopper.TILE_ROWS + columns)

    bound = 2 * (m * d + weights) + m * w
    tiles = EXPERTS * -(-rows // hopper.TILE_ROWS)
    fused_hbm = m * (d + w) + weights + 3 * m * f_padded
    fused_copies = f_blocks * (hopper.TILE_ROWS + 2 * ffn.BLOCK) * d
    fused_copies += f_blocks * (hopper.TILE_ROWS + ffn.BLOCK) * w
    others = (
        product(2 * f_padded, d),
        gradient(2 * f, 2 * f_padded, d),
        gradient(f, f_padded, w),
    )
    hbm = fused_hbm + sum(h for h, _ in others) - EXPERTS * 2 * (f_padded - f) * d
    written = 3 * m * f_padded + m * d + weights
    copies = tiles * fused_copies + sum(c for _, c in others) + written
    backward = (bound, hbm, copies)
    return [tuple(2 * count for count in counts) for counts in (forward, backward)]  # type: ignore[misc]


if __name__ == "__main__":
    main()
