"""Orbax checkpoints. A checkpoint directory is self-contained:

    config/         the model's architecture, dtypes and origin, JSON
    params/         the weights, in the decoder's own layout
    tokenizer/      the tokenizer files
    optimizer/      Optax's state, in training checkpoints only
    metrics/        the held-out loss, in training checkpoints that are ranked by it
    checksums.json  size and hash of every file (integrity.py)

Orbax writes into a temporary directory, which is renamed when everything, checksums included, is on
disk. So a checkpoint exists completely or not at all, even after a power cut. In a bucket Orbax
writes in place, and commit_success.txt, written last, makes it a checkpoint.
"""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from finermoe_jax.config.arguments import check_path
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.parse import from_dict
from finermoe_jax.data.tokenizers import check_kept, kept_files, write_files
from finermoe_jax.errors import InputError, first_line
from finermoe_jax.layers import sharding
from finermoe_jax.model.decoder import (
    Decoder,
    parameter_kinds,
    parameter_shapes,
    with_params,
    with_shapes,
)
from finermoe_jax.model.offload import check_place, host_arguments
from finermoe_jax.runtime.buckets import BucketPath, Place, place
from finermoe_jax.runtime.files import commit
from finermoe_jax.runtime.json_files import read_json
from finermoe_jax.weights import integrity, lazy, orbax_files
from finermoe_jax.weights.hf_weights import to_save
from finermoe_jax.weights.lazy import Weights
from finermoe_jax.weights.model_card import UNKNOWN, Origin
from finermoe_jax.weights.orbax_files import save_errors
from finermoe_jax.weights.targets import new_target

CONFIG, PARAMS, TOKENIZER, OPTIMIZER = "config", "params", "tokenizer", "optimizer"
NOT_READ = (OPTIMIZER, "metrics")  # items not needed to load the model
_PARTIAL = ocp.path.atomicity.TMP_DIR_SUFFIX
# System errors in tensorstore's words; they do not imply damage.
_UNREADABLE = [
    os.strerror(number)
    for number in (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE)
]


class TokenizerHandler(ocp.AsyncCheckpointHandler):
    """An Orbax item that holds the tokenizer's files."""

    async def async_save(
        self, directory: epath.Path, args: "TokenizerSave"
    ) -> list[ocp.future.Future]:
        """Starts `save` in a thread. Raising here would leave other items' coroutines pending."""

        async def save() -> None:
            self.save(directory, args)

        return [ocp.future.CommitFutureAwaitingContractedSignals(save(), name="tokenizer")]

    def save(self, directory: epath.Path, args: "TokenizerSave") -> None:
        """Writes the files (`kept_files`), on the first process only."""
        if jax.process_index() == 0 and args.source is not None:
            write_files(kept_files(args.source), place(directory))

    def restore(self, directory: epath.Path, args: "TokenizerSave") -> Place:
        """Returns the directory; its files are read in place."""
        return place(directory)


