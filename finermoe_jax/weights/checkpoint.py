"""Checkpoints through Orbax. A checkpoint directory needs nothing beside it:

    config/         the model's architecture and dtypes, JSON
    params/         the weights, in the decoder's own layout
    tokenizer/      the tokenizer files
    optimizer/      Optax's state, in training checkpoints only
    metrics/        the held-out loss, in training checkpoints that are ranked by it
    checksums.json  size and hash of every file (integrity.py)

Orbax writes into a temporary directory and renames it when all of it is on the disk, its checksums
included: a checkpoint is there whole or not at all, after a power cut, too.
"""

import contextlib
import dataclasses
import errno
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from finermoe_jax.config.arguments import check_path
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.run import from_dict
from finermoe_jax.data.tokenizers import check_kept, end_tokens, load_tokenizer
from finermoe_jax.errors import InputError
from finermoe_jax.layers import cpu, sharding
from finermoe_jax.model.decoder import (
    Decoder,
    parameter_kinds,
    parameter_shapes,
    with_params,
    with_shapes,
)
from finermoe_jax.runtime.directories import new_directory
from finermoe_jax.runtime.files import State, commit, state
from finermoe_jax.runtime.json_files import read_json
from finermoe_jax.runtime.paths import local
from finermoe_jax.weights import lazy
from finermoe_jax.weights import orbax_files as lazy_checkpoint
from finermoe_jax.weights.disk import Disk, failures
from finermoe_jax.weights.hf_weights import (
    check_saving,
    copy_tokenizer,
    open_hf,
    resolve_source,
    stored_dtypes,
)
from finermoe_jax.weights.integrity import (
    TRIES,
    Known,
    damage,
    hashed_along,
    in_training,
    newest_whole,
    refuse_renamed,
    saved_steps,
    unreadable,
    write_checksums,
)
from finermoe_jax.weights.lazy import Weights

_CONFIG, _PARAMS, _TOKENIZER, _OPTIMIZER = "config", "params", "tokenizer", "optimizer"
_NOT_READ = (_OPTIMIZER, "metrics")  # by those who want the model alone
_PARTIAL = ocp.path.atomicity.TMP_DIR_SUFFIX
# Errors of the system, as tensorstore words them, that say nothing about what is stored.
_UNREADABLE = [
    os.strerror(number)
    for number in (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE)
]


class TokenizerHandler(ocp.AsyncCheckpointHandler):
    """An Orbax item that holds the tokenizer's files."""

    async def async_save(
        self, directory: epath.Path, args: "TokenizerSave"
    ) -> list[ocp.future.Future]:
        """Starts `save` in a thread. An error here would leave other items' coroutines behind."""

        async def save() -> None:
            self.save(directory, args)

        return [ocp.future.CommitFutureAwaitingContractedSignals(save(), name="tokenizer")]

    def save(self, directory: epath.Path, args: "TokenizerSave") -> None:
        """Writes the files (`copy_tokenizer`); the first process alone."""
        if jax.process_index() == 0 and args.source is not None:
            copy_tokenizer(args.source, Path(directory))

    def restore(self, directory: epath.Path, args: "TokenizerRestore") -> Path:
        """The directory that holds them."""
        return Path(directory)


@ocp.args.register_with_handler(TokenizerHandler, for_save=True)
@dataclasses.dataclass
class TokenizerSave(ocp.args.CheckpointArgs):
    """The directory whose tokenizer files are saved; None saves none."""

    source: Path | None


@ocp.args.register_with_handler(TokenizerHandler, for_restore=True)
@dataclasses.dataclass
class TokenizerRestore(ocp.args.CheckpointArgs):
    """Nothing to say: the files are used where they are."""


def _describe(config: ModelConfig, dtype: DTypeLike, param_dtype: DTypeLike) -> dict[str, Any]:
    return {
        "format": "finermoe-jax 1",
        "model": dataclasses.asdict(config),
        "dtype": str(dtype),
        "param_dtype": str(param_dtype),
        "checksums": True,
    }


