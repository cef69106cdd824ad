"""Conversion between Hugging Face directories and Orbax checkpoints, block by block."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import jax
from tqdm import tqdm

from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.config.upcycle import PUBLISHED_UPCYCLING, UpcycleConfig
from finermoe_jax.errors import InputError, RunEnded
from finermoe_jax.runtime import disk
from finermoe_jax.runtime.buckets import BucketPath, Place, place
from finermoe_jax.runtime.downloads import cache
from finermoe_jax.runtime.preemption import INTERRUPTED, stop_requests
from finermoe_jax.weights.checkpoint import write_checkpoint
from finermoe_jax.weights.hf_config import model_config_to_hf
from finermoe_jax.weights.hf_weights import write_hf
from finermoe_jax.weights.model_card import TrainingRun, model_card, upcycled_origin
from finermoe_jax.weights.safetensors_files import largest_file
from finermoe_jax.weights.source import ModelSource, open_model
from finermoe_jax.weights.targets import new_target, refuse_occupied
from finermoe_jax.weights.upcycle import upcycled


@dataclasses.dataclass(frozen=True)
class Export:
    """Further input and steps of an export to Hugging Face.

    Attributes:
      name: the Hub id that the target is sent to; the model card uses it in its examples.
      run_of: returns the training run that saved a checkpoint, for the card; None: unknown.
      ready: called after all checks, before anything is written.
    """

    name: str | None = None
    run_of: Callable[[Place], TrainingRun | None] = lambda checkpoint: None
    ready: Callable[[], None] = lambda: None


PLAIN = Export()


def convert(
    source: str,
    target: Place,
    to: Literal["orbax", "hf"],
    moe: MoEConfig | None,
    *,
    upcycling: UpcycleConfig = PUBLISHED_UPCYCLING,
    seed: int,
    dtype: str | None = None,
    stated: bool = False,
    export: Export = PLAIN,
) -> ModelConfig:
    """Converts `source` to `target`. Only a few blocks of the model are in memory at a time.

    Args:
      source: a HF directory, a finermoe checkpoint or a workdir, local or gs://; or a Hub id.
      target: a new or empty directory, or gs://…. It is a model only when complete.
      to: "orbax" upcycles a dense source and imports a FineRMoE unchanged; "hf" exports the source.
      moe: the experts; None imports a dense source unchanged.
      upcycling: choices that the architecture leaves open.
      seed: seed of the random weights.
      dtype: casts the weights; None keeps the source's dtype.
      stated: the user chose `moe`: a FineRMoE source must have exactly these experts.
      export: what "hf" needs beside the source.

    Returns the architecture that was written.

    Raises InputError if the source, the target or the sizes are wrong or the disk is too small, and
    RunEnded on SIGTERM and Ctrl-C. After either nothing of the target is left.
    """
    target = place(target)
    refuse_occupied(target.absolute())
    model = open_model(source, dtype)
    config, weights = model.config, model.weights
    if dtype is None and len(model.stored) > 1:
        raise InputError(
            f"{source} stores its weights as {' and '.join(model.stored)}, but a target has one "
            "dtype: choose it with --dtype"
        )
    card = None
    if to == "hf":
        model_config_to_hf(config, "float32")  # refuses variants without a HF form, before writing
        run = export.run_of(model.checkpoint) if model.checkpoint else None
        card = model_card(config, model.origin, run, export.name)
    else:
        key = jax.random.key(seed)
        config, weights = upcycled(source, config, weights, moe, key, upcycling, stated)
    origin = upcycled_origin(model.origin, model.config, config, upcycling)
    made = dataclasses.replace(model, config=config, weights=weights, origin=origin)
    _write(made, target, card, dtype, export.ready)
    return config


def _write(
    model: ModelSource,
    target: Place,
    card: str | None,
    dtype: str | None,
    ready: Callable[[], None],
) -> None:
    """Writes the model block by block, with a progress bar. It is a model only when complete.

    With a model card the target is a Hugging Face directory, else a checkpoint.
    """
    sizes = [array.nbytes for array in model.weights.values()]
    with (
        stop_requests() as stopped,
        _room(target, sizes, "orbax" if card is None else "hf"),
        new_target(target) as new,
        contextlib.ExitStack() as opened,
    ):
        ready()
        bar = opened.enter_context(
            tqdm(total=sum(sizes), desc=target.name, unit="B", unit_scale=True)
        )

        def written(size: int) -> None:
            bar.update(size)
            if stopped(0):
                raise RunEnded(f"interrupted; nothing of {target} is left", INTERRUPTED)

        def before_last() -> None:
            new.confirm()
            model.refuse_changed()

        config, weights, files = model.config, model.weights, model.files
        try:
            if card is not None:
                for block in write_hf(config, weights, new.path, files, card, before_last):
                    written(block)
            else:
                activations, origin = dtype or model.dtype, model.origin
                write_checkpoint(
                    config, activations, weights, new.path, files, written, origin, before_last
                )
        finally:
            model.refuse_changed()  # a changed source explains any other error


@contextlib.contextmanager
def _room(target: Place, sizes: list[int], to: Literal["orbax", "hf"]) -> Iterator[None]:
    """Raises InputError if the disk is too small for the weights or fills up meanwhile.

    A bucket needs local space for one file of a Hugging Face directory at a time (`write_hf`).
    """
    size, local, its = sum(sizes), target, "its disk"
    if isinstance(target, BucketPath):
        size, local = largest_file(sizes) if to == "hf" else 0, cache()
        its = f"the disk of {local}, where each file is written first,"
    assert isinstance(local, Path)
    existing = disk.existing(local.absolute().parent)
    if not disk.has_room(existing, size):
        free = disk.format_bytes(shutil.disk_usage(existing).free)
        raise InputError(
            f"{target} needs {disk.format_bytes(size)}, but {its} has {free} free: free some "
            f"space, or {'set XDG_CACHE_HOME to' if isinstance(target, BucketPath) else 'choose'} "
            "another disk"
        )
    filled = (
        f"the disk filled up while {target} ({disk.format_bytes(size)}) was written. Nothing of it "
        "is left; free some space, or choose another disk"
    )
    with disk.refusing_full(filled):
        yield
