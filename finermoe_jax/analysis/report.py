"""Formats the results of analysis/aot.py: memory, costs, roofline and verdict."""

from typing import Any

from finermoe_jax.analysis.causes import PHASES
from finermoe_jax.analysis.hlo_costs import Costs
from finermoe_jax.analysis.programs import Program
from finermoe_jax.analysis.topology import HOST_BYTES_PER_SECOND, Target

_GIB = 2**30
_LISTED = 20  # instructions of bytes_by_cause


def gib(size: float | int) -> str:
    """Formats bytes as GiB."""
    return f"{size / _GIB:9.3f} GiB"


def heading(program: Program, target: Target) -> str:
    """Describes the program to compile."""
    data, train = program.config.data, program.config.train
    where = f"{target.name}, {len(target.devices)} devices"
    if target.slices > 1:
        where += f" in {target.slices} slices"
    what = {
        "train": f"{program.rows} sequences of {data.sequence_length} tokens a step, in "
        f"{train.grad_accumulation} microbatches · {program.config.optimizer.name}, weights "
        f"{train.param_dtype}, remat {train.remat}",
        "eval": f"held-out loss of {program.rows} sequences of {data.sequence_length} tokens",
        "prefill": f"a prompt of {data.sequence_length} tokens",
        "decode": f"one token after {data.sequence_length} others",
    }[program.name]
    return "\n".join([f"{where} · mesh {dict(program.mesh.shape)}", what, *program.notes])


def bytes_by_cause(figures: dict[str, Any]) -> str:
    """Formats HBM bytes by cause and pass, and the instructions that move the most."""
    moved: dict[str, dict[str, float]] = {}
    for key, size in figures["bytes_by"].items():
        name, _, phase = key.rpartition(": ")
        moved.setdefault(name, {})[phase] = size
    total = {phase: sum(each.get(phase, 0.0) for each in moved.values()) for phase in PHASES}
    lines = [
        "",
        "HBM bytes by cause, GB per device and step, compiler estimates",
        f"{'':<28}{'':>10}" + "".join(f"{phase:>11}" for phase in PHASES) + f"{'share':>8}",
    ]
    for name, by in [*sorted(moved.items(), key=lambda item: -sum(item[1].values())),
                     ("total", total)]:  # fmt: skip
        every = sum(by.values())
        lines.append(
            f"{name:<28}{every / 1e9:>10.3f}"
            + "".join(f"{by.get(phase, 0.0) / 1e9:>11.3f}" for phase in PHASES)
            + f"{every / figures['hbm_bytes']:>8.1%}"
        )
    lines += ["", "instructions that move the most, GB per device and step"]
    largest = list(figures["movers"].items())[:_LISTED]
    return "\n".join([*lines, *(f"{size / 1e9:>10.3f}  {line}" for line, size in largest)])


def roofline(costs: Costs, target: Target, tokens: int, flops_per_token: float) -> dict[str, Any]:
    """Returns lower bounds of a step's time, and the resulting throughput and MFU.

    `overlapped`: only the slowest resource counts; `serial`: compute or HBM, then every transfer.
    """
    chip, devices = target.chip, len(target.devices)
    seconds = {
        "compute": costs.flops / chip.flops,
        "hbm": costs.hbm_bytes / chip.bandwidth,
        "wire": sum(costs.sent_bytes.values()) / chip.wire,
        "outside": sum(costs.crossing_bytes.values()) / target.outside,
    }
    bounds = {
        "overlapped": max(seconds.values()),
        "serial": max(seconds["compute"], seconds["hbm"]) + seconds["wire"] + seconds["outside"],
    }
    needed = flops_per_token * tokens / devices / chip.flops
    return {
        "seconds": seconds,
        "model_flops_per_token": flops_per_token,
        "bounds": {
            name: {
                "seconds": time,
                "tokens_per_second_per_device": tokens / devices / time,
                "mfu": needed / time,
            }
            for name, time in bounds.items()
        },
    }


def text(figures: dict[str, Any], target: Target) -> str:
    """Formats all figures of one compilation."""
    lines = ["", "compiler estimates per device, nothing measured", *_memory(figures)]
    if "matmul_flops" in figures:
        lines += _costs(figures) + _times(figures, target)
    limit, peak = figures["limit_bytes"], figures["peak_bytes"]
    least = "" if "argument_bytes" in figures else "at least "
    verdict = (
        f"FITS: {gib(peak).strip()} of {gib(limit).strip()}, {gib(limit - peak).strip()} to spare"
        if figures["fits"]
        else f"DOES NOT FIT: {least}{gib(peak).strip()} for {gib(limit).strip()}, "
        f"{least}{gib(peak - limit).strip()} too much"
    )
    return "\n".join([*lines, "", verdict])