def save_args(
    model: Decoder,
    params: dict,
    tokenizer: Path | None,
    optimizer: Any,
    described: dict[str, Any],
) -> ocp.args.Composite:
    """The items of a training checkpoint; `described` is put into config/ beside the model's."""

    kinds = parameter_kinds(model.config)

    def chunks(path: tuple, leaf: jax.Array) -> ocp.SaveArgs:
        # So that a reader of some experts need not hold, or decompress, all of a layer's. Orbax
        # cuts these axes to the last row whatever the size: that is one expert.
        bank = kinds[tuple(key.key for key in path)].bank
        outer = (0, 1) if bank and leaf.shape[0] * leaf.shape[1] > 1 else ()
        return ocp.SaveArgs(chunk_byte_size=lazy.BLOCK_BYTES, shard_axes=outer)

    args = jax.tree_util.tree_map_with_path(chunks, params)
    return ocp.args.Composite(
        **{
            _CONFIG: ocp.args.JsonSave(
                _describe(model.config, model.dtype, model.embed.weight.dtype) | described
            ),
            _PARAMS: ocp.args.PyTreeSave(params, save_args=args),
            _TOKENIZER: TokenizerSave(tokenizer),
            _OPTIMIZER: ocp.args.PyTreeSave(optimizer),
        }
    )


def write_checkpoint(
    config: ModelConfig,
    dtype: DTypeLike,
    weights: Weights,
    target: Path,
    tokenizer: Path | None,
    written: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes weights block by block as an Orbax checkpoint at `target`, which must not exist.

    dtype is the activations'; written(bytes) is told of each block of weights.

    Raises InputError, before anything is written, for a tokenizer that would not be the same one
    in the checkpoint (`check_kept`).
    """
    if tokenizer is not None:
        check_kept(tokenizer)
    items = ocp.args.Composite(
        **{
            _CONFIG: ocp.args.JsonSave(_describe(config, dtype, weights["embed", "weight"].dtype)),
            _PARAMS: ocp.args.PyTreeSave(nnx.traversals.unflatten_mapping(weights)),
            _TOKENIZER: TokenizerSave(tokenizer),
        }
    )
    arrays = lazy_checkpoint.ArrayHandler(written)
    with failures(), hashed_along(_partial(target)) as known:
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(async_options=_ASYNC),
            **{
                _CONFIG: ocp.JsonCheckpointHandler(),
                _PARAMS: lazy_checkpoint.handler(arrays),
                _TOKENIZER: TokenizerHandler(),
            },
        )
        with ocp.AsyncCheckpointer(
            handler, async_options=_ASYNC, temporary_path_class=_durable(known)
        ) as checkpointer:
            try:
                checkpointer.save(target, args=items)
                checkpointer.wait_until_finished()
            finally:
                arrays.settle()


def save_checkpoint(
    model: Decoder, path: str | os.PathLike, tokenizer: str | os.PathLike | None = None
) -> None:
    """Writes the model as an Orbax checkpoint at `path`, a new or empty directory.

    tokenizer is a directory whose tokenizer files the checkpoint takes along.

    Raises InputError when path is occupied, or the tokenizer cannot be kept.
    """
    check_saving(model, path, tokenizer)
    weights = lazy.of_params(nnx.to_pure_dict(nnx.state(model)))
    source = Path(local(tokenizer)) if tokenizer is not None else None
    with new_directory(path) as directory:
        write_checkpoint(model.config, model.dtype, weights, directory, source)


def _partial(target: Path) -> Path:
    """Where Orbax writes what is about to become `target`."""
    return target.with_name(f"{target.name}{_PARTIAL}")


# Orbax's writers wait minutes for directories that a thread was to make and could not.
_ASYNC = ocp.AsyncOptions(create_directories_asynchronously=False)


def _durable(known: Known | None = None) -> type[ocp.path.atomicity.AtomicRenameTemporaryPath]:
    """Orbax's class of temporary directories, with checksums and an fsync before the rename.

    `known` holds the checksums taken already. Orbax finalizes when all processes have written, in
    a thread of the first one, and removes older checkpoints after that.
    """

    class Durable(ocp.path.atomicity.AtomicRenameTemporaryPath):
        _final_path: epath.Path

        async def finalize(self) -> None:
            final = Path(self._final_path)
            if _PARTIAL in final.parent.name:  # an item in a checkpoint, which is synced with it
                return await super().finalize()
            # Orbax's own finalize writes two more files; what it renames is not there yet.
            whole = final.with_name(f"{final.name}{_PARTIAL}.whole")
            self._final_path = epath.Path(whole)
            try:
                await super().finalize()
            finally:
                self._final_path = epath.Path(final)
            write_checksums(whole, known)
            commit(whole, final)

    return Durable


def newest_checkpoint(steps: Path) -> Path | None:
    """The newest complete step of a directory of numbered checkpoints."""
    numbers = saved_steps(steps)
    return steps / str(numbers[-1]) if numbers else None


def _step_directory(path: Path, skip: tuple[str, ...]) -> Path:
    """The checkpoint itself: `path`, or a training workdir's newest step without damage.

    Items in `skip` are not looked at.
    """
    if (path / _PARAMS).is_dir() and (path / _CONFIG).is_dir():
        found = damage(path, skip)
        if not path.is_dir():
            raise _removed(path)
        if found:
            raise InputError(
                f"checkpoint {path} is damaged: {'; '.join(found[:3])}. Take another one, or make "
                "it anew"
            )
        if path.parent.name == "checkpoints" and path.name.isdecimal():
            refuse_renamed(path)
        return path
    steps = steps_of(path)
    newest = newest_whole(steps, skip)
    if newest is None and newest_checkpoint(steps) is not None:
        raise InputError(f"{steps} holds no checkpoint without damage")
    if newest is None:
        raise InputError(
            f"{path} is neither a checkpoint ({_PARAMS}/ and {_CONFIG}/), nor a training workdir "
            "with checkpoints/, nor a Hugging Face directory with config.json"
        )
    return newest


def steps_of(path: Path) -> Path:
    """The directory of the numbered checkpoints of a workdir; `path` itself if it is no workdir."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def _removed(checkpoint: Path) -> InputError:
    return InputError(
        f"{checkpoint} was removed while it was read. A run in training keeps its newest "
        f"checkpoints alone: give {checkpoint.parent} to read the newest one"
    )


def logged_bytes(checkpoint: Path) -> dict[str, int]:
    """Bytes of each log when the checkpoint was saved; empty for one from before this was kept."""
    logged = read_json(checkpoint / _CONFIG / "metadata").get("logged")
    return logged if isinstance(logged, dict) else {}


def read_description(checkpoint: Path) -> tuple[ModelConfig, str, str]:
    """Architecture, activation dtype and weight dtype of a checkpoint directory."""
    path = checkpoint / _CONFIG / "metadata"
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


def abstract_params(config: ModelConfig, dtype: DTypeLike, shardings: dict | None = None) -> dict:
    """Shapes, dtypes and (by default one device's) shardings of the decoder's parameters."""
    shapes = nnx.to_pure_dict(nnx.state(with_shapes(config)))
    if shardings is None:
        single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: single, shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, jnp.dtype(dtype), sharding=sharding
        ),
        shapes,
        shardings,
    )


