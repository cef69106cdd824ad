"""The mesh, and the one table from logical axes to mesh axes.

Mesh axes: data (replicated weights), fsdp (weights and optimizer state split along the model
width), expert (experts split), tensor (heads, FFN width and vocabulary split).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from finermoe_jax.config import MeshConfig
from finermoe_jax.errors import InputError
from pallas_kernels.platform import Implementation

# Logical axis → mesh axes. None: the axis is never split. Parameters first, activations below.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layer": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "concat": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "router": None,
    "expert": "expert",
    "expert_mlp": None,
    "expert_in": "fsdp",
    "expert_out": None,
    "batch": ("data", "fsdp", "expert"),
    "sequence": None,
    "routed_sequence": "tensor",
    "width": None,
}


class Placement(NamedTuple):
    """Where and how a model is computed."""

    mesh: Mesh | None = None  # None: one device
    kernel: Implementation | None = None  # of pallas_kernels.expert_ffn; None: by the platform


ONE_DEVICE = Placement()


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of each axis over so many devices.

    Raises InputError when the sizes do not multiply to the number of devices.
    """
    sizes = dataclasses.asdict(config)
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f"mesh {sizes}: sizes are positive, and at most one is -1 (the rest)")
    known = math.prod(size for size in sizes.values() if size != -1)
    if rest:
        sizes[rest[0]] = devices // known
    if math.prod(sizes.values()) != devices:
        raise InputError(
            f"mesh {sizes} has {math.prod(sizes.values())} places for {devices} devices; "
            "set one of the axes to -1 to take the rest"
        )
    return sizes


def least_devices(config: MeshConfig) -> int:
    """The product of the sizes, "the rest" counted as one."""
    return math.prod(max(1, size) for size in dataclasses.astuple(config))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (or the given ones), axes in MeshConfig's order.

    Raises InputError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices > 1:
        return _sliced_mesh(sizes, slices, devices)
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices,
    )


def _sliced_mesh(sizes: dict[str, int], slices: int, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh over several slices, whose data axis alone goes from one to another."""
    if sizes["data"] % slices:
        raise InputError(
            f"mesh {sizes}: data must be a multiple of the {slices} slices, since it alone goes "
            "over the slower network between them"
        )
    inside = (sizes["data"] // slices, *list(sizes.values())[1:])
    between = (slices, *(1 for _ in inside[1:]))
    placed = mesh_utils.create_hybrid_device_mesh(inside, between, devices)
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def spec(
    axes: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh, name: str
) -> tuple[PartitionSpec, list[str]]:
    """The PartitionSpec of an array with logical `axes`, and a note per axis left whole.

    One rule for what does not divide: an axis that its mesh axes do not divide is left whole
    (replicated), and the note says so.

    Raises InputError: a logical axis without a rule, or two that claim one mesh axis.
    """
    entries: list[str | tuple[str, ...] | None] = []
    notes: list[str] = []
    claimed: dict[str, str] = {}
    for axis, size in zip(axes, shape, strict=True):
        if axis not in RULES:
            raise InputError(f"{name}: logical axis {axis!r} has no rule in sharding.RULES")
        target = RULES[axis]
        mesh_axes = (target,) if isinstance(target, str) else target or ()
        parts = math.prod(mesh.shape[m] for m in mesh_axes)
        if parts > 1 and size % parts:
            notes.append(
                f"{name}: {axis} of size {size} is not a multiple of {'*'.join(mesh_axes)}="
                f"{parts} and stays whole on every device"
            )
            target, mesh_axes = None, ()
        for mesh_axis in mesh_axes:
            if mesh_axis in claimed:
                raise InputError(
                    f"{name}: logical axes {claimed[mesh_axis]!r} and {axis!r} both claim mesh "
                    f"axis {mesh_axis!r}"
                )
            claimed[mesh_axis] = axis
        entries.append(target)
    return PartitionSpec(*entries), notes


def param_shardings(model: nnx.Module, mesh: Mesh | AbstractMesh) -> tuple[dict, list[str]]:
    """A NamedSharding per parameter, as a pure dict like the parameters', and notes (`spec`)."""
    notes: list[str] = []
    shardings = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = "/".join(map(str, path))
        axes = variable.get_metadata().get("out_sharding")
        if axes is None:
            raise InputError(f"parameter {name} declares no logical axes")
        partition, left_whole = spec(axes, variable.shape, mesh, name)
        shardings[path] = NamedSharding(mesh, partition)
        notes += left_whole
    return nnx.traversals.unflatten_mapping(shardings), notes


def row_major(tree: Any, shardings: Any) -> Any:
    """A Format per leaf of arrays or shapes: its sharding, and memory in the order of its axes.

    Left to itself a TPU puts the 128 experts of Qwen2.5-0.5B's `down` in the minor axis, because
    its width of 448 is no multiple of 128; every call of a kernel then begins with a copy.
    """

    def place(leaf: Any, sharding: NamedSharding) -> Format:
        return Format(Layout(tuple(range(leaf.ndim))), sharding)

    return jax.tree.map(place, tree, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a [batch, sequence] array."""
    axes = RULES["batch"], RULES["sequence"]
    return NamedSharding(mesh, PartitionSpec(*axes))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the batch axis is split."""
    axes = RULES["batch"]
    assert isinstance(axes, tuple)
    return math.prod(mesh.shape[axis] for axis in axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def like_params(tree: Any, params: dict, shardings: dict, mesh: Mesh) -> Any:
    """Shardings of an optimizer state: each leaf as the parameter whose path it ends in.

    A leaf that is its parameter less one axis (Adafactor's row and column of second moments) keeps
    the others' shardings; any other shape is whole on every device.
    """
    placed = nnx.traversals.flatten_mapping(shardings)
    shapes = {path: p.shape for path, p in nnx.traversals.flatten_mapping(params).items()}

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        keys = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        if keys not in placed:
            return replicated(mesh)
        shape, entries = shapes[keys], placed[keys].spec
        entries = (*entries, *(None for _ in shape[len(entries) :]))
        if leaf.shape == shape:
            return placed[keys]
        for axis in range(len(shape)):
            if leaf.shape == (*shape[:axis], *shape[axis + 1 :]):
                return NamedSharding(mesh, PartitionSpec(*entries[:axis], *entries[axis + 1 :]))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)
