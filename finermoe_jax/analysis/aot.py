"""Compiles the whole train step for hardware that is not there, and says whether it fits.

    finermoe aot --config=configs/qwen7b.py --topology=v5e:16x16
        [--num_slices=2] [--suggest] [--output=FILE.json] [--config.mesh.fsdp=… and other overrides]

Needs the extra compile-tpu (TPUs) or compile-cuda (h100:8), no accelerator, no weights, no text.
Every figure is the compiler's or follows from its program: an estimate, nothing measured.

Exit code 0: it compiled and fits. 1: it does not fit. 2: a mistake in the input.
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
from flax import nnx
from jax.sharding import Mesh

from finermoe_jax.analysis import report
from finermoe_jax.analysis.hlo_costs import analyse
from finermoe_jax.analysis.params import run_model
from finermoe_jax.analysis.topology import Target
from finermoe_jax.config.flops import forward_flops, training_flops
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.run import RunConfig
from finermoe_jax.data.packing import Batch
from finermoe_jax.errors import InputError
from finermoe_jax.layers import sharding
from finermoe_jax.layers.parameters import kinds
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.model.decoder import with_shapes
from finermoe_jax.runtime import files
from finermoe_jax.training.optimizer import optimizer
from finermoe_jax.training.step import abstract_optimizer, check_microbatch, jit_step
from finermoe_jax.weights.checkpoint import abstract_params


@dataclasses.dataclass(frozen=True)
class Step:
    """A run's train step in shapes: what its state takes of each device, and how to compile it."""

    config: RunConfig
    model: ModelConfig
    mesh: Mesh
    notes: list[str]
    parameter_bytes: int  # per device, as the two below
    gradient_bytes: int
    optimizer_bytes: int
    lower: Callable[[], Any]

    @property
    def state_bytes(self) -> int:
        """Parameters and optimizer state."""
        return self.parameter_bytes + self.optimizer_bytes


def abstract_step(config: RunConfig, target: Target) -> Step:
    """The train step of a config on a target's mesh. Allocates nothing.

    Raises InputError: a mesh that does not multiply, or a microbatch that its devices do not share.
    """
    mesh = sharding.make_mesh(config.mesh, target.devices)
    check_microbatch(config, mesh)
    model = with_shapes(run_model(config))
    model.dtype = jnp.dtype(config.train.compute_dtype)
    kernel = config.train.kernel
    model.placement = Placement(mesh, None if kernel == "auto" else kernel)
    shardings, notes = sharding.param_shardings(model, mesh)
    params = abstract_params(model.config, config.train.param_dtype, shardings)
    tx = optimizer(config.optimizer, config.train.steps, kinds(model))
    state = abstract_optimizer(tx, params, shardings, mesh)
    graphdef = nnx.split(model)[0]
    step, _ = jit_step(graphdef, config, tx, params, state, shardings, mesh)
    rows = jax.ShapeDtypeStruct(
        (config.data.global_batch_size, config.data.sequence_length + 1),
        jnp.int32,
        sharding=sharding.batch_sharding(mesh),
    )
    batch = Batch(rows, rows if config.data.packing == "documents" else None)

    def lower() -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step.trace(params, state, batch).lower(lowering_platforms=(target.platform,))

    accumulated = config.train.grad_accumulation > 1
    wide = jax.tree.map(lambda p: p.update(dtype=jnp.float32), params)
    gradients = per_device_bytes(params) + (per_device_bytes(wide) if accumulated else 0)
    return Step(
        config, model.config, mesh, notes, per_device_bytes(params), gradients,
        per_device_bytes(state), lower,
    )  # fmt: skip