@contextlib.contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    """Makes an InputError of what Orbax raises, which depends on what is broken."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise InputError(
                f"the weights of {checkpoint} do not fit the memory of this machine or its devices:"
                " spread them over more devices by a mesh, or take a smaller model"
            ) from None
        first = (str(error) or repr(error)).splitlines()[0].partition(" [tensorstore_spec")[0]
        if not checkpoint.exists():
            raise _removed(checkpoint) from None
        if any(reason in str(error) for reason in _UNREADABLE):
            raise unreadable(checkpoint, first) from None
        raise InputError(f"checkpoint {checkpoint} is damaged or incomplete: {first}") from None


def load_checkpoint(path: str | os.PathLike, mesh: Mesh | None = None) -> Decoder:
    """The model of an Orbax checkpoint of ours, or of a training workdir's newest step.

    With a mesh each device gets its part of every weight (layers/sharding.py), read for it
    alone; otherwise all are on one device.

    Raises InputError when there is none, or when it is damaged.
    """
    check_path("path", path)
    path = Path(local(path)).absolute()
    return in_training(steps_of(path), lambda: _load_checkpoint(path, mesh))


def _load_checkpoint(path: Path, mesh: Mesh | None) -> Decoder:
    directory = _step_directory(path, (*_NOT_READ, _TOKENIZER))
    config, dtype, param_dtype = read_description(directory)
    with _readable(directory):
        weights = lazy_checkpoint.read(directory / _PARAMS, parameter_shapes(config))
        return _in_memory(config, lazy.cast(weights, param_dtype), dtype, mesh)


def _in_memory(
    config: ModelConfig, weights: Weights, dtype: DTypeLike, mesh: Mesh | None
) -> Decoder:
    """The model with its weights on one device or, with a mesh, over all of its devices."""
    if mesh is None:
        params = lazy.in_memory(weights)
    else:
        shardings, _ = sharding.param_shardings(with_shapes(config), mesh)
        params = lazy.placed(weights, shardings)
    model = with_params(config, params, dtype=dtype)
    model.placement = sharding.Placement(mesh)
    return model


@dataclasses.dataclass(frozen=True)
class Source:
    """A model wherever it lies, not read yet.

    dtype is the activations', stored are the dtypes of the weights as they lie there; files is
    where its tokenizer is; states are those of the files that hold the weights and, of a
    checkpoint, the tokenizer.
    """

    config: ModelConfig
    weights: Weights
    dtype: jnp.dtype
    stored: list[str]
    files: Path
    states: dict[Path, State]

    def refuse_changed(self) -> None:
        """Raises InputError where a file is not what it was when the source was opened.

        For whoever has read for a long time: only blocks read before are known to be right.
        """
        for path, before in self.states.items():
            if not path.is_file():
                raise InputError(
                    f"{path} was removed while it was read: leave the source alone. Of a run in "
                    "training take a copy of one checkpoint"
                )
            if state(path) != before:
                raise InputError(f"{path} was changed while it was read: leave the source alone")


def _is_hf(directory: Path) -> bool:
    """Whether this is a Hugging Face directory. A workdir has a config.json, too, and a Hugging
    Face directory may hold a trainer's checkpoints/."""
    if any(directory.glob("*.safetensors")):
        return True
    if not (directory / "checkpoints").is_dir():
        return (directory / "config.json").is_file()
    with contextlib.suppress(InputError):
        return "model_type" in read_json(directory / "config.json")
    return False


