"""Arrays that are read, or made, only where they are indexed.

A model's weights as `Weights` have their shapes and dtypes at once and their values block by block:
from safetensors (hf_weights.py), from a checkpoint (orbax_files.py), from a dense model that is
being upcycled (upcycle.py), or from memory. Code that writes or places them asks for blocks, so no
host ever holds more of a model than a few blocks.
"""

import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from finermoe_jax.errors import InputError

# One slice, with start, stop and step 1, per axis.
Index = tuple[slice, ...]
# A parameter's path in the decoder, e.g. ("runs", 0, 0, "moe", "gate_up").
ParamPath = tuple[Any, ...]
# Bytes that one block of a parameter may have.
BLOCK_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """Shape and dtype now, values when indexed with slices of step 1.

    `read` gets one slice per axis, bounds spelled out, and returns a NumPy array of that shape.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        """The values there, in `dtype`; axes that the index leaves out are taken whole."""
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (len(self.shape) - len(index))
        bounds = [each.indices(size) for each, size in zip(index, self.shape, strict=True)]
        assert all(step == 1 for _, _, step in bounds), index
        whole = tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)
        return converted(np.asarray(self.read(whole)), self.dtype, "the weights' array")

    def row(self, place: int) -> "LazyArray":
        """The array at one place of the first axis."""
        one = slice(place, place + 1)
        return LazyArray(self.shape[1:], self.dtype, lambda index: self[one, *index][0])

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize


def converted(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The values in another dtype. Raises InputError, naming one, where they would not fit."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = values.astype(dtype)
    if jnp.finfo(dtype).max < jnp.finfo(values.dtype).max:
        _refuse_infinite(values, wanted, f"{name} holds")
    return wanted


def scaled(values: np.ndarray, factor: int) -> np.ndarray:
    """The values times a number, in their dtype. Raises InputError where one would not fit."""
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
            f"{what} {values[lost][0]}, and the largest {wanted.dtype}, as which it is to be "
            f"stored, is {jnp.finfo(wanted.dtype).max}; ask for another dtype"
        )


Weights = dict[ParamPath, LazyArray]


def stacked(
    shape: tuple[int, ...], dtype: DTypeLike, axes: int, read: Callable[..., np.ndarray]
) -> LazyArray:
    """An array made of read(place on each of the first `axes` axes, index of the others)."""

    def values(index: Index) -> np.ndarray:
        outer, inner = index[:axes], index[axes:]
        places = list(itertools.product(*(range(each.start, each.stop) for each in outer)))
        if len(places) == 1:  # as most blocks are: no copy
            return read(*places[0], inner)[(np.newaxis,) * axes]
        found = np.stack([read(*place, inner) for place in places])
        return found.reshape(*(each.stop - each.start for each in outer), *found.shape[1:])

    return LazyArray(shape, np.dtype(dtype), values)


def of_array(array: Any) -> LazyArray:
    """Wraps an array that is in memory already."""
    values = np.asarray(array)
    return LazyArray(values.shape, values.dtype, lambda index: values[index])


def of_params(params: dict) -> Weights:
    """A decoder's parameters (a pure dict of arrays)."""
    flat = nnx.traversals.flatten_mapping(params)
    return {path: of_array(array) for path, array in flat.items()}


def cast(weights: Weights, dtype: DTypeLike | None) -> Weights:
    """The same values in another dtype, cast block by block; None changes nothing."""
    if dtype is None:
        return weights
    wanted = jnp.dtype(dtype)
    return {path: dataclasses.replace(array, dtype=wanted) for path, array in weights.items()}


def in_memory(weights: Weights) -> dict:
    """The decoder's parameters as a pure dict of arrays on the default device, each its own."""
    return nnx.traversals.unflatten_mapping(
        {path: jnp.array(array[:]) for path, array in weights.items()}
    )


def placed(weights: Weights, shardings: dict) -> dict:
    """The decoder's parameters over devices. `shardings` is a pure dict like the parameters'."""
    flat = nnx.traversals.flatten_mapping(shardings)
    return nnx.traversals.unflatten_mapping(
        {path: place(array, flat[path]) for path, array in weights.items()}
    )


def place(array: LazyArray, sharding: jax.sharding.Sharding) -> jax.Array:
    """The array over devices. Each process reads, part by part, what its own devices hold."""
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
    """A block of whole minor axes with at most BLOCK_BYTES.

    Stacked experts come as some experts of one layer, a table as some of its rows.
    """
    block = [1] * len(array.shape)
    size = array.dtype.itemsize
    for axis in reversed(range(len(array.shape))):
        whole = array.shape[axis]
        fits = min(whole, max(1, BLOCK_BYTES // size))
        # Equal blocks where that costs little: a mesh that splits the axis then splits few of them.
        equal = max(n for n in range(1, fits + 1) if whole % n == 0)
        block[axis] = equal if 4 * equal >= fits else fits
        size *= block[axis]
        if block[axis] < whole:
            break
    return tuple(block)


def blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> Iterator[Index]:
    """The places of all blocks of an array, the last axis fastest."""
    starts = (range(0, size, step) for size, step in zip(shape, block, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + step, size))
            for start, step, size in zip(corner, block, shape, strict=True)
        )


def last_kept[*K](make: Callable[[*K], np.ndarray]) -> Callable[[*K], np.ndarray]:
    """`make`, whose last result is kept.

    For results that need the whole array, however small the requested block. Threads that ask in
    the meantime wait, so only one result is made at a time.
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
    """Returns whether the index takes all of an array of this shape."""
    return all(each.stop - each.start == size for each, size in zip(index, shape, strict=True))


def made_ahead(array: LazyArray, indices: Iterable[Index]) -> Iterator[np.ndarray]:
    """The values at each index in turn; while one is used, a thread makes the next.

    Nothing is made ahead where one alone has more than BLOCK_BYTES.
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
