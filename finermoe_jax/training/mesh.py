"""Chooses the mesh of a run that leaves `config.mesh` at its defaults (docs/scaling.md).

The rule: shard over expert first, then over fsdp, only as far as the memory of a device requires.
data gets the remaining devices.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.run import MeshConfig, RunConfig
from finermoe_jax.layers import sharding
from finermoe_jax.layers.sharding import per_device_bytes
from finermoe_jax.model.decoder import with_shapes
from finermoe_jax.training.optimizer import run_optimizer
from finermoe_jax.training.step import abstract_optimizer
from finermoe_jax.weights.checkpoint import abstract_params

# Experts are sharded over up to this many devices even if fewer would fit: each expert gets more
# rows, and the traffic does not grow.
FIRST_EXPERT_AXIS = 16


def is_automatic(mesh: MeshConfig) -> bool:
    """Returns True if every field has its default, so that the mesh may be chosen."""
    return mesh == MeshConfig()


def meshes(devices: int, slices: int = 1, experts: int = 0) -> Iterator[MeshConfig]:
    """Yields the rule's meshes, from the least sharded one to the most sharded one.

    Args:
      devices: number of devices.
      slices: only the data axis spans them.
      experts: routed experts of a layer; 0 without experts.
    """
    inside = devices // slices
    axes = [size for size in _divisors(inside) if size == 1 or (experts and experts % size == 0)]
    first = max(size for size in axes if size <= FIRST_EXPERT_AXIS)
    for expert in axes[axes.index(first) :]:
        yield MeshConfig(devices // expert, 1, expert, 1)
    for fsdp in _divisors(inside // axes[-1])[1:]:
        yield MeshConfig(devices // (fsdp * axes[-1]), fsdp, axes[-1], 1)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def choose_mesh(
    config: RunConfig, model: ModelConfig, devices: int, memory: float | None, slices: int = 1
) -> tuple[MeshConfig, str]:
    """Chooses the first of `meshes` whose estimated bytes fit a device.

    Args:
      config: of the run.
      model: the architecture of the model that it trains.
      devices: number of devices.
      memory: bytes of a device; None or 0 if unknown.
      slices: number of slices; only the data axis spans them.

    Returns:
      The mesh and a message. If config.mesh is set, on one device, or if the memory is unknown: the
      config's mesh and "". If nothing fits, the most sharded mesh.
    """
    if not is_automatic(config.mesh) or devices == 1 or not memory or devices % slices:
        return config.mesh, ""
    needed, mesh = 0, config.mesh
    for mesh in meshes(devices, slices, model.moe.num_experts if model.moe else 0):
        needed = estimated_bytes(config, model, mesh)
        if needed <= memory:
            break
    verdict = "" if needed <= memory else ", which is too much"
    sizes = ", ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(mesh).items())
    return mesh, (
        f"chose the mesh {sizes}: it needs about {needed / 2**30:.1f} of {memory / 2**30:.1f} GiB "
        f"per device{verdict}. Set config.mesh to use another one"
    )


def estimated_bytes(config: RunConfig, model: ModelConfig, mesh: MeshConfig) -> int:
    """Estimates a training step's bytes per device; docs/scaling.md compares with compiled steps.

    Counts weights, optimizer state, gradients and their float32 sums from shapes. Adds the layers'
    saved inputs, the gathered lm_head with its gradient, two chunks of logits, and one layer's
    activations; without remat=full, every layer's.
    """
    decoder, sizes = with_shapes(model), dataclasses.asdict(mesh)
    abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    shardings, _ = sharding.param_shardings(decoder, abstract)
    params = abstract_params(model, config.train.param_dtype, shardings)
    tx = run_optimizer(config, decoder)
    state = per_device_bytes(params) + per_device_bytes(
        abstract_optimizer(tx, params, shardings, abstract)
    )
    return state + gradient_bytes(config, params) + _activations(config, model, mesh)


def gradient_bytes(config: RunConfig, params: dict) -> int:
    """Returns the bytes of a device's gradients, with float32 sums over microbatches, if any."""
    size = per_device_bytes(params)
    if config.train.grad_accumulation > 1:
        size += per_device_bytes(jax.tree.map(lambda p: p.update(dtype=jnp.float32), params))
    return size


def _activations(config: RunConfig, model: ModelConfig, mesh: MeshConfig) -> int:
    train, width = config.train, model.hidden_size
    rows = config.data.global_batch_size // train.grad_accumulation
    parts = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
    tokens = -(-rows // parts) * config.data.sequence_length
    ffn, routed, saved = model.intermediate_size, 0, width
    if model.moe is not None:
        ffn = max(model.shared_expert_size, ffn if "dense" in model.layer_kinds else 0)
        routed = model.moe.num_active * (2 * width + 3 * model.expert_intermediate_size)
        saved = width * (1 + model.moe.route_ahead)
    itemsize = jnp.dtype(train.compute_dtype).itemsize
    layer = tokens * itemsize * (5 * ffn + 4 * width + routed)
    kept = tokens * itemsize * saved if train.remat == "full" else layer
    head = model.vocab_size * width * (itemsize + 4)
    logits = 2 * min(tokens, train.loss_chunk_tokens) * model.vocab_size * 4
    return layer + model.num_hidden_layers * kept + head + logits
