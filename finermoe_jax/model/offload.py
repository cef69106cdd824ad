"""Moves experts between device memory and host memory, for generation (docs/host_experts.md)."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from finermoe_jax.config.model import ModelConfig
from finermoe_jax.errors import InputError, near_misses
from finermoe_jax.layers.parameters import Path, axes_of, kind_of
from finermoe_jax.layers.stored import HostLayers
from finermoe_jax.model.decoder import Decoder, parameter_kinds
from finermoe_jax.runtime import disk, host_memory

# Where experts are stored and computed: device memory; host memory, copied to the device when
# chosen; host memory, multiplied there.
PLACES = ("device", "host", "host_compute")


def check_place(experts: Any, config: ModelConfig, mesh: Mesh | None = None) -> None:
    """Raises InputError unless a model's experts can be placed as `experts` says."""
    if experts not in PLACES:
        raise InputError(f"experts={experts!r} is unknown. {near_misses(str(experts), PLACES)}")
    if experts == "device":
        return
    if config.moe is None:
        raise InputError(
            f"experts={experts!r} needs a model with experts, but this one is dense: omit it"
        )
    if mesh is not None and mesh.size > 1:
        raise InputError(
            f"experts={experts!r} needs one device, but the model is on a mesh of {mesh.size}: "
            "load it without a mesh"
        )


def check_room(size: int, what: str = "the experts") -> None:
    """Raises InputError if host memory cannot hold `size` more bytes, which `what` needs."""
    free = host_memory.available()
    if free is not None and size > free:
        raise InputError(
            f"{what} need {disk.format_bytes(size)} of host memory, but "
            f"{disk.format_bytes(free)} are available: free some, use a smaller model, "
            "or use a machine with more"
        )


def host_arguments(config: ModelConfig, experts: str) -> tuple[list[Path], bool]:
    """Returns the paths of the parameters in host memory, and HostLayers.computed."""
    banks = [path for path, kind in parameter_kinds(config).items() if kind.bank]
    return banks if experts != "device" else [], experts == "host_compute"


def to_host(values: Any) -> jax.Array:
    """Copies an array to host memory, row-major.

    In another layout a TPU would copy all experts to the device at every step.
    """
    device = jax.devices()[0]
    place: Any = SingleDeviceSharding(device, memory_kind="pinned_host")
    if device.platform == "tpu":
        place = Format(Layout(tuple(range(np.ndim(values)))), place)
    return jax.device_put(values, place)


def host_layers(layers: Iterable[Any], computed: bool = False) -> HostLayers:
    """Copies the layers [E, …] of a stack to host memory one by one."""
    return HostLayers(tuple(to_host(layer).block_until_ready() for layer in layers), computed)


def host_shapes(shapes: dict, places: dict, config: ModelConfig, experts: str) -> tuple[dict, dict]:
    """Returns parameters' shapes and in_shardings on a mesh, the experts' as HostLayers."""
    banks, computed = host_arguments(config, experts)
    flat, flat_places = (nnx.traversals.flatten_mapping(tree) for tree in (shapes, places))
    for path in banks:
        stack, mesh = flat[path], flat[path].sharding.mesh
        host = NamedSharding(mesh, PartitionSpec(), memory_kind="pinned_host")
        place = Format(Layout(tuple(range(len(stack.shape) - 1))), host)
        layer = jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=place)
        for into, leaf in ((flat, layer), (flat_places, place)):
            into[path] = HostLayers((leaf,) * stack.shape[0], computed)
    return nnx.traversals.unflatten_mapping(flat), nnx.traversals.unflatten_mapping(flat_places)


def with_experts(model: Decoder, experts: str) -> Decoder:
    """Returns the model with its experts placed as `experts` says; other weights are shared.

    Args:
      model: a decoder on one device.
      experts: one of PLACES.

    Raises:
      InputError: an unknown place, a model without experts or on a mesh, or too little host memory.
    """
    check_place(experts, model.config, model.placement.mesh)
    graphdef, state = nnx.split(model)
    computed = experts == "host_compute"
    banks = [v.get_value() for path, v in nnx.to_flat_state(state) if _is_bank(path, v)]
    leaves = jax.tree.leaves(banks, is_leaf=_is_host)
    if experts != "device":
        moved = [leaf for leaf in leaves if not _is_host(leaf)]
        check_room(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in moved))

    def moved_to(stack: Any) -> Any:
        if experts == "device":
            return jax.numpy.asarray(np.stack(stack.layers)) if _is_host(stack) else stack
        if _is_host(stack):
            return dataclasses.replace(stack, computed=computed)
        return host_layers((stack[layer] for layer in range(len(stack))), computed)

    def place(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        if not _is_bank(path, variable):
            return variable
        return variable.replace(jax.tree.map(moved_to, variable.get_value(), is_leaf=_is_host))

    return nnx.merge(graphdef, nnx.map_state(place, state))


def _is_bank(path: tuple, variable: nnx.Variable) -> bool:
    return kind_of(axes_of(variable, path)).bank


def _is_host(leaf: Any) -> bool:
    return isinstance(leaf, HostLayers)
