"""Arrays in Orbax checkpoints: written in Orbax's format, read as lazy arrays (lazy.py).

Orbax reads and writes many arrays at once in one asyncio loop and closes the loop at the first
failure. In-flight reads and writes of TensorStore's threads then call back into a closed loop,
which prints tracebacks and has crashed the process. So this module uses Orbax's extension point for
leaf types, `TypeHandler`, with blocking reads and writes: a failure is raised only after all of
them have ended. Files and metadata are Orbax's own.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax import nnx

from finermoe_jax.errors import InputError, first_line
from finermoe_jax.runtime.buckets import Place, is_outage, is_url
from finermoe_jax.weights import lazy
from finermoe_jax.weights.lazy import Index, LazyArray, ParamPath, Weights

# Concurrent writes: of computed blocks, which bounds memory, and of arrays in memory.
_COMPUTED_AT_A_TIME, _IN_MEMORY_AT_A_TIME = 4, 32
# Of requests to a bucket: 47 s in all.
_RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "16s"}


@contextlib.contextmanager
def save_errors() -> Iterator[list[Exception]]:
    """Collects the errors that Orbax's threads log, instead of printing their tracebacks.

    Orbax raises an error of a background save only at its next call or, with several processes, at
    a barrier's timeout. It logs the error immediately.
    """
    found: list[Exception] = []

    def listen(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        arguments = record.args if isinstance(record.args, tuple) else ()
        error = error or next(
            (each for each in arguments if isinstance(each, Exception) and is_outage(each)), None
        )
        if record.levelno < logging.ERROR or not isinstance(error, Exception):
            return True
        found.append(error)
        return False

    logger = logging.getLogger("absl")
    logger.addFilter(listen)
    try:
        yield found
    finally:
        logger.removeFilter(listen)


class _Parts(NamedTuple):
    """This process's parts of an array: their shape, and a function per part's index."""

    shape: tuple[int, ...]
    values: dict[Index, Callable[[], np.ndarray]]


class ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Writes jax.Arrays, and LazyArrays block by block; restores both as LazyArrays."""

    def __init__(self, written: Callable[[int], None] = lambda size: None):
        """Calls written(bytes) after each part."""
        super().__init__()
        self.written = written
        self.commits: list[ocp.future.Future] = []

    def typestr(self) -> str:
        """Returns the recorded type: other readers get a NumPy array by default."""
        return "np.ndarray"

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        """Returns the stored shapes and dtypes."""
        return [
            ocp.metadata.ArrayMetadata(
                name=info.name,
                directory=info.parent_dir,
                shape=tuple(store.shape),
                sharding=None,
                dtype=store.dtype.numpy_dtype,
            )
            for info, store in zip(infos, _open(infos), strict=True)
        ]

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Any = None
    ) -> Sequence[ocp.future.Future]:
        """Copies jax.Arrays to the host, then starts a thread that writes all leaves."""
        args = args or [ocp.SaveArgs()] * len(values)
        made = isinstance(values[0], LazyArray)
        parts = [_blocks(value) for value in values] if made else _on_host(values)

        async def write() -> None:
            for info in infos:
                await info.await_path_creation()
            stores = _settled(
                _create(value, info, part.shape, arg)
                for value, info, part, arg in zip(values, infos, parts, args, strict=True)
            )
            _in_threads(
                (
                    functools.partial(self._write, store, place, make)
                    for store, part in zip(stores, parts, strict=True)
                    for place, make in part.values.items()
                ),
                _COMPUTED_AT_A_TIME if made else _IN_MEMORY_AT_A_TIME,
            )

        self.commits.append(
            ocp.future.CommitFutureAwaitingContractedSignals(write(), name="arrays")
        )
        return self.commits[-1:]

    def _write(
        self, store: tensorstore.TensorStore, place: Index, make: Callable[[], np.ndarray]
    ) -> None:
        values = make()
        store[place].write(values, can_reference_source_data_indefinitely=True).result()
        self.written(values.nbytes)

    def settle(self) -> None:
        """Blocks until every write has succeeded or failed.

        Orbax raises the first failure of a save while it still writes other items.
        """
        while self.commits:
            with contextlib.suppress(Exception):
                self.commits.pop().result()

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[LazyArray]:
        """Returns the stored arrays lazily."""
        return [
            _stored(store, f"{info.parent_dir}: {info.name}")
            for info, store in zip(infos, _open(infos), strict=True)
        ]


def _blocks(array: LazyArray) -> _Parts:
    block = lazy.block_shape(array)
    places = lazy.blocks(array.shape, block)
    return _Parts(block, {place: functools.partial(array.__getitem__, place) for place in places})