@ocp.args.register_with_handler(TokenizerHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class TokenizerSave(ocp.args.CheckpointArgs):
    """Directory whose tokenizer files are saved; None saves none."""

    source: Path | None


def described(
    config: ModelConfig, dtype: DTypeLike, param_dtype: DTypeLike, origin: Origin
) -> dict[str, Any]:
    """Returns the content of config/; dtype is that of the activations."""
    return {
        "format": "finermoe-jax 1",
        "model": dataclasses.asdict(config),
        "dtype": str(dtype),
        "param_dtype": str(param_dtype),
        "checksums": True,
    } | ({} if origin == UNKNOWN else {"origin": dataclasses.asdict(origin)})


def registry(arrays: orbax_files.ArrayHandler) -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """Returns the Orbax handlers that save a checkpoint's items; `arrays` writes the arrays."""
    found = ocp.handlers.DefaultCheckpointHandlerRegistry()
    found.add(CONFIG, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    found.add(PARAMS, ocp.args.PyTreeSave, orbax_files.handler(arrays))
    found.add(TOKENIZER, TokenizerSave, TokenizerHandler())
    found.add(OPTIMIZER, ocp.args.PyTreeSave, orbax_files.handler(arrays))
    return found


def write_checkpoint(
    config: ModelConfig,
    dtype: DTypeLike,
    weights: Weights,
    target: Place,
    tokenizer: Path | None,
    written: Callable[[int], None] = lambda size: None,
    origin: Origin = UNKNOWN,
    before_last: Callable[[], None] = lambda: None,
) -> None:
    """Writes weights block by block as an Orbax checkpoint at `target`, which must not exist.

    dtype is that of the activations. written(bytes) is called for each block of weights,
    before_last() before the mark that completes a checkpoint in a bucket. `origin` is stored for
    the model card of a later export.

    Raises InputError, before anything is written, if the saved tokenizer would behave differently
    (`check_kept`).
    """
    if tokenizer is not None:
        check_kept(tokenizer)
    items = ocp.args.Composite(
        **{
            CONFIG: ocp.args.JsonSave(
                described(config, dtype, weights["embed", "weight"].dtype, origin)
            ),
            PARAMS: ocp.args.PyTreeSave(nnx.traversals.unflatten_mapping(weights)),
            TOKENIZER: TokenizerSave(tokenizer),
        }
    )
    arrays = orbax_files.ArrayHandler(written)
    with save_errors(), contextlib.ExitStack() as hashing:
        kind: type[ocp.path.atomicity.TemporaryPathBase]
        if isinstance(target, BucketPath):
            kind = committing(target.parent, before_last, lambda name: None)
        else:
            partial = target.with_name(f"{target.name}{_PARTIAL}")  # where Orbax writes it
            kind = durable(hashing.enter_context(integrity.hash_while_written(partial)))
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(async_options=ASYNC),
            handler_registry=registry(arrays),
        )
        with ocp.AsyncCheckpointer(
            handler, async_options=ASYNC, temporary_path_class=kind
        ) as checkpointer:
            try:
                checkpointer.save(epath.Path(target), args=items)
                checkpointer.wait_until_finished()
            finally:
                arrays.settle()


def save_checkpoint(
    model: Decoder, path: str | os.PathLike, tokenizer: str | os.PathLike | None = None
) -> None:
    """Writes the model as an Orbax checkpoint.

    Args:
      model: the decoder to save.
      path: a new or empty directory, or gs://…. It is a checkpoint only when complete.
      tokenizer: a directory whose tokenizer files are copied into the checkpoint.

    Raises:
      InputError: `path` is not empty, the weights are int8, or the tokenizer's files cannot be
        copied.

    Examples:
      >>> import finermoe_jax as fm
      >>> model = fm.load_hf("finermoe_jax/demo/model")
      >>> fm.save_checkpoint(model, "demo_orbax", tokenizer="finermoe_jax/demo/model")
    """
    weights, files = to_save(model, path, tokenizer)
    with new_target(path) as new:
        write_checkpoint(
            model.config, model.dtype, weights, new.path, files, before_last=new.confirm
        )


# If a thread fails to create the directories, Orbax's writers wait for minutes.
ASYNC = ocp.AsyncOptions(create_directories_asynchronously=False)


def durable(
    known: integrity.Known | None = None,
) -> type[ocp.path.atomicity.AtomicRenameTemporaryPath]:
    """Returns Orbax's class of temporary directories, with checksums and fsync before the rename.

    `known` holds hashes that are known already. Orbax finalizes in a thread of the first process
    when all processes have written, and removes older checkpoints afterwards.
    """

    class Durable(ocp.path.atomicity.AtomicRenameTemporaryPath):
        _final_path: epath.Path

        async def finalize(self) -> None:
            final = Path(self._final_path)
            if _PARTIAL in final.parent.name:  # an item; synced with its checkpoint
                return await super().finalize()
            # Orbax's finalize writes two more files, so it must not rename to the final name yet.
            whole = final.with_name(f"{final.name}{_PARTIAL}.whole")
            self._final_path = epath.Path(whole)
            try:
                await super().finalize()
            finally:
                self._final_path = epath.Path(final)
            integrity.write_checksums(whole, known)
            commit(whole, final)

    return Durable


def committing(
    parent: BucketPath, before: Callable[[], None], after: Callable[[str], None]
) -> type[ocp.path.atomicity.CommitFileTemporaryPath]:
    """Returns Orbax's class of checkpoints in a bucket, with checksums before the commit mark.

    `parent` is the checkpoints' common prefix. `before` is called between the checksums and the
    mark; if it raises, nothing is committed. `after` is called with the committed checkpoint's
    name. Orbax finalizes as for `durable`.
    """

    class Committing(ocp.path.atomicity.CommitFileTemporaryPath):
        _final_path: epath.Path

        async def finalize(self) -> None:
            checkpoint = parent / self._final_path.name
            if str(self._final_path) != str(checkpoint):  # an item
                return await super().finalize()
            integrity.write_checksums(checkpoint)
            before()
            await super().finalize()
            after(checkpoint.name)

    return Committing


def newest_checkpoint(steps: Place) -> Place | None:
    """Returns the newest complete step in a directory of numbered checkpoints, or None."""
    numbers = integrity.saved_steps(steps)
    return steps / str(numbers[-1]) if numbers else None


def whole_checkpoint(path: Place, skip: tuple[str, ...]) -> Place:
    """Returns `path` if it is a checkpoint, or the newest intact step of a training workdir.

    Items in `skip` are not checked. Raises InputError if there is none.
    """
    if (path / PARAMS).is_dir() and (path / CONFIG).is_dir():
        found = integrity.damage(path, skip)
        if not path.is_dir():
            raise _removed(path)
        if found:
            raise InputError(
                f"checkpoint {path} is damaged: {'; '.join(found[:3])}. Use another one, or "
                "create it again"
            )
        if path.parent.name == "checkpoints" and path.name.isdecimal():
            integrity.refuse_renamed(path)
        return path
    steps = steps_of(path)
    newest = integrity.newest_whole(steps, skip)
    if newest is None and newest_checkpoint(steps) is not None:
        raise InputError(f"{steps} has no intact checkpoint")
    if newest is None:
        raise InputError(
            f"{path} is neither a checkpoint ({PARAMS}/ and {CONFIG}/), nor a training workdir "
            "with checkpoints/, nor a Hugging Face directory with config.json"
        )
    return newest


def steps_of(path: Place) -> Place:
    """Returns a workdir's directory of numbered checkpoints, or `path` if it is not a workdir."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def _removed(checkpoint: Place) -> InputError:
    return InputError(
        f"{checkpoint} was removed while it was read. A running training keeps only its newest "
        f"checkpoints: pass {checkpoint.parent} to read the newest one"
    )


def read_description(checkpoint: Place) -> tuple[ModelConfig, str, str]:
    """Returns a checkpoint's architecture, activation dtype and weight dtype."""
    path = checkpoint / CONFIG / "metadata"
    values = read_json(path)
    model = values.get("model") or {}
    if not isinstance(model, dict):
        raise InputError(f"{path}: model={model!r} must be an object")
    config = from_dict(ModelConfig, model, f"{path}: model")
    dtype, param_dtype = values.get("dtype"), values.get("param_dtype")
    for name in (dtype, param_dtype):
        if name not in ("float32", "bfloat16", "float16"):
            raise InputError(f"{path}: {dtype=} and {param_dtype=} must both name a float type")
    return config, str(dtype), str(param_dtype)


def read_stored_origin(checkpoint: Place) -> Origin:
    """Returns where a checkpoint's weights come from, as far as it states that."""
    path = checkpoint / CONFIG / "metadata"
    origin = read_json(path).get("origin") or {}
    if not isinstance(origin, dict):
        raise InputError(f"{path}: origin={origin!r} must be an object")
    return from_dict(Origin, origin, f"{path}: origin")


def abstract_params(config: ModelConfig, dtype: DTypeLike, shardings: dict | None = None) -> dict:
    """Returns shapes, dtypes and shardings (default: one device) of the decoder's parameters.

    dtype is that of the weights; model state keeps its own (Kind.stored_as).
    """
    shapes = nnx.to_pure_dict(nnx.state(with_shapes(config)))
    kinds = parameter_kinds(config)
    if shardings is None:
        single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: single, shapes)

    def abstract(path: tuple, leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        stored = kinds[tuple(key.key for key in path)].stored_as(dtype)
        return jax.ShapeDtypeStruct(leaf.shape, stored, sharding=sharding)

    return jax.tree_util.tree_map_with_path(abstract, shapes, shardings)


@contextlib.contextmanager
def readable(checkpoint: Place) -> Iterator[None]:
    """Converts Orbax's errors, which depend on the kind of damage, to InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise InputError(
                f"the weights of {checkpoint} do not fit the memory of this machine or its devices:"
                " shard them over more devices with a mesh, or use a smaller model"
            ) from None
        if not checkpoint.exists():
            raise _removed(checkpoint) from None
        if any(reason in str(error) for reason in _UNREADABLE):
            raise integrity.unreadable(checkpoint, first_line(error)) from None
        raise InputError(
            f"checkpoint {checkpoint} is damaged or incomplete: {first_line(error)}"
        ) from None


def load_checkpoint(
    path: str | os.PathLike, mesh: Mesh | None = None, *, experts: str = "device"
) -> Decoder:
    """Loads a model from a finermoe Orbax checkpoint.

    Args:
      path: a checkpoint, or a training workdir (its newest step); local or gs://.
      mesh: shards the weights over these devices; each reads only its own part
        (`layers.sharding`). None: all weights go to one device.
      experts: "device", "host" or "host_compute": the memory of the experts, as in `generate`.

    Returns:
      The model, with the dtypes it was saved with.

    Raises:
      InputError: there is no checkpoint at `path`, or it is damaged, or the experts cannot be
        placed so.

    Examples:
      >>> import finermoe_jax as fm
      >>> fm.save_checkpoint(fm.load_hf("finermoe_jax/demo/model"), "demo_saved")
      >>> fm.load_checkpoint("demo_saved").config.num_hidden_layers
      4
    """
    check_path("path", path)
    where = place(path).absolute()

    def load() -> Decoder:
        directory = whole_checkpoint(where, (*NOT_READ, TOKENIZER))
        config, weights, dtype, param_dtype = open_checkpoint(directory)
        with readable(directory):
            weights = lazy.cast(weights, param_dtype, parameter_kinds(config))
            return assembled(config, weights, dtype, mesh, experts)

    return integrity.in_training(steps_of(where), load)


def open_checkpoint(directory: Place) -> tuple[ModelConfig, Weights, str, str]:
    """Returns architecture, lazy weights, activation dtype and weight dtype of a checkpoint.

    `directory` is the checkpoint itself (`whole_checkpoint`). Raises InputError if it is damaged.
    """
    config, dtype, param_dtype = read_description(directory)
    with readable(directory):
        weights = orbax_files.read(directory / PARAMS, parameter_shapes(config))
    return config, weights, dtype, param_dtype


def assembled(
    config: ModelConfig, weights: Weights, dtype: DTypeLike, mesh: Mesh | None, experts: str
) -> Decoder:
    """Returns the model with its weights on one device or sharded over the mesh.

    experts as in `load_checkpoint`. Raises InputError if they cannot be placed so.
    """
    check_place(experts, config, mesh)
    if mesh is None or experts != "device":
        params = lazy.in_memory(weights, *host_arguments(config, experts))
    else:
        shardings, _ = sharding.param_shardings(with_shapes(config), mesh)
        params = lazy.placed(weights, shardings)
    model = with_params(config, params, dtype=dtype)
    model.placement = sharding.Placement(mesh)
    return model