def open_model(path: str | os.PathLike, dtype: DTypeLike | None = None) -> Source:
    """The model of a checkpoint, a workdir, a HF directory or a hub id.

    dtype is the weights'; None keeps it. Raises InputError when there is none, or it is damaged.
    """
    path = local(path)
    place = Path(path).absolute()
    if not place.exists() or _is_hf(place):
        directory = resolve_source(path)
        states = {file: state(file) for file in directory.glob("*.safetensors") if file.is_file()}
        config, weights = open_hf(directory, dtype)
        dtype = weights["embed", "weight"].dtype
        return Source(config, weights, dtype, stored_dtypes(directory), directory, states)
    return in_training(steps_of(place), lambda: _open_checkpoint(place, dtype))


def _open_checkpoint(path: Path, dtype: DTypeLike | None) -> Source:
    step = _step_directory(path, _NOT_READ)
    config, activations, stored = read_description(step)
    with _readable(step):
        files = [file for item in (_PARAMS, _TOKENIZER) for file in (step / item).rglob("*")]
        states = {file: state(file) for file in files if file.is_file()}
        weights = lazy_checkpoint.read(step / _PARAMS, parameter_shapes(config))
    weights = lazy.cast(weights, dtype)
    return Source(config, weights, jnp.dtype(activations), [stored], step / _TOKENIZER, states)


def load_model(path: str | os.PathLike) -> tuple[Decoder, Path]:
    """The model of a checkpoint, a workdir, a HF directory or a hub id, and its tokenizer's place.

    A HF model's float16 or bfloat16 weights stay as stored; on a CPU, activations are float32,
    since products of few bfloat16 rows run far below the memory's bandwidth there.
    """

    def load() -> tuple[Decoder, Path]:
        source = open_model(path)
        model = _read_model(source, path)
        source.refuse_changed()  # the caller reads the tokenizer
        return model, source.files

    return in_training(steps_of(Path(local(path))), load)


def read_model(source: Source, path: str | os.PathLike, mesh: Mesh | None = None) -> Decoder:
    """`load_model` of what `open_model(path)` has found; with a mesh as in `load_checkpoint`.

    Where a run in training has removed that meanwhile, its newest checkpoint is read.
    """
    for _ in range(TRIES):
        try:
            return _read_model(source, path, mesh)
        except InputError:
            if all(file.exists() for file in source.states):
                raise
        if not saved_steps(steps_of(Path(local(path)))):
            break
        source = open_model(path, source.weights["embed", "weight"].dtype)
    source.refuse_changed()
    raise AssertionError("a file of the source was missing and is there again")


def _read_model(source: Source, path: str | os.PathLike, mesh: Mesh | None = None) -> Decoder:
    dtype = cpu.activation_dtype(source.dtype)
    with _readable(Path(path)):
        return _in_memory(source.config, source.weights, dtype, mesh)


