"""Compiles the fused expert kernels for TPUs and tabulates estimates. Needs no TPU and uses none.

    python benchmarks/tpu_kernels.py --compile    do they compile, for every chip, size and load
    python benchmarks/tpu_kernels.py --cycles     estimated cycles against the bound, v5e and v6e
    python benchmarks/tpu_kernels.py --bytes      HBM bytes of the kernels' transfers
    python benchmarks/tpu_kernels.py --unfused    cycles of three grouped products
    python benchmarks/tpu_kernels.py --ragged-dot HBM bytes of XLA's lax.ragged_dot
    python benchmarks/tpu_kernels.py --gather     cycles of fetching rows in the kernel
    python benchmarks/tpu_kernels.py --layers     temporaries of a whole layer

Needs the extra `compile-tpu` (libtpu). Tables go to stdout as Markdown, progress to stderr.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import sys
from collections import Counter
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from benchmarks import tpu_compiler
from benchmarks.tpu_compiler import PEAKS, TOPOLOGIES

SIZES = {"0.5B": (896, 152), "1.5B": (1536, 280), "7B": (3584, 592)}  # D, F; W is D / 2
EXPERTS = 128
LOADS = (16, 128, 512, 2048)  # rows per expert
KINDS = ("forward", "backward")


class Formula:
    """Replaces a prefetched array, which the simulator reads as zeros, by a formula."""

    def __init__(self, value: Any):
        self.value = value

    def __getitem__(self, index: Any) -> Any:
        return self.value(index)


def closed_form(load: int, experts: int, span: int, offset: int = 0) -> tuple[Any, int]:
    """The visits of experts with `load` rows each, if the first begins at row `offset`.

    All experts must need the same number of visits.
    """
    import jax.numpy as jnp

    from pallas_kernels.spans import LANES, ROWS, Spans

    starts = [i * load + offset for i in range(experts)]
    counts = {-(-(start % ROWS + load) // span) for start in starts}
    assert len(counts) == 1, f"experts of {load} rows need {counts} visits"
    count = counts.pop()
    rows = -(-(starts[-1] + load) // LANES) * LANES

    def expert(i: Any) -> Any:
        return i if count == 1 else i // count

    def first(i: Any) -> Any:
        e = expert(i)
        return ((e * load + offset) & -ROWS) + (i - e * count) * span

    def start(i: Any) -> Any:
        own = expert(i) * load + offset
        return own if count == 1 else jnp.maximum(own, first(i))

    def stop(i: Any) -> Any:
        own = (expert(i) + 1) * load + offset
        return own if count == 1 else jnp.minimum(own, first(i) + span)

    constants = [Formula(lambda i: experts * count), Formula(lambda i: 0)]
    return Spans(*map(Formula, (expert, expert, first, start, stop)), *constants), rows


def simulated_f(chip: str, kind: str, f: int) -> int:
    """F of the simulated kernel: some dumps fail for half a bfloat16 tile of rows."""
    fails = kind == "backward" and (chip == "v5e" or f == SIZES["1.5B"][1])
    return -(-f // 16) * 16 if fails else f


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles the fused kernel of a job."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.expert_ffn import expert_ffn, mosaic_tpu

    d, f, load, experts = job["d"], job["f"], job["load"], job["experts"]
    w, dtype = d // 2, jnp.dtype(job.get("dtype", "bfloat16"))
    stored = jnp.dtype(job.get("stored", dtype.name))

    def shaped(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    with tpu_compiler.chip(job["chip"]) as sharding:
        rows = load * experts
        x, dy = shaped(rows, d), shaped(rows, w)
        gate_up = shaped(experts, 2 * f, d, dtype=stored)
        down = shaped(experts, f, w, dtype=stored)
        into = [shaped(1, *a.shape, dtype=stored) for a in (gate_up, down)]
        into = into if job["kind"] == "backward" else []
        if not job["cycles"]:
            sizes, weight = shaped(experts, dtype=jnp.int32), shaped(rows, dtype=jnp.float32)

            def forward(x: Any, gate_up: Any, down: Any, weight: Any, sizes: Any) -> Any:
                return expert_ffn(x, gate_up, down, sizes, weight, "tpu")

            def backward(dy: Any, sizes: Any, *arrays: Any) -> Any:
                return jax.vjp(lambda x, *a: forward(x, *a, sizes=sizes), *arrays)[1](dy)

            if job["kind"] == "forward":
                function, arguments = forward, [x, gate_up, down, weight, sizes]
            else:
                function, arguments = backward, [dy, sizes, x, gate_up, down, weight]
            call = mosaic_tpu.plan_call(job["kind"], x, gate_up, down, into=into)
            compiled = tpu_compiler.compile_for(function, arguments, sharding)
            memory = compiled.memory_analysis()
            return {
                "temporaries": memory.temp_size_in_bytes,
                "fused": call is not None,
                "tiles": call and [call.tiles.rows, call.tiles.step, call.tiles.buffers],
                "vmem": call and call.vmem_bytes(),
            }
        call = mosaic_tpu.plan_call(job["kind"], x, gate_up, down, into=into)
        if call is None:
            return {"error": "does not fit"}
        import dataclasses

        from pallas_kernels.spans import lane_length

        tiles = mosaic_tpu.Tiles(*job["tiles"]) if job.get("tiles") else call.tiles
        plan, rows = closed_form(load, experts, tiles.rows, job.get("offset", 0))
        call = dataclasses.replace(call, m=rows, tiles=tiles)
        x, dy = shaped(rows, d), shaped(rows, w)
        weight = shaped(1, lane_length(rows, tiles.rows), dtype=jnp.float32)
        arguments = [x, *([dy] if job["kind"] == "backward" else []), weight, gate_up, down]
        arguments += into
        run = mosaic_tpu.pallas_call(call, plan, name="twin")
        tpu_compiler.compile_for(lambda *a: run(*a), arguments, sharding, row_major=True)
        return {"tiles": dataclasses.astuple(tiles), "at_once": tiles.at_once}


def unfused_work(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles one product of the unfused route: gate and up in one, gate alone, or down."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import mosaic_tpu

    d, f, load, experts = job["d"], job["f"], job["load"], job["experts"]
    k, n, transposed = {
        "gate and up": (d, 2 * f, True),
        "gate": (d, f, True),
        "down": (-(-f // 128) * 128 if job["chip"] == "v5e" else f, d // 2, False),
    }[job["kind"]]
    with tpu_compiler.chip(job["chip"]) as sharding:
        rows = jax.ShapeDtypeStruct((load * experts, k), jnp.bfloat16)
        shape = (experts, n, k) if transposed else (experts, k, n)
        weights, sizes = (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((experts,), jnp.int32),
        )

        def product(rows: Any, weights: Any, sizes: Any) -> Any:
            return mosaic_tpu.grouped_matmul(
                rows, weights, sizes, transpose_weights=transposed, interpret=False, share=load
            )

        tpu_compiler.compile_for(product, [rows, weights, sizes], sharding, row_major=True)
    return {}


def unfused() -> None:
    """Compares the fused kernel with three tuned grouped products and their activation."""
    print("| chip | size | rows per expert | fused | gate, up, down, activation | ratio | "
          "gate and up in one | ratio |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    every_job = jobs_of(PEAKS, (128, 512), experts=32, cycles=True)
    jobs = [job for job in every_job if job["kind"] == "forward"]
    parts = ["forward", "gate", "gate and up", "down"]
    every = [
        job | {"kind": kind} | ({} if kind == "forward" else {"worker": "unfused"})
        for job in jobs
        for kind in parts
    ]
    results = iter(run_jobs(every))
    for job in jobs:
        taken = {}
        for kind in parts:
            result = next(results)
            if (
                len(cycles := [c for name, c in result["cycles"].items() if "copy" not in name])
                != 1
            ):
                raise SystemExit(f"{job} {kind}: {result}")
            taken[kind] = cycles[0] / job["experts"]
        peak = PEAKS[job["chip"]]
        active = peak.bound(0, 2 * 3 * job["f"] * job["load"])
        three = 2 * taken["gate"] + taken["down"] + active
        two = taken["gate and up"] + taken["down"] + active
        fused = taken["forward"]
        print(f"| {job['chip']} | {job['size']} | {job['load']} | {fused:,.0f} | {three:,.0f} | "
              f"{fused / three:.2f} | {two:,.0f} | {fused / two:.2f} |")  # fmt: skip


def ragged_dot_work(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles the route through lax.ragged_dot, with XLA's kernel for it switched on."""
    import jax
    import jax.numpy as jnp

    d, f, experts = job["d"], job["f"], job["experts"]
    rows = job["load"] * experts

    def route(x: Any, gate_up: Any, down: Any, sizes: Any, weights: Any) -> Any:
        h = jax.lax.ragged_dot(x, gate_up.swapaxes(1, 2), sizes)
        active = jax.nn.silu(h[:, :f]) * h[:, f:] * weights[:, None]
        return jax.lax.ragged_dot(active, down, sizes)

    shapes = ((rows, d), (experts, 2 * f, d), (experts, f, d // 2), (experts,), (rows,))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    arguments[3] = jax.ShapeDtypeStruct((experts,), jnp.int32)
    with tpu_compiler.chip(job["chip"]) as sharding:
        compiled = tpu_compiler.compile_for(
            route, arguments, sharding, row_major=True,
            options={"xla_tpu_enable_ragged_dot_kernel": True},
        )  # fmt: skip
    return {"moved": compiled.cost_analysis()["bytes accessed"]}


def ragged_dot() -> None:
    """Compares XLA's count of HBM bytes for lax.ragged_dot with the bound."""
    print("| chip | size | rows per expert | lax.ragged_dot, MB | bound, MB | ratio |")
    print("|---|---|---|---|---|---|")
    jobs = [
        job | {"worker": "ragged_dot"}
        for job in jobs_of(PEAKS, (128, 512))
        if job["kind"] == "forward"
    ]
    for job, result in zip(jobs, run_jobs(jobs), strict=True):
        _, least = flops_and_bytes("forward", job["d"], job["f"], job["load"])
        moved, least = result["moved"] / 1e6, least * EXPERTS / 1e6
        print(f"| {job['chip']} | {job['size']} | {job['load']} | {moved:,.0f} | {least:,.0f} | "
              f"{moved / least:.2f} |")  # fmt: skip


def gather_work(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles a kernel that fetches 128 rows one by one, bfloat16 rows as 32-bit words."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    tile, tiles, words = 128, job["experts"], job["d"] // 2

    def kernel(index: Any, x: Any, out: Any, rows: Any, semaphore: Any) -> None:
        first = pl.program_id(0) * tile

        def fetch(r: Any, _: None) -> None:
            row = pl.ds(index[first + r], 1)
            pltpu.make_async_copy(x.at[row], rows.at[pl.ds(r, 1)], semaphore).start()

        jax.lax.fori_loop(0, tile, fetch, None)
        pltpu.make_async_copy(x.at[pl.ds(0, tile)], rows, semaphore).wait()
        out[...] = rows[...]

    with tpu_compiler.chip(job["chip"]) as sharding:
        run = pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((tiles * tile, words), jnp.uint32),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(tiles,),
                in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
                out_specs=pl.BlockSpec((tile, words), lambda i, _: (i, 0)),
                scratch_shapes=[pltpu.VMEM((tile, words), jnp.uint32), pltpu.SemaphoreType.DMA],
            ),
            name="gather",
        )
        index = jax.ShapeDtypeStruct((tiles * tile,), jnp.int32)
        x = jax.ShapeDtypeStruct((tiles * tile, words), jnp.uint32)
        tpu_compiler.compile_for(run, [index, x], sharding, row_major=True)
    return {}


def gather() -> None:
    """Compares the cycles of fetching 128 rows in the kernel with those of XLA's gather."""
    print(
        "| chip | size | fetching 128 rows | XLA's gather of them, HBM bound |\n|---|---|---|---|"
    )
    jobs = [
        job | {"worker": "gather"}
        for job in jobs_of(PEAKS, (128,), experts=16, cycles=True)
        if job["kind"] == "forward"
    ]
    for job, result in zip(jobs, run_jobs(jobs), strict=True):
        fetched = result["cycles"]["gather"] / job["experts"]
        saved = PEAKS[job["chip"]].bound(0, 2 * 128 * 2 * job["d"])  # written, and read again
        print(f"| {job['chip']} | {job['size']} | {fetched:,.0f} | {saved:,.0f} |")


def flops_and_bytes(kind: str, d: int, f: int, load: int) -> tuple[int, int]:
    """FLOPs of one expert, recomputation included, and its bytes if everything moves once."""
    w = d // 2
    gate_up, down = 4 * load * d * f, 2 * load * f * w
    weights = 2 * (2 * f * d + f * w)
    if kind == "forward":
        return gate_up + down, weights + 2 * load * (d + w)
    return 3 * gate_up + 2 * down, 2 * weights + 2 * load * (2 * d + w)


def run_jobs(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs each job in its own process, --workers at a time."""
    from tqdm import tqdm

    with concurrent.futures.ThreadPoolExecutor(ARGS.workers) as pool:
        results = pool.map(lambda job: tpu_compiler.estimate(__file__, job), jobs)
        return list(tqdm(results, total=len(jobs), unit="kernel"))


def jobs_of(chips: Any, loads: Any = LOADS, **extra: Any) -> list[dict[str, Any]]:
    """Jobs for the sizes, all directions, and the loads of the chips."""
    return [
        dict(chip=chip, size=size, d=SIZES[size][0], f=SIZES[size][1], kind=kind, load=load)
        | {"experts": EXPERTS, "cycles": False}
        | extra
        for chip, size, kind, load in itertools.product(chips, ARGS.sizes, KINDS, loads)
    ]


def compile_all() -> None:
    """Compiles expert_ffn for every chip, size, direction and load."""
    stored = [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]
    print("| chip | size | direction | rows, weights | rows per expert | tile, step, buffers |")
    print("|---|---|---|---|---|---|")
    failed = 0
    for dtype, weights in stored[: 1 if ARGS.quick else 3]:
        loads = (128,) if ARGS.quick else LOADS if dtype == weights == "bfloat16" else (512,)
        jobs = jobs_of(TOPOLOGIES, loads, dtype=dtype, stored=weights)
        for job, result in zip(jobs, run_jobs(jobs), strict=True):
            failed += "error" in result
            outcome = result.get("error") or result["tiles"] or "unfused"
            print(f"| {job['chip']} | {job['size']} | {job['kind']} | {dtype}, {weights} | "
                  f"{job['load']} | {outcome} |")  # fmt: skip
    if failed:
        raise SystemExit(f"{failed} kernels do not compile")


def drawn(load: int, span: int, draws: int = 100) -> Counter[int]:
    """Counts the visits by their number of rows, for randomly drawn groups of `load` rows."""
    import numpy as np

    from pallas_kernels.spans import ROWS

    rng, visits = np.random.default_rng(0), Counter()
    for _ in range(draws):
        sizes = rng.multinomial(load * EXPERTS, np.full(EXPERTS, 1 / EXPERTS))
        counts = (np.cumsum(sizes) - sizes) % ROWS + sizes
        visits.update(np.repeat(span, (counts // span).sum()).tolist())
        visits.update((counts % span)[counts % span > 0].tolist())
    return visits


def per_expert(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each result "mean", the cycles of an expert apart from the kernel's start and end."""
    twice = [job | {"experts": experts} for job in jobs for experts in (4, 8)]
    results = iter(run_jobs(twice))
    pairs = [(next(results), next(results)) for _ in jobs]
    for few, many in pairs:
        if not {"error"} & {*few, *many}:
            many["mean"] = (many["cycles"]["twin"] - few["cycles"]["twin"]) / 4
    return [many for _, many in pairs]


def ragged(jobs: list[dict[str, Any]], results: list[dict[str, Any]]) -> list[float | None]:
    """Estimates the mean cycles of an expert whose group begins anywhere, for each of the jobs.

    The cycles of a visit depend on the rows that it computes at once (`at_once`). One twin is
    compiled for each such number, and summed over the visits of 100 random draws.
    """
    counted = [
        result["at_once"] if job["load"] in (128, 512) and "mean" in result else []
        for job, result in zip(jobs, results, strict=True)
    ]
    # Groups begin at rows 4 and 0 of a tile in turn, and end 8 or 12 rows before the size.
    kinds = [
        job | {"load": size - 12, "offset": 4, "tiles": result["tiles"]}
        for job, result, sizes in zip(jobs, results, counted, strict=True)
        for size in sizes
    ]
    costs = iter(per_expert(kinds))
    means: list[float | None] = []
    for job, sizes in zip(jobs, counted, strict=True):
        of_size = {size: next(costs)["mean"] for size in sizes}
        visits = drawn(job["load"], sizes[-1]) if sizes else Counter()
        total = sum(
            count * of_size[min(size for size in sizes if size >= rows)]
            for rows, count in visits.items()
        )
        means.append(total / (100 * EXPERTS) if sizes else None)
    return means


def cycles() -> None:
    """Compares estimated cycles with the bound."""
    print("| chip | size | direction | rows per expert | span | MXU bound | HBM bound | aligned | "
          "of the bound | anywhere | of the bound | of aligned |\n"
          + "|---" * 12 + "|")  # fmt: skip
    jobs = jobs_of(ARGS.chips, ARGS.loads, cycles=True)
    for job in jobs:
        job["f"] = simulated_f(job["chip"], job["kind"], job["f"])
    results = per_expert(jobs)
    for job, result, mean in zip(jobs, results, ragged(jobs, results), strict=True):
        peak, (d, f) = PEAKS[job["chip"]], SIZES[job["size"]]
        flops, moved = flops_and_bytes(job["kind"], d, f, job["load"])
        head = f"| {job['chip']} | {job['size']} | {job['kind']} | {job['load']} | "
        if "mean" not in result:
            print(f"{head}{result.get('error', result)} |")
            continue
        got, bound = result["mean"], peak.bound(flops, moved)
        anywhere = f"{mean:,.0f} | {bound / mean:.0%} | {got / mean:.2f}" if mean else " | | "
        print(
            f"{head}{result['tiles'][0]} | {peak.bound(flops, 0):,.0f} | "
            f"{peak.bound(0, moved):,.0f} | {got:,.0f} | {bound / got:.0%} | {anywhere} |"
        )


def transfers() -> None:
    """Compares the bytes that the kernels move with the least possible."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    skewed = rng.dirichlet(np.full(EXPERTS, 0.3))
    shares = {"equal": None, "drawn evenly": np.full(EXPERTS, 1 / EXPERTS), "skewed": skewed}
    print(f"| size | rows per expert | direction | {' | '.join(shares)} |")
    print("|---|---|---|" + "---|" * len(shares))
    bf16 = jnp.dtype("bfloat16")
    for size, load, kind in itertools.product(SIZES, ARGS.loads, KINDS):
        d, f = SIZES[size]
        ratios = []
        for share in shares.values():
            m = load * EXPERTS
            sizes = np.full(EXPERTS, load) if share is None else rng.multinomial(m, share)
            per_expert, empty = (flops_and_bytes(kind, d, f, rows)[1] for rows in (1, 0))
            least = m * (per_expert - empty) + empty * np.count_nonzero(sizes)
            if kind == "backward":  # idle experts write a gradient and read no weights
                least += empty // 2 * np.count_nonzero(sizes == 0)
            ratios.append(f"{bytes_moved(kind, d, f, bf16, sizes) / least:.3f}")
        print(f"| {size} | {load} | {kind} | {' | '.join(ratios)} |")


def bytes_moved(kind: str, d: int, f: int, dtype: Any, sizes: Any) -> int:
    """HBM bytes that a kernel moves on v5e: its blocks of weights, and its spans of rows."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.expert_ffn import mosaic_tpu, tiles_tpu
    from pallas_kernels.spans import LANES, ROWS, spans

    m, w = int(sizes.sum()), d // 2
    tiles = mosaic_tpu.Tiles(*next(tiles_tpu.choices("v5e", kind, m // EXPERTS)))
    gradients = (dtype, dtype) if kind == "backward" else ()
    call = mosaic_tpu.Call(kind, m, d, EXPERTS, f, w, dtype, dtype, dtype, tiles, gradients)
    plan = spans(jnp.asarray(sizes, jnp.int32), m, tiles.rows, kind == "backward")
    plan = jax.tree.map(np.asarray, plan)
    visits, moved = range(int(plan.used[0])), 0
    for spec in itertools.chain(*mosaic_tpu.block_specs(call, None)):
        if spec.index_map is None:  # rows, or a stack that is written but not read
            continue
        visited = [spec.index_map(i, *plan) for i in visits]
        loads = sum(a != b for a, b in itertools.pairwise([None, *visited]))
        moved += loads * int(np.prod([axis for axis in spec.block_shape if axis])) * 2
    busy = (plan.stop > plan.start)[: len(visits)]
    rows = -(-plan.stop // ROWS) * ROWS - plan.first
    wide, narrow = (d + w, 1) if kind == "forward" else (2 * d + w, 2)
    lanes = narrow * (tiles.rows + LANES) * 4
    return moved + int((rows[: len(visits)] * wide * 2 + lanes)[busy].sum())


def layers() -> None:
    """Counts the temporaries of a layer, forward and backward, and copies of expert weights."""
    print("| chip | size | tokens | experts' weights, MB | temporaries, MB | weight copies |")
    print("|---|---|---|---|---|---|")
    jobs = [job for job in jobs_of(PEAKS, (128,), worker="layer") if job["kind"] == "forward"]
    for job, result in zip(jobs, run_jobs(jobs), strict=True):
        if "error" in result:
            raise SystemExit(result["error"])
        print(f"| {job['chip']} | {job['size']} | {result['tokens']} | "
              f"{result['weights'] / 1e6:.0f} | {result['temporaries'] / 1e6:.0f} | "
              f"{result['copies']} |")  # fmt: skip


def layer_work(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles one FineRMoE layer and its gradient with bfloat16 weights, outside any scan."""
    import re

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from finermoe_jax.config.model import MoEConfig
    from finermoe_jax.config.presets import QWEN2P5
    from finermoe_jax.layers import sharding
    from finermoe_jax.moe.layer import FineRMoE
    from finermoe_jax.weights.upcycle import upcycled_config

    config = upcycled_config(QWEN2P5[job["size"]], MoEConfig())
    build = lambda: nnx.split(FineRMoE(config, jnp.bfloat16, nnx.Rngs(0)))  # noqa: E731
    graphdef, state = nnx.eval_shape(build)
    tokens = job["load"] * config.moe.num_experts // config.moe.num_active
    x = jax.ShapeDtypeStruct((1, tokens, config.hidden_size), jnp.bfloat16)

    def both(state: Any, x: Any, dy: Any) -> Any:
        def forward(state: Any, x: Any) -> Any:
            return nnx.merge(graphdef, state)(x, jnp.ones(x.shape[:2], bool))[0]

        y, pull = jax.vjp(forward, state, x)
        return y, pull(dy)

    with tpu_compiler.chip(job["chip"]) as placed:
        everywhere = jax.tree.map(lambda _: placed, state)
        formats = sharding.row_major(state, everywhere, nnx.merge(graphdef, state))
        shaped = jax.tree.map(
            lambda a, f: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=f), state, formats
        )
        x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)
        jitted = jax.jit(both, out_shardings=(None, (formats, None)))
        compiled = jitted.trace(shaped, x, x).lower(lowering_platforms=("tpu",)).compile()
    experts = config.moe.num_experts
    f, d, w = config.expert_intermediate_size, config.hidden_size, config.expert_output_size
    # Operations that output an array of the shape of all gate_up or down weights. Arguments and
    # kernel results are not copies.
    made = re.findall(
        rf"= \w+\[(?:\d+,)?{experts},(?:{2 * f},{d}|{f},{w})\]\S* ([\w-]+)\(", compiled.as_text()
    )
    harmless = ("parameter", "get-tuple-element", "custom-call", "bitcast", "tuple")
    copies = [what for what in made if what not in harmless]
    return {
        "tokens": tokens,
        "weights": 2 * experts * f * (2 * d + w),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "copies": len(copies),
    }


MODES = {
    "compile": compile_all,
    "cycles": cycles,
    "bytes": transfers,
    "layers": layers,
    "unfused": unfused,
    "ragged_dot": ragged_dot,
    "gather": gather,
}
WORKERS = {
    "layer": layer_work,
    "unfused": unfused_work,
    "ragged_dot": ragged_dot_work,
    "gather": gather_work,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for mode in MODES:
        parser.add_argument("--" + mode.replace("_", "-"), action="store_true")
    parser.add_argument(
        "--quick", action="store_true", help="with --compile: only 128 rows per expert and bfloat16"
    )
    parser.add_argument("--chips", nargs="+", default=list(PEAKS), help="of --cycles")
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of --cycles, --compile"
    )
    parser.add_argument(
        "--loads", nargs="+", type=int, default=LOADS, help="rows per expert of --cycles, --bytes"
    )
    parser.add_argument("--workers", type=int, default=2, help="parallel compilations")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    ARGS = parser.parse_args()
    if ARGS.job:
        print(json.dumps(WORKERS.get(ARGS.job.get("worker"), work)(ARGS.job)))
    for mode, run in MODES.items():
        if getattr(ARGS, mode):
            run()
