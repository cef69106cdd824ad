"""The mesh, and the one table from logical axes to mesh axes.

Mesh axes: data (replicas), fsdp (shards weights and optimizer state, gathers them for use), expert
(shards experts, exchanges tokens), tensor (shards heads, FFN width and vocabulary). Every axis but
tensor splits the batch. Dense weights are sharded over both fsdp and expert.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from finermoe_jax.config.run import MeshConfig
from finermoe_jax.errors import InputError
from finermoe_jax.layers.parameters import Path, axes_of, kind_of, kinds, of_one_layer
from pallas_kernels.platform import Implementation, platform

# Logical axis → mesh axes, outermost first. Parameters, then activations.
RULES: dict[str, tuple[str, ...]] = {
    "layer": (),
    "vocab": ("tensor",),  # embedding
    "scored_vocab": ("tensor", "fsdp", "expert"),  # lm_head
    "embed": ("fsdp", "expert"),
    "norm": (),
    "concat": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "shared_mlp": ("tensor",),
    "gate_in": (),
    "depth": (),
    "router": (),
    "expert": ("expert", "fsdp"),
    "expert_mlp": (),
    "expert_in": (),
    "expert_out": (),
    "batch": ("data", "fsdp", "expert"),
    "sequence": (),
    "routed_sequence": ("tensor",),  # for per-token work
    "width": (),
}
# Mesh axes over which a parameter's axis is gathered before use; its gradient is reduce-scattered.
GATHERED: dict[str, tuple[str, ...]] = {"embed": ("fsdp", "expert"), "expert": ("fsdp",)}
# Axes that their first mesh axis must divide: keeping them whole would change the algorithm.
MUST_DIVIDE = ("expert",)


ExchangeKind = Literal["auto", "ragged", "padded"]


class Placement(NamedTuple):
    """The mesh, the kernels and the exchange of rows that compute a model."""

    mesh: Mesh | None = None  # None: one device
    # For experts (pallas_kernels.expert_ffn) and attention (causal.py); None: chosen by platform.
    kernel: Implementation | None = None
    # Of routed rows between devices (moe/exchange.py).
    exchange: ExchangeKind = "auto"
    # Replaces routing by a perfectly even one (moe/routing.py), to time everything else.
    force_balance: bool = False


ONE_DEVICE = Placement()


def kernel_named(name: str) -> Implementation | None:
    """Returns the implementation named by train.kernel; None for "auto".

    Raises InputError for a kernel of another platform.
    """
    if name in ("tpu", "gpu") and name != platform():
        raise InputError(
            f"train.kernel={name!r} needs a {name}, but the devices here are {platform()}: "
            'set train.kernel="auto"'
        )
    return None if name == "auto" else cast(Implementation, name)


def exchange_named(name: ExchangeKind) -> ExchangeKind:
    """Returns train.exchange. Raises InputError for "ragged" on a CPU."""
    if name == "ragged" and platform() == "cpu":
        raise InputError(
            "train.exchange='ragged' needs an accelerator, but the devices here are cpu. XLA has "
            'no ragged exchange on a CPU. Set train.exchange="auto"'
        )
    return name


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Returns the size of each mesh axis over `devices` devices.

    Raises InputError if the sizes do not multiply to the number of devices.
    """
    sizes = dataclasses.asdict(config)
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(
            f"mesh {sizes}: sizes must be positive; one of them may be -1 (the remaining devices)"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if rest:
        sizes[rest[0]] = devices // known
    if math.prod(sizes.values()) != devices:
        raise InputError(
            f"mesh {sizes} needs {math.prod(sizes.values())} devices, but {devices} devices are "
            "available: set one of the axes to -1 to use the remaining devices"
        )
    return sizes


def least_devices(config: MeshConfig) -> int:
    """Returns the product of the sizes, with -1 counted as 1."""
    return math.prod(max(1, size) for size in dataclasses.astuple(config))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh over all devices (or the given ones), axes in MeshConfig's order.

    Raises InputError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    slices = slice_count(devices)
    if slices > 1:
        placed = _across_slices(sizes, slices, devices)
    else:
        placed = mesh_utils.create_device_mesh(
            list(sizes.values()), devices, allow_split_physical_axes=True
        )
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def slice_count(devices: Sequence[jax.Device]) -> int:
    """Returns the number of TPU slices that the devices belong to; 1 on other platforms."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", None) for device in devices})


def _across_slices(sizes: dict[str, int], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges several slices so that only the data axis crosses slice boundaries."""
    if sizes["data"] % slices:
        raise InputError(
            f"mesh {sizes}: data must be a multiple of the {slices} slices, since only the data "
            "axis may use the slower network between them"
        )
    inside = (sizes["data"] // slices, *list(sizes.values())[1:])
    between = (slices, *(1 for _ in inside[1:]))
    return mesh_utils.create_hybrid_device_mesh(
        inside, between, devices, allow_split_physical_axes=True
    )


def spec(
    axes: Sequence[str],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    name: str,
    gathered: bool = False,
) -> tuple[PartitionSpec, list[str]]:
    """Returns the PartitionSpec of an array with logical `axes`, and notes on axes not fully split.

    An axis is split by all of its mesh axes or, if these do not divide it, by their longest prefix
    that does. With `gathered`, returns the spec for use, after the gather.

    Raises InputError for a logical axis without a rule, two logical axes on one mesh axis, or
    experts that the expert axis does not divide.
    """
    entries: list[tuple[str, ...] | None] = []
    notes: list[str] = []
    claimed: dict[str, str] = {}
    for axis, size in zip(axes, shape, strict=True):
        if axis not in RULES:
            raise InputError(f"{name}: logical axis {axis!r} has no rule in sharding.RULES")
        wanted = RULES[axis]
        taken = wanted
        while size % math.prod(mesh.shape[m] for m in taken):
            taken = taken[:-1]
        if axis in MUST_DIVIDE and wanted[0] not in taken:
            raise InputError(
                f"{name}: {size} experts cannot be split over mesh axis {wanted[0]}="
                f"{mesh.shape[wanted[0]]}; make mesh.{wanted[0]} a divisor of {size}"
            )
        if any(mesh.shape[m] > 1 for m in wanted[len(taken) :]):
            parts = math.prod(mesh.shape[m] for m in wanted)
            notes.append(
                f"{name}: {axis} of size {size} is not a multiple of {'*'.join(wanted)}={parts} "
                + (f"and is split over {'*'.join(taken)} only" if taken else "and stays whole")
            )
        for mesh_axis in taken:
            if mesh_axis in claimed:
                raise InputError(
                    f"{name}: logical axes {claimed[mesh_axis]!r} and {axis!r} both claim mesh "
                    f"axis {mesh_axis!r}"
                )
            claimed[mesh_axis] = axis
        if gathered:
            taken = tuple(m for m in taken if m not in GATHERED.get(axis, ()))
        entries.append(taken or None)
    return PartitionSpec(*entries), notes


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of a PartitionSpec's entry, which may be a single string."""
    return (entry,) if isinstance(entry, str) else entry or ()


def param_shardings(model: nnx.Module, mesh: Mesh | AbstractMesh) -> tuple[dict, list[str]]:
    """Returns a NamedSharding per parameter, as a pure dict, and notes (`spec`)."""
    notes: list[str] = []
    shardings = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = "/".join(map(str, path))
        partition, left_whole = spec(axes_of(variable, path), variable.shape, mesh, name)
        shardings[path] = NamedSharding(mesh, partition)
        notes += left_whole
    return nnx.traversals.unflatten_mapping(shardings), notes


def constrain(x: Array, axes: Sequence[str], placement: Placement, name: str) -> Array:
    """Constrains activation x to the sharding of these logical axes; `name` is for messages."""
    if placement.mesh is None or placement.mesh.size == 1:
        return x
    partition, _ = spec(axes, x.shape, placement.mesh, name)
    return jax.lax.with_sharding_constraint(x, NamedSharding(placement.mesh, partition))


def gather_dense(state: nnx.State, dtype: DTypeLike, placement: Placement) -> nnx.State:
    """Casts a layer's dense parameters, then gathers them for use (GATHERED).

    Casting first halves the traffic for bfloat16; gradients are reduce-scattered in the same dtype.
    The router keeps its dtype. Expert weights are left to exchange.py.
    """
    mesh = placement.mesh
    if mesh is None or mesh.size == 1:
        return state

    def use(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        x = variable[...]
        axes = of_one_layer(axes_of(variable, path))
        if kind_of(axes).bank:
            return variable
        name = "/".join(map(str, path))
        stored, used = (
            NamedSharding(mesh, spec(axes, x.shape, mesh, name, gathered)[0])
            for gathered in (False, True)
        )
        return variable.replace(_gather(x, x.dtype if "router" in axes else dtype, stored, used))

    return nnx.map_state(use, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: Array, dtype: DTypeLike, stored: NamedSharding, used: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x.astype(dtype), used)


# Reduce-scatters the cotangent to the stored shards; JAX would all-reduce it first.
_gather.defvjp(
    lambda x, dtype, stored, used: (_gather(x, dtype, stored, used), jnp.zeros((), x.dtype)),
    lambda dtype, stored, used, like, g: (
        jax.lax.with_sharding_constraint(g, stored).astype(like.dtype),
    ),
)


def gather_inside(x: Array, partition: PartitionSpec, keep: Sequence[str] = ()) -> Array:
    """Inside shard_map: gathers a parameter over all its mesh axes except `keep`."""
    for place, entry in enumerate(partition):
        names = tuple(name for name in mesh_axes(entry) if name not in keep)
        if names:
            x = jax.lax.all_gather(x, names, axis=place, tiled=True)
    return x


def row_major(tree: Any, shardings: Any, model: nnx.Module) -> Any:
    """Returns a Format per leaf: its sharding and, for expert banks, row-major layout.

    tree holds parameters of the model, or an optimizer state with leaves of the same shapes. A
    TPU's default layout puts the 128 experts of Qwen2.5-0.5B's `down` in the minor axis, because
    its width of 448 is not a multiple of 128. Every kernel call would then begin with a copy.
    """
    shapes = {path: v.shape for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    banks = {path: shapes[path] for path, kind in kinds(model).items() if kind.bank}

    def place(path: tuple, leaf: Any, sharding: NamedSharding) -> Format:
        whole_bank = leaf.shape == banks.get(_parameter_path(path))
        return Format(Layout(tuple(range(leaf.ndim))) if whole_bank else None, sharding)

    return jax.tree_util.tree_map_with_path(place, tree, shardings)


def as_kernels_read(state: nnx.State) -> nnx.State:
    """Returns the state with expert banks in row-major layout on a TPU (`row_major`).

    Banks in another layout are copied once here instead of at every later call.
    """

    def place(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        if not isinstance(value, jax.Array) or not kind_of(axes_of(variable, path)).bank:
            return variable
        if next(iter(value.devices())).platform != "tpu":
            return variable
        row_major = Format(Layout(tuple(range(value.ndim))), value.sharding)
        return variable.replace(jax.device_put(value, row_major))

    return nnx.map_state(place, state)


def _parameter_path(path: tuple) -> Path:
    """Returns the parameter's path at the end of a leaf's path."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def per_device_bytes(tree: Any) -> int:
    """Returns one device's bytes of a tree of sharded shapes, without tile padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a [batch, sequence] array."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], None))


def batch_parts(mesh: Mesh) -> int:
    """Number of shards of the batch axis."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def like_params(tree: Any, params: dict, shardings: dict, mesh: Mesh | AbstractMesh) -> Any:
    """Returns shardings of an optimizer state: each leaf like the parameter its path ends in.

    A leaf that lacks one axis of its parameter (Adafactor's second moments) keeps the sharding of
    the other axes. Any other shape is replicated.
    """
    placed = nnx.traversals.flatten_mapping(shardings)
    shapes = {path: p.shape for path, p in nnx.traversals.flatten_mapping(params).items()}

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        keys = _parameter_path(path)
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
