"""Opens a model from a finermoe checkpoint, a workdir, a Hugging Face directory or the Hub."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from finermoe_jax.config.arguments import check_path
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.data.tokenizers import end_tokens, open_tokenizer
from finermoe_jax.errors import InputError
from finermoe_jax.layers import cpu
from finermoe_jax.model.decoder import Decoder, parameter_kinds
from finermoe_jax.runtime import disk
from finermoe_jax.runtime.buckets import BucketPath, Place, Stored, locate, place
from finermoe_jax.runtime.downloads import identity, local_copy, named_after
from finermoe_jax.runtime.files import State, state
from finermoe_jax.runtime.json_files import read_json
from finermoe_jax.weights import lazy
from finermoe_jax.weights.checkpoint import (
    NOT_READ,
    PARAMS,
    TOKENIZER,
    assembled,
    open_checkpoint,
    read_stored_origin,
    readable,
    steps_of,
    whole_checkpoint,
)
from finermoe_jax.weights.hf_weights import open_hf, resolve_source, stored_dtypes
from finermoe_jax.weights.integrity import in_training, saved_steps
from finermoe_jax.weights.lazy import Weights
from finermoe_jax.weights.model_card import UNKNOWN, Origin, read_origin


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model that is opened but not read yet.

    dtype is that of the activations, stored lists the dtypes of the stored weights. files is the
    directory with the tokenizer; of a model in a bucket, it is a local copy of `home`. states are
    those of the weight files and, for a checkpoint, of the tokenizer files, when opened. checkpoint
    is the checkpoint's directory, if it is one.
    """

    config: ModelConfig
    weights: Weights
    dtype: jnp.dtype
    stored: list[str]
    files: Path
    home: Place
    states: Mapping[Place, State | Stored]
    origin: Origin = UNKNOWN
    checkpoint: Place | None = None

    @property
    def announcement(self) -> str:
        """The line to print before the weights are read, which can take minutes."""
        size = sum(array.nbytes for array in self.weights.values())
        return f"reading {disk.format_bytes(size)} of weights …"

    def refuse_changed(self) -> None:
        """Raises InputError if a file was changed or removed since the source was opened.

        Call it after a long read: blocks read after a change may be wrong.
        """
        found = self._states_now()
        for path, before in self.states.items():
            if path not in found:
                raise InputError(
                    f"{path} was removed while it was read: do not change the source meanwhile. "
                    "If the run is still training, copy one of its checkpoints and read the copy"
                )
            if found[path] != before:
                raise InputError(
                    f"{path} was changed while it was read: do not change the source meanwhile"
                )

    def was_removed(self) -> bool:
        """Returns True if a file was removed since the source was opened."""
        return bool(self.states.keys() - self._states_now().keys())

    def _states_now(self) -> Mapping[Place, State | Stored]:
        if isinstance(self.checkpoint, BucketPath):
            return _bucket_states(self.checkpoint)
        files = [path for path in self.states if isinstance(path, Path) and path.is_file()]
        return {path: state(path) for path in files}


def _bucket_states(checkpoint: BucketPath) -> dict[Place, State | Stored]:
    """Returns the states of a checkpoint's weights and tokenizer in a bucket, in one LIST."""
    return {
        checkpoint / name: each
        for name, each in checkpoint.objects().items()
        if name.partition("/")[0] in (PARAMS, TOKENIZER)
    }


def _is_hf(directory: Place) -> bool:
    """True for a Hugging Face directory.

    A workdir also has a config.json, and a Hugging Face directory may contain a trainer's
    checkpoints/.
    """
    if isinstance(directory, BucketPath):
        names = directory.names()
    else:
        names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    if any(name.endswith(".safetensors") for name in names):
        return True
    if "checkpoints" not in names:
        return "config.json" in names
    with contextlib.suppress(InputError):
        return "model_type" in read_json(directory / "config.json")
    return False