def _on_host(arrays: Sequence[jax.Array]) -> list[_Parts]:
    """Copies this process's share of the arrays; returns once training may overwrite them.

    One replica of each shard is written. Replicas alternate by array, so processes with the same
    shards share the work.
    """

    def own(array: jax.Array, number: int) -> list[jax.Shard]:
        places = array.sharding.devices_indices_map(array.shape).values()
        turn = number % (len(places) // len(set(places)))
        return [shard for shard in array.addressable_shards if shard.replica_id == turn]

    shards = [own(array, number) for number, array in enumerate(arrays)]
    for shard in itertools.chain(*shards):
        shard.data.copy_to_host_async()
    return [
        _Parts(
            array.sharding.shard_shape(array.shape),
            {shard.index: functools.partial(np.asarray, np.asarray(shard.data)) for shard in those},
        )
        for array, those in zip(arrays, shards, strict=True)
    ]


def _create(
    value: LazyArray | jax.Array, info: Any, part: tuple[int, ...], args: ocp.SaveArgs
) -> tensorstore.Future:
    if isinstance(value, LazyArray):
        # Weights hardly compress, and trying costs more time than the disk.
        info = info.replace(use_compression=False)
    spec = ocp.type_handlers.get_json_tspec_write(
        info,
        arg=args,
        use_ocdbt=True,
        global_shape=value.shape,
        local_shape=part,
        dtype=value.dtype,
        process_index=jax.process_index(),
    )
    # One process writes shape and dtype; Orbax merges the files of all.
    first = jax.process_index() == 0
    return tensorstore.open(
        tensorstore.Spec(spec),
        open=True,
        create=first,
        assume_metadata=not first,
        context=_context(info),
    )


def _context(info: Any) -> tensorstore.Context:
    """Returns Orbax's context; for a bucket with fewer retries, whose default takes 15 minutes."""
    if not is_url(info.parent_dir):
        return info.ts_context
    return tensorstore.Context({"gcs_request_retries": _RETRIES}, info.ts_context)


def _open(infos: Sequence[Any]) -> list[tensorstore.TensorStore]:
    read = ocp.type_handlers.get_json_tspec_read
    specs = [tensorstore.Spec(read(i, use_ocdbt=i.is_ocdbt_checkpoint)) for i in infos]
    return _settled(
        tensorstore.open(spec, open=True, context=_context(info))
        for spec, info in zip(specs, infos, strict=True)
    )


def _settled(futures: Iterable[tensorstore.Future]) -> list[Any]:
    """Returns the results of all futures; raises the first error once all have ended."""
    futures = list(futures)
    for future in futures:
        future.exception()
    return [future.result() for future in futures]


def _in_threads(calls: Iterable[Callable[[], None]], at_a_time: int) -> None:
    """Makes the calls. After an error no more start; raises it once the started ones have ended."""
    with ThreadPoolExecutor(at_a_time) as pool:
        futures = [pool.submit(call) for call in calls]
        wait(futures, return_when=FIRST_EXCEPTION)
        pool.shutdown(cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


def _stored(store: tensorstore.TensorStore, name: str) -> LazyArray:
    def read(index: Index) -> np.ndarray:
        try:
            return store[index].read().result()
        except (ValueError, OSError) as error:
            raise InputError(f"{name} is damaged or cannot be read: {first_line(error)}") from None

    return LazyArray(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), read)


def handler(arrays: ArrayHandler | None = None) -> ocp.PyTreeCheckpointHandler:
    """Returns an Orbax handler for a tree of jax.Arrays or LazyArrays."""
    arrays = arrays or ArrayHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, arrays), (jax.Array, arrays)
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _opened(directory: Place, target: Any) -> Any:
    """Opens an item's arrays lazily, as a tree like `target`, whose leaves have shapes.

    Raises Orbax's errors for missing names, and ValueError for other shapes.
    """

    def restore() -> Any:
        lazily = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=LazyArray), target)
        return handler().restore(
            epath.Path(directory), args=ocp.args.PyTreeRestore(target, restore_args=lazily)
        )

    # Ctrl-C is raised in the main thread; Orbax's asyncio loop could lose it.
    with ThreadPoolExecutor(1) as pool:
        arrays = pool.submit(restore).result()
    leaves = jax.tree.leaves(arrays)
    for (path, wanted), array in zip(jax.tree.leaves_with_path(target), leaves, strict=True):
        if array.shape != wanted.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{name} is stored as {array.shape}, but the config implies {wanted.shape}"
            )
    return arrays


def read(directory: Place, shapes: Mapping[ParamPath, tuple[int, ...]]) -> Weights:
    """Returns the lazy weights in an item's directory. Raises as `restore` does."""
    leaves = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
    arrays = _opened(directory, nnx.traversals.unflatten_mapping(leaves))
    weights: Weights = nnx.traversals.flatten_mapping(arrays)
    return {path: weights[path] for path in shapes}


def restore(directory: Place, target: Any) -> Any:
    """Returns an item's arrays with the shapes, dtypes and shardings of `target`.

    Raises Orbax's errors for missing names, ValueError for other shapes, and InputError if values
    cannot be read.
    """

    def place(array: LazyArray, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        return lazy.place(dataclasses.replace(array, dtype=wanted.dtype), wanted.sharding)

    return jax.tree.map(place, _opened(directory, target), target)