def per_device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of sharded shapes, without the padding of tiles."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def compile_step(
    step: Step, target: Target, say: Callable[[str], None] = print, hlo: Path | None = None
) -> dict[str, Any]:
    """Compiles, and returns all figures (finermoe_jax/analysis/report.py prints them).

    Writes the compiled program's text to `hlo`, if given.

    Raises InputError when the compiler refuses the program for another reason than memory, or
    cuDNN is missing.
    """
    began = time.perf_counter()
    figures: dict[str, Any] = {
        "what": "compiler estimates, nothing measured",
        "topology": target.name,
        "slices": target.slices,
        "devices": len(target.devices),
        "mesh": dict(step.mesh.shape),
        "notes": step.notes,
        "limit_bytes": target.chip.memory,
        "limit_note": target.chip.memory_note,
        "parameter_bytes": step.parameter_bytes,
        "gradient_bytes": step.gradient_bytes,
        "optimizer_bytes": step.optimizer_bytes,
        "tokens_per_step": step.config.data.global_batch_size * step.config.data.sequence_length,
    }
    lowered = _lowered(step)
    say(f"traced in {time.perf_counter() - began:.0f} s, compiling …")
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        figures["compile_seconds"] = time.perf_counter() - began
        figures["peak_bytes"] = out_of_memory(str(error))
        figures["largest"] = largest_allocations(str(error))
        figures["fits"] = False
        return figures
    figures |= {"compile_seconds": time.perf_counter() - began, **_memory(compiled)}
    figures["fits"] = figures["peak_bytes"] <= target.chip.memory
    slices = [target.slice_of(device) for device in step.mesh.devices.flat]
    text = compiled.as_text()
    if hlo:
        files.write(hlo, text)
    costs = analyse(text, slices, fast_memory=target.platform == "tpu")
    costs.attention_flops = attention_flops(step, target)
    figures |= dataclasses.asdict(costs) | {"notes": step.notes, "counting_notes": costs.notes}
    frozen = step.config.optimizer.freeze_backbone
    needed = training_flops(step.model, step.config.data.sequence_length, frozen)
    figures |= report.roofline(costs, target, figures["tokens_per_step"], needed)
    return figures


def _lowered(step: Step) -> Any:
    """The traced step. Raises InputError where cuDNN is missing."""
    try:
        return step.lower()
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise InputError(
            f"{error}: JAX asks cuDNN for its version; pip install nvidia-cudnn-cu13 "
            "nvidia-cublas, and name their lib folders in LD_LIBRARY_PATH"
        ) from None


def _memory(compiled: Any) -> dict[str, int]:
    """Bytes that a compiled program takes of a device, by kind."""
    memory = compiled.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "peak_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
    }


def attention_flops(step: Step, target: Target) -> float:
    """FLOPs of causal attention per device and step; its library kernels state none.

    Products without their masked half (config/flops.py): two forward, two more where they are
    recomputed, and backward seven on a TPU (splash, unfused) or five (cuDNN).
    """
    data = step.config.data
    backward = 7 if target.platform == "tpu" else 5
    products = 2 + backward + (0 if step.config.train.remat == "none" else 2)
    parts = sharding.batch_parts(step.mesh)
    tensor = step.mesh.shape["tensor"]
    if step.model.num_attention_heads % tensor == 0:
        parts *= tensor
    scores = forward_flops(step.model, data.sequence_length)["scores"]
    return products / 2 * scores * data.sequence_length * data.global_batch_size / parts


def out_of_memory(message: str) -> float:
    """The bytes that a program wanted, from XLA's out-of-memory error: all, or temporaries alone.

    Raises InputError, with the message, for another error.
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)", message)
    if found is None or "RESOURCE_EXHAUSTED" not in message:
        first = next((line for line in message.splitlines() if line.strip()), "no reason")
        raise InputError(f"the program does not compile for this topology: {first[:600]}")
    return float(found[1]) * units[found[2]]


def largest_allocations(message: str) -> list[str]:
    """The first of the largest allocations that the error lists: size, shape and origin."""
    found = re.findall(
        r"Size: (\S+)\s+(?:Operator: op_name=\"([^\"]*)\")?[^\n]*\n\s+Shape: (\S+)", message
    )
    return [f"{size}  {shape}  {origin}".rstrip() for size, origin, shape in found[:6]]