class TrainingCheckpoints:
    """A workdir's checkpoints/, through Orbax's manager: asynchronous, the newest few kept.

    With keep_best, as many more are kept: those saved with the lowest held-out loss.
    """

    def __init__(self, directory: Path, keep: int, keep_best: int = 0):
        self.directory, self.keep_best = directory.absolute(), keep_best
        self.arrays = lazy_checkpoint.ArrayHandler()
        policies = ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=_held_out_loss,
            reverse=True,
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=True,
                cleanup_tmp_directories=True,
                best_fn=_held_out_loss if keep_best else None,
                best_mode="min",
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                async_options=_ASYNC,
                temporary_path_class=_durable(),
            ),
            item_handlers={
                _CONFIG: ocp.JsonCheckpointHandler(),
                _PARAMS: lazy_checkpoint.handler(self.arrays),
                _TOKENIZER: TokenizerHandler(),
                _OPTIMIZER: lazy_checkpoint.handler(self.arrays),
            },
        )
        self.disk = Disk(self.directory)

    def latest_step(self) -> int | None:
        """The newest complete step; None in a new workdir."""
        return self.manager.latest_step()

    def best_step(self) -> int | None:
        """The step kept with the lowest held-out loss; None without keep_best."""
        return self.manager.best_step() if self.keep_best else None

    def save(
        self,
        step: int,
        model: Decoder,
        params: dict,
        optimizer: Any,
        tokenizer: Path | None,
        loss: float | None = None,
        logged: Mapping[str, int] | None = None,
    ) -> None:
        """Starts a save of this step; training may go on while it is written.

        It counts as saved when `wait` returns: then a power cut cannot take it away, and older
        ones may be removed.

        `loss` is the held-out loss by which keep_best ranks, None where there is none. `logged` are
        the bytes of each log up to this step (`logged_bytes`).

        Raises RunEnded when the disk has no room for it, or when the save before has failed.
        """
        if step in self.manager.all_steps():
            return
        self.wait()
        self.disk.refuse_full(step, params, optimizer)
        described = {"step": step, "logged": dict(logged or {})}
        metrics = {"loss": loss} if loss is not None and math.isfinite(loss) else {}
        with self.disk.saving():
            self.manager.save(
                step,
                args=save_args(model, params, tokenizer, optimizer, described),
                metrics=metrics if self.keep_best else None,
            )

    def check(self) -> None:
        """Raises RunEnded when the save in progress has failed; costs nothing."""
        self.disk.check()

    def wait(self) -> None:
        """Until the save in progress is complete; raises as `save` does."""
        try:
            with self.disk.saving():
                self.manager.wait_until_finished()
        finally:
            self.arrays.settle()

    def restore(self, step: int, params: dict, optimizer: Any) -> tuple[dict, Any]:
        """Weights and optimizer state of a step, onto the shardings that the targets carry.

        Raises InputError when it cannot be read.
        """
        directory = self.directory / str(step)
        with _readable(directory):
            return (
                lazy_checkpoint.restore(directory / _PARAMS, params),
                lazy_checkpoint.restore(directory / _OPTIMIZER, optimizer),
            )

    def close(self) -> None:
        """Waits for a save in progress; raises as `save` does, once."""
        try:
            if not self.disk.failures:
                self.wait()
        finally:
            self.arrays.settle()
            # After a failure the manager waits for the other processes' parts, which never come.
            if not self.disk.failures or jax.process_count() == 1:
                with contextlib.suppress(Exception):  # the failure, once more
                    self.manager.wait_until_finished()
                self.manager.close()
            self.disk.close()


def _held_out_loss(metrics: dict[str, float]) -> float:
    """What checkpoints are ranked by; those without, or whose loss is NaN, come last."""
    loss = metrics.get("loss", math.inf)
    return loss if math.isfinite(loss) else math.inf


def open_with_tokenizer(path: str | os.PathLike) -> tuple[Source, Any, frozenset[int]]:
    """A model that is not read yet, its tokenizer, and the tokens that end a text.

    path is a checkpoint, a workdir, a HF directory or a hub id. Raises InputError as `open_model`
    and `load_tokenizer` do.
    """

    def load() -> tuple[Source, Any, frozenset[int]]:
        source = open_model(path)
        vocab_size = source.config.vocab_size
        tokenizer = load_tokenizer(source.files, vocab_size)
        ends = end_tokens(source.files, tokenizer, vocab_size)
        source.refuse_changed()  # a file that was removed says nothing, and may not be missed
        return source, tokenizer, ends

    return in_training(steps_of(Path(local(path))), load)
