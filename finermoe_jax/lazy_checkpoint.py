"""Orbax checkpoints written from, and read as, lazy arrays (lazy.py).

Orbax wants whole arrays in memory. Its extension point for kinds of leaves, `TypeHandler`, lets a
leaf be written block by block instead, into the same files that it writes for a `jax.Array`: what
reads those needs to know nothing of this.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx

from finermoe_jax import lazy
from finermoe_jax.errors import InputError
from finermoe_jax.lazy import Index, LazyArray, ParamPath, Weights

# Blocks that are being made or written at a time.
_AT_A_TIME = 4


class LazyHandler(ocp.type_handlers.TypeHandler):
    """Writes a LazyArray block by block; restores as one whose blocks are read when indexed."""

    def __init__(self, written: Callable[[int], None]):
        """written(bytes) is told of each block."""
        self.written = written

    def typestr(self) -> str:
        """The name under which the leaf is recorded: other readers see an array."""
        return "np.ndarray"

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        """Shape and dtype as stored."""
        stores = [await _open(info) for info in infos]
        return [
            ocp.metadata.ArrayMetadata(
                name=info.name,
                directory=info.parent_dir,
                shape=tuple(store.shape),
                sharding=None,
                dtype=store.dtype.numpy_dtype,
            )
            for info, store in zip(infos, stores, strict=True)
        ]

    async def serialize(
        self, values: Sequence[LazyArray], infos: Sequence[Any], args: Any = None
    ) -> Sequence[ocp.future.Future]:
        """Starts writing all leaves, one after the other."""

        async def write() -> None:
            for value, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                await self._write(value, info)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="lazy arrays")]

    async def _write(self, array: LazyArray, info: Any) -> None:
        block = lazy.block_shape(array)
        # Weights hardly compress, and the attempt would cost more than the disk.
        spec = ocp.type_handlers.get_json_tspec_write(
            info.replace(use_compression=False),
            use_ocdbt=True,
            global_shape=array.shape,
            local_shape=block,
            dtype=array.dtype,
            process_index=0,
        )
        store = await tensorstore.open(
            tensorstore.Spec(spec), create=True, open=True, context=info.ts_context
        )
        room = asyncio.Semaphore(_AT_A_TIME)

        async def one(index: Index) -> None:
            async with room:
                values = await asyncio.to_thread(array.__getitem__, index)
                await store[index].write(values, can_reference_source_data_indefinitely=True)
                self.written(values.nbytes)

        tasks = [asyncio.create_task(one(i)) for i in lazy.blocks(array.shape, block)]
        try:
            await asyncio.gather(*tasks)
        finally:  # where one failed the others are no longer wanted, but seen to their end
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[LazyArray]:
        """The arrays as stored, not read yet."""
        return [_stored(await _open(info), f"{info.parent_dir}: {info.name}") for info in infos]


async def _open(info: Any) -> tensorstore.TensorStore:
    spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
    return await tensorstore.open(tensorstore.Spec(spec), open=True, context=info.ts_context)


def _stored(store: tensorstore.TensorStore, name: str) -> LazyArray:
    def read(index: Index) -> np.ndarray:
        try:
            return store[index].read().result()
        except (ValueError, OSError) as error:
            first = str(error).splitlines()[0].partition(" [tensorstore_spec")[0]
            raise InputError(f"{name} is damaged or cannot be read: {first}") from None

    return LazyArray(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), read)


def handler(written: Callable[[int], None] = lambda size: None) -> ocp.PyTreeCheckpointHandler:
    """An Orbax handler for a pure dict of LazyArrays."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, LazyHandler(written)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # Orbax warns where there is none
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def read(directory: Path, shapes: dict[ParamPath, tuple[int, ...]]) -> Weights:
    """The arrays of an item's directory, not read yet.

    Raises whatever Orbax does for names that are not there, and ValueError for other shapes.
    """
    target = nnx.traversals.unflatten_mapping(dict.fromkeys(shapes, 0))
    lazily = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=LazyArray), target)
    with ocp.Checkpointer(handler()) as checkpointer:
        arrays = checkpointer.restore(
            directory, args=ocp.args.PyTreeRestore(target, restore_args=lazily)
        )
    weights: Weights = nnx.traversals.flatten_mapping(arrays)
    for path, shape in shapes.items():
        if weights[path].shape != shape:
            name = "/".join(map(str, path))
            raise ValueError(f"{name} is stored as {weights[path].shape}, the config says {shape}")
    return {path: weights[path] for path in shapes}
