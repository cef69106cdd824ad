"""Lazy arrays: shape and dtype are known, values are computed block by block when indexed.

Values come from safetensors (hf_weights.py), a checkpoint (orbax_files.py), a dense model being
upcycled (upcycle.py), or memory. Code that writes or places weights asks for blocks, so no host
holds more of a model than a few blocks.
"""

import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from finermoe_jax.errors import InputError
from finermoe_jax.layers.parameters import Kind
from finermoe_jax.layers.stored import HostLayers
from finermoe_jax.model.offload import check_room, host_layers

# One slice, with start, stop and step 1, per axis.
Index = tuple[slice, ...]
# A parameter's path in the decoder, e.g. ("runs", 0, 0, "moe", "gate_up").
ParamPath = tuple[Any, ...]
# Most bytes in one block of a parameter.
BLOCK_BYTES = 32 << 20
# XLA on a CPU computes on NumPy's memory without a copy if its address is a multiple of this.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array whose values are read when it is indexed with slices of step 1.

    `read` gets one slice per axis with explicit bounds and returns a NumPy array of that shape.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        """Returns the values in `dtype`; axes missing from the index are taken whole."""
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (len(self.shape) - len(index))
        bounds = [each.indices(size) for each, size in zip(index, self.shape, strict=True)]
        assert all(step == 1 for _, _, step in bounds), index
        whole = tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)
        return converted(np.asarray(self.read(whole)), self.dtype, "the weights' array")

    def row(self, place: int) -> "LazyArray":
        """Returns the array at one position of the first axis."""
        one = slice(place, place + 1)
        return LazyArray(self.shape[1:], self.dtype, lambda index: self[one, *index][0])

    @property
    def nbytes(self) -> int:
        """Size of all values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def converted(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Casts the values. Raises InputError, naming a value, if one overflows the dtype."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = values.astype(dtype)
    if jnp.finfo(dtype).max < jnp.finfo(values.dtype).max:
        _refuse_infinite(values, wanted, f"{name} holds")
    return wanted


def scaled(values: np.ndarray, factor: int) -> np.ndarray:
    """Multiplies the values in their dtype. Raises InputError if one overflows it."""
    if factor == 1:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = values * np.asarray(factor, values.dtype)
    _refuse_infinite(values, wanted, f"the weights are multiplied by {factor} and hold")
    return wanted


def _refuse_infinite(values: np.ndarray, wanted: np.ndarray, what: str) -> None:
    lost = np.isinf(wanted) & np.isfinite(values)
    if lost.any():
        raise InputError(
            f"{what} {values[lost][0]}, but the largest {wanted.dtype} is "
            f"{jnp.finfo(wanted.dtype).max}: choose another dtype"
        )


Weights = dict[ParamPath, LazyArray]


def stacked(
    shape: tuple[int, ...], dtype: DTypeLike, axes: int, read: Callable[..., np.ndarray]
) -> LazyArray:
    """Stacks arrays lazily: read(index on each of the first `axes` axes, slices of the others)."""

    def values(index: Index) -> np.ndarray:
        outer, inner = index[:axes], index[axes:]
        places = list(itertools.product(*(range(each.start, each.stop) for each in outer)))
        if len(places) == 1:  # the usual case; avoids a copy
            return read(*places[0], inner)[(np.newaxis,) * axes]
        found = np.stack([read(*place, inner) for place in places])
        return found.reshape(*(each.stop - each.start for each in outer), *found.shape[1:])

    return LazyArray(shape, np.dtype(dtype), values)


def of_array(array: Any) -> LazyArray:
    """Wraps an array, or HostLayers, that are already in memory."""
    if isinstance(array, HostLayers):
        rows = [np.asarray(layer) for layer in array.layers]
        return stacked(array.shape, array.dtype, 1, lambda layer, index: rows[layer][index])
    values = np.asarray(array)
    return LazyArray(values.shape, values.dtype, lambda index: values[index])


def of_params(params: dict) -> Weights:
    """Wraps a decoder's parameters (a pure dict of arrays)."""
    flat = nnx.traversals.flatten_mapping(params)
    return {path: of_array(array) for path, array in flat.items()}


