"""Compiles the training step for TPU and GPU slices: tables and plots of docs/scaling.md.

    pip install -e '.[compile-tpu]'
    python benchmarks/pods.py --results=DIR [--only=slices,traffic,sequences,chips,experts]
        [--plot=docs]

Runs finermoe aot once per row and stores the figures in DIR. A row is not compiled again if DIR
has it with the same arguments. All figures are compiler estimates or counts in the compiled
program. The GPU row needs an interpreter with the extra `compile-cuda`: --gpu_python=PATH.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finermoe_jax.training import style

GIB = 2**30


class Row(NamedTuple):
    """One compilation: its name, the arguments of aot, and its position in a plot."""

    name: str
    config: str
    topology: str
    mesh: tuple[int, int, int, int]  # data, fsdp, expert, tensor
    accumulation: int
    options: tuple[str, ...] = ()
    at: int = 0  # position: chips, experts or tokens

    def arguments(self) -> list[str]:
        """The arguments of finermoe aot."""
        axes = zip(("data", "fsdp", "expert", "tensor"), self.mesh, strict=True)
        return [
            f"--config=configs/{self.config}",
            f"--topology={self.topology}",
            *(f"--config.mesh.{axis}={size}" for axis, size in axes),
            f"--config.train.grad_accumulation={self.accumulation}",
            *self.options,
        ]


PAPER = 2048  # sequences of 8192 tokens a step


def slices() -> Iterator[Row]:
    """Slices with the paper's recipe, one sequence per device at a time."""
    yield Row("0.5B lean", "qwen0p5b.py:lean", "v5e:1x1", (1, 1, 1, 1), 1)
    yield Row("0.5B lean", "qwen0p5b.py:lean", "v5e:2x4", (1, 1, 8, 1), 1,
              ("--config.data.global_batch_size=64",))  # fmt: skip
    for name, config, topology, mesh in (
        ("0.5B", "qwen0p5b.py", "v5e:2x4", (1, 1, 8, 1)),
        ("1.5B", "qwen1p5b.py", "v5e:4x4", (1, 1, 16, 1)),
        ("1.5B", "qwen1p5b.py", "v5e:4x4", (1, 2, 8, 1)),
        ("7B", "qwen7b.py", "v5e:16x16", (2, 1, 128, 1)),
        ("7B", "qwen7b.py", "v5e:16x16", (2, 8, 16, 1)),
        ("7B", "qwen7b.py", "v5p:4x4x4", (1, 4, 16, 1)),
        ("7B", "qwen7b.py", "v6e:8x8", (1, 1, 64, 1)),
        ("7B", "qwen7b.py", "v6e:8x8", (1, 4, 16, 1)),
    ):
        devices = mesh[0] * mesh[1] * mesh[2]
        yield Row(name, config, topology, mesh, PAPER // devices)
    yield Row("7B, 2 slices", "qwen7b.py", "v6e:8x8", (2, 4, 16, 1), PAPER // 128,
              ("--num_slices=2",))  # fmt: skip


def gpu() -> Iterator[Row]:
    """One node of eight GPUs."""
    yield Row("1.5B", "qwen1p5b.py", "h100:8", (1, 1, 8, 1), PAPER // 8)


def sequences() -> Iterator[Row]:
    """Longer sequences and larger models, with the same tokens per step."""
    for name, config, topology, mesh, tokens in (
        ("0.5B lean", "qwen0p5b.py:lean", "v5e:1x1", (1, 1, 1, 1), 8192),
        ("0.5B lean", "qwen0p5b.py:lean", "v5e:1x1", (1, 1, 1, 1), 32768),
        ("1.5B", "qwen1p5b.py", "v5e:2x4", (1, 1, 8, 1), 8192),
        ("7B", "qwen7b.py", "v5e:4x4", (1, 1, 16, 1), 8192),
        ("7B", "qwen7b.py", "v5e:16x16", (2, 8, 16, 1), 32768),
        ("7B", "qwen7b.py", "v5p:4x4x4", (1, 4, 16, 1), 32768),
        ("7B", "qwen7b.py", "v6e:8x8", (1, 4, 16, 1), 32768),
    ):
        devices = mesh[0] * mesh[1] * mesh[2]
        batch = max(PAPER * 8192 // tokens, devices) if devices > 1 else 1
        options = (
            f"--config.data.sequence_length={tokens}",
            f"--config.data.global_batch_size={batch}",
        )
        yield Row(f"{name} at {tokens}", config, topology, mesh, batch // devices, options, tokens)


def chips() -> Iterator[Row]:
    """0.5B with two sequences per chip: experts over 8 chips, fsdp over the rest."""
    for topology, mesh in (
        ("v6e:2x4", (1, 1, 8, 1)),
        ("v6e:4x4", (1, 2, 8, 1)),
        ("v6e:4x8", (1, 4, 8, 1)),
        ("v6e:8x8", (1, 8, 8, 1)),
        ("v6e:8x16", (1, 16, 8, 1)),
        ("v6e:16x16", (2, 16, 8, 1)),
    ):
        devices = mesh[0] * mesh[1] * mesh[2]
        yield Row(f"0.5B on {devices}", "qwen0p5b.py", topology, mesh, 2,
                  (f"--config.data.global_batch_size={2 * devices}",), devices)  # fmt: skip


def experts() -> Iterator[Row]:
    """1.5B on 64 chips with 128 to 1024 experts (rows of the paper's Table 4)."""
    for inner, outer in ((32, 2), (64, 2), (64, 4), (64, 8)):
        count = inner * outer * 2
        options = (
            f"--config.moe.intermediate_granularity={inner}",
            f"--config.moe.output_granularity={outer}",
            "--config.data.global_batch_size=128",
        )
        yield Row(f"1.5B with {count}", "qwen1p5b.py", "v6e:8x8", (1, 8, 8, 1), 2, options,
                  count)  # fmt: skip


def traffic() -> Iterator[Row]:
    """HBM bytes of the experts: one chip with four layers, and full depth with experts sharded."""
    four = ("--config.dense.num_hidden_layers=4",)
    for size, topology in (
        ("0.5B", "v5e:1x1"), ("1.5B", "v5e:1x1"), ("7B", "v6e:1x1"), ("0.5B", "v6e:1x1"),
        ("1.5B", "v6e:1x1"),
    ):  # fmt: skip
        config = f"qwen{size.replace('.', 'p').lower()}.py:lean"
        yield Row(f"{size} lean, 4 layers", config, topology, (1, 1, 1, 1), 1, four)
    lean = "qwen0p5b.py:lean"
    wide = (*four, "--config.train.param_dtype=float32")
    yield Row("0.5B float32, 4 layers", lean, "v5e:1x1", (1, 1, 1, 1), 1, wide)
    for program in ("eval", "prefill", "decode"):
        yield Row(f"0.5B {program}", lean, "v5e:1x1", (1, 1, 1, 1), 1, (f"--program={program}",))
    for name, config, topology, mesh in (
        ("0.5B", "qwen0p5b.py", "v5e:2x4", (1, 1, 8, 1)),
        ("0.5B", "qwen0p5b.py", "v6e:2x4", (1, 1, 8, 1)),
        ("1.5B", "qwen1p5b.py", "v5e:4x4", (1, 1, 16, 1)),
        ("7B", "qwen7b.py", "v6e:8x8", (1, 1, 64, 1)),
        ("7B", "qwen7b.py", "v5e:16x16", (2, 1, 128, 1)),
    ):
        yield Row(name, config, topology, mesh, PAPER // (mesh[0] * mesh[1] * mesh[2]))
    # One microbatch per step; gradients have the dtype of the weights.
    for batch, sizes in ((8, (1, 1, 8, 1)), (8, (2, 1, 4, 1))):
        options = (
            f"--config.data.global_batch_size={batch}",
            "--config.train.param_dtype=bfloat16",
        )
        yield Row("0.5B bfloat16, 1 microbatch", "qwen0p5b.py", "v5e:2x4", sizes, 1, options)


TABLES = {
    "slices": slices,
    "traffic": traffic,
    "gpu": gpu,
    "sequences": sequences,
    "chips": chips,
    "experts": experts,
}


def figures(row: Row, results: Path, python: str) -> dict[str, Any]:
    """The figures of a row; compiles it unless `results` has them."""
    name = "_".join([row.name, row.topology, *map(str, row.mesh)])
    path = results / ("".join(c if c.isalnum() or c in "._-" else "-" for c in name) + ".json")
    if path.is_file() and (kept := json.loads(path.read_text()))["arguments"] == row.arguments():
        return kept
    partial = path.with_suffix(".partial")
    command = [python, "-m", "finermoe_jax", "aot", *row.arguments(), f"--output={partial}"]
    print("compiling", row.name, row.topology, file=sys.stderr, flush=True)
    began = time.perf_counter()
    child = os.posix_spawn(python, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, usage = os.wait4(child, 0)
    if os.waitstatus_to_exitcode(status) not in (0, 1) or not partial.is_file():
        return {"failed": True}
    found = json.loads(partial.read_text())
    found["arguments"] = row.arguments()
    found["revision"] = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    found["wall_seconds"] = time.perf_counter() - began
    found["host_bytes"] = usage.ru_maxrss * 1024
    partial.write_text(json.dumps(found))
    partial.rename(path)
    return found


SLICES = (
    "model", "slice", "data, fsdp, expert", "sequence", "state", "temporaries", "peak / limit, GiB",
    "TFLOP", "HBM, GB", "wire, GB", "at most tokens/s/device", "compiled in",
)  # fmt: skip
TRAFFIC = (
    "program", "slice", "data, fsdp, expert", "microbatches", "experts, GB", "the least, GB",
    "ratio", "copies in loops, GB", "all HBM, GB",
)  # fmt: skip


def table(
    columns: Sequence[str],
    rows: Sequence[Row],
    found: Sequence[dict[str, Any]],
    cells: Callable[[Row, dict[str, Any]], list[str]],
) -> str:
    """A Markdown table; `cells` returns the cells of a row after the first three."""
    lines = [columns, ["---"] * len(columns)]
    for row, f in zip(rows, found, strict=True):
        named = [row.name, row.topology, ", ".join(map(str, row.mesh[:3]))]
        lines.append([*named, *(cells(row, f) if "peak_bytes" in f else ["did not compile"])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def traffic_cells(row: Row, f: dict[str, Any]) -> list[str]:
    """Cells: HBM bytes of the experts' weights and gradients against the least possible."""
    moved, least = f["expert_bytes"] / 1e9, f["expert_bound_bytes"] / 1e9
    ratio, copied = f"{moved / least:.2f}", f"{f['expert_bytes_in_loops'] / 1e9:.2f}"
    sizes = [f"{moved:,.2f}", f"{least:,.2f}", ratio, copied, f"{f['hbm_bytes'] / 1e9:,.0f}"]
    return [str(row.accumulation), *sizes]


def slices_cells(row: Row, f: dict[str, Any]) -> list[str]:
    """Cells: memory, FLOPs and traffic of a step; memory alone if it does not fit."""
    tokens = next(
        (o.rpartition("=")[2] for o in row.options if "sequence_length" in o),
        "2048" if "lean" in row.config else "8192",
    )
    state = (f["parameter_bytes"] + f["optimizer_bytes"]) / GIB
    verdict = "" if f["fits"] else " **does not fit**"
    peak = f"{f['peak_bytes'] / GIB:.2f} / {f['limit_bytes'] / GIB:.2f}{verdict}"
    cells = ["", peak, "", "", "", ""]
    if "matmul_flops" in f:
        flops = f["matmul_flops"] + f["kernel_flops"] + f["attention_flops"]
        wire = sum(f["sent_bytes"].values()) / 1e9
        far = sum(f["crossing_bytes"].values()) / 1e9
        cells = [
            f"{f['temporary_bytes'] / GIB:.2f}",
            peak,
            f"{flops / 1e12:,.0f}",
            f"{f['hbm_bytes'] / 1e9:,.0f}",
            f"{wire:,.0f}" + (f" + {far:,.0f} between slices" if far else ""),
            f"{f['bounds']['overlapped']['tokens_per_second_per_device']:,.0f}",
        ]
    compiled = f"{f['compile_seconds']:.0f} s, {f.get('host_bytes', 0) / GIB:.1f} GiB"
    return [tokens, f"{state:.2f}", *cells, compiled]


def plot(name: str, rows: Sequence[Row], found: Sequence[dict[str, Any]], folder: Path) -> None:
    """Plots FLOPs, HBM bytes and wire bytes per device and token, over chips or experts."""
    rows, found = zip(
        *((row, f) for row, f in zip(rows, found, strict=True) if "sent_bytes" in f), strict=True
    )
    tokens = [f["tokens_per_step"] / f["devices"] for f in found]
    kinds = sorted({kind for f in found for kind in f["sent_bytes"]})
    panels: Panels = {
        FLOP: {
            "dense products": [f["matmul_flops"] / 1e9 for f in found],
            "expert kernels": [f["kernel_flops"] / 1e9 for f in found],
            "attention": [f["attention_flops"] / 1e9 for f in found],
        },
        HBM: {"": [f["hbm_bytes"] / 1e6 for f in found]},
        WIRE: {
            "all": [sum(f["sent_bytes"].values()) / 1e3 for f in found],
            **{kind: [f["sent_bytes"].get(kind, 0.0) / 1e3 for f in found] for kind in kinds},
        },
    }
    for series in panels.values():
        for values in series.values():
            values[:] = [value / t for value, t in zip(values, tokens, strict=True)]
    draw(name, [row.at for row in rows], panels, folder / f"scaling_{name}.png")


Panels = dict[str, dict[str, list[float]]]  # title → label → values
FLOP, HBM, WIRE = "GFLOP per token", "HBM traffic, MB per token", "sent between chips, kB per token"


@style.applied()
def draw(name: str, x: Sequence[int], panels: Panels, path: Path) -> None:
    """Draws panels of lines over chips or experts; omits lines below 1 % of a panel's highest."""
    picture = style.figure(7.5, 7)
    for axes, (title, series) in zip(
        picture.subplots(len(panels), 1, sharex=True), panels.items(), strict=True
    ):
        top = max(max(values) for values in series.values())
        kept = {label: values for label, values in series.items() if max(values) > 0.01 * top}
        colours = itertools.cycle(style.LINES)
        ends = {}
        for label, values in kept.items():
            kind = {"color": style.INK, "linestyle": "--"} if label == "all" else {
                "color": next(colours)}  # fmt: skip
            [line] = axes.plot(x, values, marker="o", **kind)
            ends[line] = label
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(v) for v in x])
        axes.set_xticks([], minor=True)
        axes.set_ylim(0, 1.08 * top)
        axes.set_title(title)
        if len(ends) > 1:
            style.label_ends(axes, ends)
    axes.set_xlabel(name)
    picture.savefig(path)


def main() -> None:
    """Compiles the rows and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="directory for the figures")
    parser.add_argument(
        "--only", default="slices,sequences,chips,experts", help="tables, separated by commas"
    )
    parser.add_argument(
        "--gpu_python", default="", help="an interpreter with compile-cuda, for the GPU row"
    )
    parser.add_argument("--plot", type=Path, help="directory for the plots")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    names = arguments.only.split(",") + (["gpu"] if arguments.gpu_python else [])
    for name in names:
        rows = list(TABLES[name]())
        python = arguments.gpu_python if name == "gpu" else sys.executable
        found = [figures(row, arguments.results.absolute(), python) for row in rows]
        revisions = ", ".join(sorted({f.get("revision", "") for f in found} - {""}))
        form = (TRAFFIC, traffic_cells) if name == "traffic" else (SLICES, slices_cells)
        made = table(form[0], rows, found, form[1])
        print(f"\n### {name} ({revisions})\n\n{made}", flush=True)
        if arguments.plot and name in ("chips", "experts"):
            plot(name, rows, found, arguments.plot)


if __name__ == "__main__":
    main()
