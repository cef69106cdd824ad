"""Compiles a run's programs for absent hardware and checks that they fit.

    finermoe aot --config=configs/qwen7b.py --topology=v5e:16x16 [--num_slices=2] [--suggest]
        [--program=train|eval|prefill|decode] [--bytes] [--output=FILE.json] [--hlo=FILE]
        [--config.mesh.fsdp=… and other overrides]

Needs the extra compile-tpu (TPUs) or compile-cuda (h100:8), but no accelerator, weights or text.
Every figure is a compiler estimate, not a measurement.

Exit code 0: it compiles and fits. 1: it does not fit. 2: invalid input.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from finermoe_jax.analysis import report
from finermoe_jax.analysis.expert_traffic import expert_traffic, expert_weights
from finermoe_jax.analysis.hlo_costs import analyse, host_overlap
from finermoe_jax.analysis.programs import Program
from finermoe_jax.analysis.topology import Target
from finermoe_jax.config.flops import forward_flops, newton_schulz_flops, training_flops
from finermoe_jax.errors import InputError
from finermoe_jax.layers import sharding
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.moe.bank import Places
from finermoe_jax.runtime import files


def compile_program(
    program: Program, target: Target, say: Callable[[str], None] = print, hlo: Path | None = None
) -> dict[str, Any]:
    """Compiles a program and returns all figures (report.text formats them).

    Args:
      program: from programs.abstract_program.
      target: from topology.describe.
      say: prints a message.
      hlo: file for the compiled program's text, if given.

    Raises InputError if the program does not compile for another reason than memory, or cuDNN is
    missing.
    """
    began = time.perf_counter()
    figures: dict[str, Any] = {
        "what": "compiler estimates, nothing measured",
        "topology": target.name,
        "slices": target.slices,
        "devices": len(target.devices),
        "mesh": dict(program.mesh.shape),
        "notes": program.notes,
        "limit_bytes": target.chip.memory,
        "limit_note": target.chip.memory_note,
        "parameter_bytes": program.parameter_bytes,
        "gradient_bytes": program.gradient_bytes,
        "optimizer_bytes": program.optimizer_bytes,
        "host_bytes": program.host_bytes,
        "program": program.name,
        "tokens_per_step": program.tokens,
    }
    lowered = _lowered(program)
    say(f"traced in {time.perf_counter() - began:.0f} s, compiling …")
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        figures["compile_seconds"] = time.perf_counter() - began
        figures["peak_bytes"] = out_of_memory(str(error))
        figures["largest"] = largest_allocations(str(error))
        figures["fits"] = False
        return figures
    figures |= {"compile_seconds": time.perf_counter() - began, **memory_of(compiled)}
    figures["fits"] = figures["peak_bytes"] <= target.chip.memory
    slices = [target.slice_of(device) for device in program.mesh.devices.flat]
    text = compiled.as_text()
    if hlo:
        files.write(hlo, text)
    costs = analyse(text, slices, fast_memory=target.platform == "tpu")
    costs.attention_flops = attention_flops(program, target)
    figures |= dataclasses.asdict(costs) | {"notes": program.notes, "counting_notes": costs.notes}
    figures |= _experts(program, target, text)
    length, freeze = program.config.data.sequence_length, program.config.train.freeze
    if program.trains:
        needed = training_flops(program.model, length, freeze)
        if program.config.optimizer.name == "muon":
            figures["newton_schulz_flops"] = newton_schulz_flops(program.model, freeze)
    else:
        needed = sum(forward_flops(program.model, length).values())
    figures |= report.roofline(costs, target, figures["tokens_per_step"], needed)
    return figures


def _experts(program: Program, target: Target, text: str) -> dict[str, Any]:
    """Returns how the experts' weights are read, as far as the compiled program tells."""
    if program.experts == "host":
        return _from_host(text)
    if target.platform == "tpu" and program.model.moe and program.experts == "device":
        return _in_place(program, text)
    return {}