def cast(weights: Weights, dtype: DTypeLike | None, kinds: Mapping[ParamPath, Kind]) -> Weights:
    """Casts the weights lazily, block by block; dtype None returns them unchanged.

    `kinds` are those of the parameters: model state keeps its own dtype (Kind.stored_as).
    """
    if dtype is None:
        return weights
    return {
        path: dataclasses.replace(array, dtype=kinds[path].stored_as(dtype))
        for path, array in weights.items()
    }


def in_memory(weights: Weights, host: Collection[ParamPath] = (), computed: bool = False) -> dict:
    """Returns the parameters as a pure dict of new arrays on the default device.

    Those in `host` become HostLayers, read layer by layer; `computed` as there.
    """
    check_room(sum(weights[path].nbytes for path in host))
    return nnx.traversals.unflatten_mapping(
        {
            path: host_layers(map(_read, _rows(array)), computed)
            if path in host
            else jax.device_put(_read(array), may_alias=True)
            for path, array in weights.items()
        }
    )


def _rows(array: LazyArray) -> Iterator[LazyArray]:
    return map(array.row, range(array.shape[0]))


def _read(array: LazyArray) -> np.ndarray:
    """Returns the values, read block by block, in memory of its own that a CPU can compute on."""
    raw = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    values = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    for index in blocks(array.shape, block_shape(array)):
        values[index] = array[index]
    return values


def placed(weights: Weights, shardings: dict) -> dict:
    """Returns the parameters sharded over devices. `shardings` has the same structure."""
    flat = nnx.traversals.flatten_mapping(shardings)
    return nnx.traversals.unflatten_mapping(
        {path: place(array, flat[path]) for path, array in weights.items()}
    )


def place(array: LazyArray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns the array sharded over devices. Each process reads only what its own devices hold."""
    holders: dict[Index, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        assert index is not None
        holders.setdefault(index, []).append(device)
    parts = []
    for index, devices in holders.items():
        values = array[index]
        parts += [jax.device_put(values, device) for device in devices]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def block_shape(array: LazyArray) -> tuple[int, ...]:
    """Returns the shape of a block: whole minor axes, at most BLOCK_BYTES.

    Experts are blocked as several experts of one layer, a table as some of its rows.
    """
    block = [1] * len(array.shape)
    size = array.dtype.itemsize
    for axis in reversed(range(len(array.shape))):
        whole = array.shape[axis]
        fits = min(whole, max(1, BLOCK_BYTES // size))
        # Prefer equal blocks if they are not much smaller: a mesh that splits the axis then splits
        # few of them.
        equal = max(n for n in range(1, fits + 1) if whole % n == 0)
        block[axis] = equal if 4 * equal >= fits else fits
        size *= block[axis]
        if block[axis] < whole:
            break
    return tuple(block)


def blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> Iterator[Index]:
    """Yields the index of every block of an array, the last axis fastest."""
    starts = (range(0, size, step) for size, step in zip(shape, block, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + step, size))
            for start, step, size in zip(corner, block, shape, strict=True)
        )


def cache_last[*K](make: Callable[[*K], np.ndarray]) -> Callable[[*K], np.ndarray]:
    """Wraps `make` to cache its last result.

    For results that need the whole array however small the requested block is. Concurrent callers
    wait, so only one result is computed at a time.
    """
    last: dict[Any, np.ndarray] = {}
    making = threading.Lock()

    def kept(*key: *K) -> np.ndarray:
        with making:
            if key not in last:
                last.clear()
                last[key] = make(*key)
            return last[key]

    return kept


def is_whole(index: Index, shape: tuple[int, ...]) -> bool:
    """True if the index covers an array of this shape."""
    return all(each.stop - each.start == size for each, size in zip(index, shape, strict=True))


def prefetched(array: LazyArray, indices: Iterable[Index]) -> Iterator[np.ndarray]:
    """Yields the values at each index in turn; a thread computes the next while one is used.

    Blocks larger than BLOCK_BYTES are not prefetched.
    """
    indices = list(indices)
    first = math.prod(each.stop - each.start for each in indices[0]) if indices else 0
    if first * array.dtype.itemsize > BLOCK_BYTES:
        yield from (array[index] for index in indices)
        return
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for index in indices:
            coming, before = pool.submit(array.__getitem__, index), coming
            if before is not None:
                yield before.result()
        if coming is not None:
            yield coming.result()