def open_model(path: str | os.PathLike, dtype: DTypeLike | None = None) -> ModelSource:
    """Opens the model of a checkpoint, a workdir, a HF directory or a Hub id.

    dtype casts the weights; None keeps theirs. Raises InputError if there is no model or it is
    damaged.
    """
    given = place(path)
    where = given.absolute()
    if not where.exists() or _is_hf(where):
        directory = resolve_source(path)
        tensors = [file for file in directory.glob("*.safetensors") if file.is_file()]
        states: dict[Place, State | Stored] = {file: state(file) for file in tensors}
        home = given if isinstance(given, BucketPath) else directory
        with named_after(home, directory):
            config, weights = open_hf(directory, dtype)
            stored = stored_dtypes(directory)
        dtype = weights["embed", "weight"].dtype
        origin = read_origin(directory, None if where.exists() else str(path))
        return ModelSource(config, weights, dtype, stored, directory, home, states, origin)

    def load() -> ModelSource:
        step = whole_checkpoint(where, NOT_READ)
        with readable(step):
            states, files = _checkpoint_states(step)
        config, weights, computed, held = open_checkpoint(step)
        weights = lazy.cast(weights, dtype, parameter_kinds(config))
        origin, compute, home = read_stored_origin(step), jnp.dtype(computed), step / TOKENIZER
        return ModelSource(
            config, weights, compute, [held], files, home, states, origin, checkpoint=step
        )

    return in_training(steps_of(where), load)


def _checkpoint_states(step: Place) -> tuple[Mapping[Place, State | Stored], Path]:
    """Returns the states of a checkpoint's files, and a local directory with its tokenizer."""
    if isinstance(step, BucketPath):
        states = _bucket_states(step)
        item = step / TOKENIZER
        objects = {
            str(path).removeprefix(f"{item}/"): each
            for path, each in states.items()
            if str(path).startswith(f"{item}/") and isinstance(each, Stored)
        }
        return states, local_copy(item, objects, f"models/{identity(item, objects)}")
    files = [file for item in (PARAMS, TOKENIZER) for file in (step / item).rglob("*")]
    return {file: state(file) for file in files if file.is_file()}, step / TOKENIZER


def read_model(
    source: ModelSource,
    path: str | os.PathLike,
    mesh: Mesh | None = None,
    experts: str = "device",
) -> Decoder:
    """Reads the model that `open_model(path)` opened; mesh and experts as in `load_checkpoint`.

    On a CPU the activations of float16 or bfloat16 models are float32 (`cpu.activation_dtype`). If
    a running training removed that checkpoint meanwhile, its newest one is read.
    """
    steps = steps_of(place(path))

    def read(opened: ModelSource) -> Decoder:
        dtype = cpu.activation_dtype(opened.dtype)
        with readable(place(path)):
            return assembled(opened.config, opened.weights, dtype, mesh, experts)

    try:
        return read(source)
    except InputError:
        if not source.was_removed():
            raise
    if not saved_steps(steps):
        source.refuse_changed()
    dtype = source.weights["embed", "weight"].dtype
    return in_training(steps, lambda: read(open_model(path, dtype)))


def open_with_tokenizer(path: str | os.PathLike) -> tuple[ModelSource, Any, frozenset[int]]:
    """Opens a model without reading it; returns it, its tokenizer, and its end-of-text token ids.

    path is a checkpoint, a workdir, a HF directory or a Hub id. Raises InputError as `open_model`
    and `open_tokenizer` do.
    """

    def load() -> tuple[ModelSource, Any, frozenset[int]]:
        source = open_model(path)
        vocab_size = source.config.vocab_size
        tokenizer = open_tokenizer(source.files, vocab_size)
        ends = end_tokens(source.files, tokenizer, vocab_size)
        source.refuse_changed()  # the tokenizer's optional files may have been removed unnoticed
        return source, tokenizer, ends

    return in_training(steps_of(place(path)), load)


def load_tokenizer(path: str | os.PathLike) -> Any:
    """Loads the tokenizer of a model.

    Args:
      path: a checkpoint, a workdir (its newest step), a Hugging Face directory or a Hub id.

    Returns:
      A transformers tokenizer. The model's embedding has all of its ids.

    Raises:
      InputError: no model or no tokenizer at `path`, or a tokenizer with more ids than the model's
        vocabulary.

    Examples:
      >>> import finermoe_jax as fm
      >>> tokenizer = fm.load_tokenizer("demo/model")
      >>> tokenizer.decode(tokenizer("Return the")["input_ids"])
      'Return the'
    """
    check_path("path", path)
    return open_with_tokenizer(locate(path))[1]