def _from_host(text: str) -> dict[str, Any]:
    """Returns the transfers of experts from host memory, and the HBM bytes beside them."""
    overlap = host_overlap(text)
    return {
        "host_moved_bytes": overlap.moved_bytes,
        "host_transfers": sum(transfer.times for transfer in overlap.transfers),
        "host_covered_bytes": overlap.covered_bytes,
    }


def _in_place(program: Program, text: str) -> dict[str, Any]:
    """Returns HBM bytes of the experts' weights and gradients, and their minimum."""
    assert program.model.moe is not None
    train, total = program.config.train, program.model.moe.pool_size
    places = Places.of(total, Placement(program.mesh))
    local = total // math.prod(program.mesh.shape[a] for a in places.experts if a == "expert")
    stored = jnp.dtype(program.stored).itemsize
    computed = min(stored, jnp.dtype(train.compute_dtype).itemsize)
    parts = train.grad_accumulation if program.trains else 1
    if parts > 1:  # each reads the weights twice, and reads and writes float32 gradient sums
        least = parts * (2 * computed + 2 * 4)
    else:
        least = 2 * stored + stored if program.trains else stored
    adds = parts > 1 and not places.pieces
    traffic = expert_traffic(text, program.model, local, adds)
    across = program.model.moe.experts_across
    notes = list(program.notes)
    if across > 1 and places.pieces:
        notes.append(
            f"experts_across={across}: each of a pool's {across} layers gathers its {total} "
            "experts over fsdp"
        )
    return {
        "notes": notes,
        "expert_bytes": traffic.total,
        "expert_bound_bytes": least * expert_weights(program.model, local),
        "expert_bytes_in_loops": traffic.in_loops,
        "expert_copies": traffic.moved_by,
    }


def _lowered(program: Program) -> Any:
    """Traces and lowers the program. Raises InputError if cuDNN is missing."""
    try:
        return program.lower()
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise InputError(
            f"{error}: JAX needs cuDNN to check its version; pip install nvidia-cudnn-cu13 "
            "nvidia-cublas, and add their lib folders to LD_LIBRARY_PATH"
        ) from None


def memory_of(compiled: Any) -> dict[str, int]:
    """Returns the bytes that a compiled program needs per device, by kind."""
    memory = compiled.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "host_argument_bytes": memory.host_argument_size_in_bytes,
        "host_temporary_bytes": memory.host_temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "peak_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
    }


def attention_flops(program: Program, target: Target) -> float:
    """Returns FLOPs of causal attention per device and step, which its kernels do not report.

    Counts products without their masked half (config/flops.py): two forward, two if recomputed,
    and seven backward on a TPU (splash, unfused) or five on a GPU (cuDNN).
    """
    if program.name == "decode":  # XLA's own products
        return 0.0
    backward = 7 if target.platform == "tpu" else 5
    products = 2
    if program.trains:
        products += backward + (0 if program.config.train.remat == "none" else 2)
    parts = sharding.batch_parts(program.mesh)
    tensor = program.mesh.shape["tensor"]
    if program.model.num_attention_heads % tensor == 0:
        parts *= tensor
    scores = forward_flops(program.model, program.config.data.sequence_length)["scores"]
    return products / 2 * scores * program.tokens / parts


def out_of_memory(message: str) -> float:
    """Parses the bytes that a program needs (all, or temporaries) from XLA's out-of-memory error.

    Raises InputError with the message for any other error.
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)", message)
    if found is None or "RESOURCE_EXHAUSTED" not in message:
        first = next((line for line in message.splitlines() if line.strip()), "no reason")
        raise InputError(f"the program does not compile for this topology: {first[:600]}")
    return float(found[1]) * units[found[2]]


def largest_allocations(message: str) -> list[str]:
    """Returns the six largest allocations that the error lists: size, shape and origin."""
    found = re.findall(
        r"Size: (\S+)\s+(?:Operator: op_name=\"([^\"]*)\")?[^\n]*\n\s+Shape: (\S+)", message
    )
    return [f"{size}  {shape}  {origin}".rstrip() for size, origin, shape in found[:6]]