def _memory(figures: dict[str, Any]) -> list[str]:
    state = figures["parameter_bytes"] + figures["optimizer_bytes"]
    lines = [
        "",
        f"parameters                {gib(figures['parameter_bytes'])}",
        f"optimizer state           {gib(figures['optimizer_bytes'])}",
        f"both, from shapes         {gib(state)}",
    ]
    if figures.get("host_bytes"):
        lines.append(f"experts in host memory    {gib(figures['host_bytes'])}   not in the peak")
    if "argument_bytes" in figures:
        lines += [
            f"arguments, compiler's     {gib(figures['argument_bytes'])}   including the batch and "
            f"tile padding: {figures['argument_bytes'] / state - 1:+.2%}",
            f"temporaries               {gib(figures['temporary_bytes'])}   gradients (at most "
            f"{gib(figures['gradient_bytes']).strip()}), activations, buffers",
            f"generated code            {gib(figures['code_bytes'])}",
        ]
    least = "" if "argument_bytes" in figures else "at least, "
    lines += [
        f"peak                      {gib(figures['peak_bytes'])}   {least}compiled in "
        f"{figures['compile_seconds']:.0f} s",
        f"limit                     {gib(figures['limit_bytes'])}   {figures['limit_note']}",
    ]
    if figures.get("largest"):
        lines += ["largest allocations:", *(f"  {line}" for line in figures["largest"])]
    return lines


def _costs(figures: dict[str, Any]) -> list[str]:
    newton_schulz = []
    if flops := figures.get("newton_schulz_flops"):
        text = (
            f"  Newton-Schulz (Muon)    {flops / 1e12:12.3f} T   over all devices, from a formula; "
        )
        newton_schulz = [text + "not in MFU"]
    lines = [
        "",
        f"FLOPs of products         {figures['matmul_flops'] / 1e12:12.3f} T   per step",
        *newton_schulz,
        f"FLOPs of kernels          {figures['kernel_flops'] / 1e12:12.3f} T   from their "
        "CostEstimate",
        f"FLOPs of attention        {figures['attention_flops'] / 1e12:12.3f} T   from a formula",
        f"HBM bytes                 {figures['hbm_bytes'] / 1e9:12.3f} GB",
    ]
    if "expert_bytes" in figures:
        bound = figures["expert_bound_bytes"]
        lines.append(
            f"  of the experts          {figures['expert_bytes'] / 1e9:12.3f} GB   "
            f"{figures['expert_bytes'] / bound:.2f} x the minimum; without the update"
        )
    if "host_moved_bytes" in figures:
        covered = figures["host_covered_bytes"] / figures["hbm_bytes"]
        lines.append(
            f"from host memory          {figures['host_moved_bytes'] / 1e9:12.3f} GB   in "
            f"{figures['host_transfers']:.0f} transfers; {covered:.0%} of the HBM bytes are "
            "scheduled while one is in flight. Their time is in no bound below"
        )
    for kind in sorted(figures["sent_bytes"].keys() | figures["crossing_bytes"].keys()):
        near, far = (figures[k].get(kind, 0.0) / 1e9 for k in ("sent_bytes", "crossing_bytes"))
        between = f"   and {far:.3f} GB to other slices" if figures["slices"] > 1 else ""
        lines.append(f"sent, {kind:<20}{near:12.3f} GB{between}")
    total = sum(figures["sent_bytes"].values()) / 1e9
    lines.append(f"{'sent, all':<26}{total:12.3f} GB")
    return lines + [f"  {note}" for note in figures["counting_notes"]]


def _times(figures: dict[str, Any], target: Target) -> list[str]:
    chip, seconds = target.chip, figures["seconds"]
    lines = [
        "",
        "roofline of a step, from compiler estimates and published peaks (never reached)",
        f"  compute  {seconds['compute'] * 1e3:12.2f} ms at {chip.flops / 1e12:.1f} TFLOP/s, "
        "assuming all products in bfloat16",
        f"  HBM      {seconds['hbm'] * 1e3:12.2f} ms at {chip.bandwidth / 1e9:.0f} GB/s",
        f"  wire     {seconds['wire'] * 1e3:12.2f} ms at {chip.wire / 1e9:.0f} GB/s, assuming all "
        "links of the device are busy",
    ]
    if figures["slices"] > 1:
        lines.append(
            f"  outside  {seconds['outside'] * 1e3:12.2f} ms at {target.outside / 1e9:.2f} GB/s "
            f"per device, assuming {HOST_BYTES_PER_SECOND / 1e9:.0f} GB/s per host (not published)"
        )
    for name, meaning in (
        ("overlapped", "everything overlapped"),
        ("serial", "no transfer overlapped"),
    ):
        bound = figures["bounds"][name]
        lines.append(
            f"  {meaning}: at least {bound['seconds'] * 1e3:.2f} ms, at most "
            f"{bound['tokens_per_second_per_device']:,.0f} tokens/s/device, MFU at most "
            f"{bound['mfu']:.1%}"
        )
    lines.append(
        f"  MFU counts {figures['model_flops_per_token'] / 1e9:.3f} GFLOP per token, as in "
        "training: causal scores, no recomputation"
    )
    return lines
